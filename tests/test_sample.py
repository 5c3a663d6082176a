"""Sampling, scores and comparison pictures."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data.cli import UserError
from data.clips import FramePair, choose_samples, load_frame_pairs
from data.paths import filtered_annotations_path, frame_path, frames_dir, write_annotations
from pecn.model import load_pipeline
from pecn.sampling import combine, predict_frames, predict_pairs, reconstruct_frame, wiener_gain
from pecn.sampling_options import SCHEDULERS, SamplingOptions
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline, run


def sample(data_dir, model, output_dir, *extra, check=True):
    command = ["python", "sample_from_pix2pix.py", "--model_dir", model, "--frames_dir", frames_dir(data_dir, SIDE)]
    command += ["--val_annotations", filtered_annotations_path(data_dir, "val"), "--output_dir", output_dir]
    return run(*command, "--num_inference_steps", 2, *extra, check=check)


@pytest.fixture(scope="module")
def model_with_config(tiny_model, tmp_path_factory):
    """As training leaves it: the model learned frame 20 -> 21 with progress prompts."""
    path = tmp_path_factory.mktemp("models") / "trained"
    shutil.copytree(tiny_model, path)
    arguments = {"resolution": SIDE, "input_frame_idx": 20, "target_frame_idx": 21, "add_progress": True}
    (path / "training_config.json").write_text(json.dumps({"arguments": arguments, "library_versions": {}}))
    return path


def test_run_leaves_pictures_scores_and_a_table(data_dir, model_with_config, tmp_path):
    (tmp_path / "samples" / "old").mkdir(parents=True)
    (tmp_path / "metrics.json").write_text("of an earlier run")
    options = ("--num_samples", "all", "--batch_size", 3, "--num_predictions", 2)
    done = sample(data_dir, model_with_config, tmp_path, *options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    summary, samples = metrics["summary"], metrics["samples"]
    assert (summary["num_samples"], summary["num_without_target"]) == (3, 1)
    assert sorted(row["video_id"] for row in samples) == ["val0", "val1", "val2", "val_short"]
    for row in samples:
        folder = tmp_path / "samples" / row["video_id"]
        pictures = {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}
        if row["video_id"] == "val_short":
            assert row["psnr"] is row["ssim"] is None
            assert sorted(pictures) == ["comparison", "expected", "input", "prediction", "uncertainty"]
            continue
        assert sorted(pictures) == ["comparison", "expected", "input", "prediction", "target", "uncertainty"]
        target = pictures["target"]
        for name, file in (("sample", "prediction"), ("expected", "expected"), ("copy", "input")):
            picture = pictures[file]
            expected = peak_signal_noise_ratio(target, picture, data_range=255)
            assert row["psnr"][name] == pytest.approx(expected)
            expected = structural_similarity(target, picture, channel_axis=2, data_range=255)
            assert row["ssim"][name] == pytest.approx(expected)
    assert sum(row["edit_prompt"].endswith("And 50% of the action has been completed.") for row in samples) == 3
    scored = [row for row in samples if row["psnr"]]
    for name in ("sample", "expected", "copy", "vae_ceiling"):
        assert summary["psnr"][name]["mean"] == pytest.approx(np.mean([row["psnr"][name] for row in scored]))
    assert summary["per_task"]["drop_object"]["num_samples"] == 1
    assert f"{summary['psnr']['copy']['mean']:.2f}" in done.stdout and "cover_object" in done.stdout
    assert "1 samples have no frame to predict (frame 20 to 21)" in done.stdout
    assert (tmp_path / "overview.png").is_file()
    results = ["metrics.json", "overview.png", "random_pairs.png", "samples", "scores.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == results
    assert not (tmp_path / "samples" / "old").exists()


def test_pictures_do_not_depend_on_batch_or_number_of_samples(data_dir, model_with_config, tmp_path):
    sample(data_dir, model_with_config, tmp_path / "all", "--num_samples", "all", "--batch_size", 4)
    options = ("--num_samples", 2, "--batch_size", 1, "--against", tmp_path / "all")
    done = sample(data_dir, model_with_config, tmp_path / "two", *options)
    folders = list((tmp_path / "two" / "samples").iterdir())
    assert len(folders) == 2
    others = sorted({"val0", "val1", "val2"} - {folder.name for folder in folders})
    assert f"left out: {len(others)} in one of the two only ({', '.join(others)})" in done.stdout
    for folder in folders:
        one = np.asarray(Image.open(folder / "prediction.png")).astype(int)
        other = np.asarray(Image.open(tmp_path / "all" / "samples" / folder.name / "prediction.png")).astype(int)
        assert np.abs(one - other).max() <= 1  # rounding of the last bit differs with the batch


def test_other_frames_than_trained_work_with_a_warning(data_dir, model_with_config, tiny_model, tmp_path):
    done = sample(data_dir, model_with_config, tmp_path, "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning: predicting frame 19 to 21" in done.stderr and "trained with frame 20 to 21" in done.stderr
    plain = sample(data_dir, tiny_model, tmp_path, "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning" not in plain.stderr
    assert "completed" not in json.loads((tmp_path / "metrics.json").read_text())["samples"][0]["edit_prompt"]


def test_any_start_keeps_the_horizon_of_a_fixed_pair(data_dir, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    arguments = {"resolution": SIDE, "input_frame_idx": 20, "target_frame_idx": 22, "add_progress": False}
    (model / "training_config.json").write_text(json.dumps({"arguments": arguments}))
    done = sample(data_dir, model, tmp_path / "out", "--input_frame_idx", "any", "--num_samples", 2)
    assert "any frame to that 2 later, " in done.stdout


def test_what_is_left_out_is_as_the_model_was_trained_and_validated(data_dir, tiny_model, tmp_path):
    arguments = {"train_data_dir": str(data_dir), "resolution": SIDE, "input_frame_idx": 19, "target_frame_idx": 22}
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 1.25, "scheduler": "ddim"}
    options |= {"strength": 0.5, "num_predictions": 2, "residual": False}

    def sampled(model, **flags):
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        run("python", "sample_from_pix2pix.py", "--model_dir", model, "--output_dir", tmp_path / "out", *words)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"]

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.dumps({"arguments": arguments | options | {"add_progress": True}})
    (model / "training_config.json").write_text(config)
    left_out = sampled(model)
    assert len(left_out) == 4 and left_out[0]["edit_prompt"].endswith("completed.")
    assert sampled(tiny_model, settings_of=model) == left_out
    assert sampled(model, num_predictions=1) != left_out

    (model / "training_config.json").write_text(json.dumps({"arguments": {"add_progress": True}}))
    frames, annotations = frames_dir(data_dir, SIDE), filtered_annotations_path(data_dir, "val")
    flags = {"input_frame_idx": 19, "target_frame_idx": 22, **options}
    assert sampled(model, frames_dir=frames, val_annotations=annotations, **flags) == left_out


def test_mistakes_get_one_line_and_leave_former_results(
    data_dir, tiny_model, model_with_config, tmp_path, tmp_path_factory
):
    (tmp_path / "metrics.json").write_text("former")
    strangers = tmp_path_factory.mktemp("strangers") / "val.json"
    write_annotations(strangers, [{"id": "stranger", "label": "moving a cup", "template": "Moving [something]"}])

    def message(*extra: object, model=tiny_model, status: int = 1) -> str:
        done = sample(data_dir, model, tmp_path, *extra, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
        return done.stderr.splitlines()[-1]

    assert "python -m data.dataset" in message("--val_annotations", data_dir / "nothing.json")
    assert "python -m data.video_loader" in message("--frames_dir", data_dir / "frames_64x64")
    late = ("--input_frame_idx", 70, "--target_frame_idx", 71)
    for flags in (late, ("--frames_dir", data_dir), ("--val_annotations", strangers)):
        line = message(*flags)
        assert "no video of" in line and "from one data directory" in line and "python -m data.video_loader" in line
    assert "none of the 4 videos chosen has both frames (frame 20 to 80) in " in message(
        "--target_frame_idx", 80, model=model_with_config
    )
    assert "choose a later target" in message("--input_frame_idx", 20, "--target_frame_idx", 20)
    assert "there is no file" in message("--val_annotations", data_dir)
    assert "metrics.json cannot be made (it is a file)" in message("--output_dir", tmp_path / "metrics.json")
    assert "at least 1" in message("--image_guidance_scale", 0.5, status=2)
    assert "must be above 0" in message("--strength", 0, status=2)
    if find_spec("lpips") is None:
        assert "pip install lpips" in message("--lpips")
    assert "no model_index.json" in message(model=data_dir)
    for name, damage in (("cut", b"cut"), ("empty", b"")):
        bad = make_data_dir(tmp_path_factory.mktemp(name))
        frame = frame_path(frames_dir(bad, SIDE), "val1", 20)
        frame.write_bytes(frame.read_bytes()[:100] if damage else damage)
        line = message("--frames_dir", frames_dir(bad, SIDE), "--num_samples", "all")
        assert f"{frame} is " in line and "python -m data.video_loader" in line
    odd = make_data_dir(tmp_path_factory.mktemp("odd"), side=36)
    assert "36 pixels wide; the model needs a multiple of 8" in message("--frames_dir", frames_dir(odd, 36))


def test_model_errors_name_the_model(tmp_path, tiny_model):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="broken cannot be loaded"):
        load_pipeline(broken)
    pickled = tmp_path / "pickled"
    make_tiny_pipeline().save_pretrained(pickled, safe_serialization=False)
    with pytest.raises(UserError, match="pickled cannot be loaded"):
        load_pipeline(pickled)


def pair(number, task):
    return FramePair(input_image="", edited_image="", edit_prompt="", video_id=str(number), task=task, num_frames=40)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.randoms())
def test_choice_is_even_over_tasks_and_independent_of_order(seed, num_samples, random):
    pairs = [pair(number, "abc"[number % 3]) for number in range(18)]
    chosen = choose_samples(pairs, num_samples, seed)
    shuffled = random.sample(pairs, len(pairs))
    assert choose_samples(shuffled, num_samples, seed) == chosen
    assert choose_samples(pairs, None, seed)[:num_samples] == chosen
    counts = [sum(pair.task == task for pair in chosen) for task in "abc"]
    assert max(counts) - min(counts) <= 1
    assert len(chosen) == min(num_samples, 18)


def test_another_seed_chooses_other_samples_and_noise(data_dir):
    pairs, _ = load_frame_pairs(data_dir, "val", SIDE)
    many = [pair(number, "a") for number in range(50)]
    assert choose_samples(many, 5, 1) != choose_samples(many, 5, 2)
    pipeline = make_tiny_pipeline()
    one, same, other = (
        next(predict_pairs(pipeline, pairs[:1], seed, 1, SamplingOptions(num_inference_steps=2), False)).sample
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_reconstruction_is_the_decoded_mode():
    import torch

    pipeline = make_tiny_pipeline()
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().numpy()[0].transpose(1, 2, 0)
    assert np.abs(reconstruct_frame(pipeline, frame) - expected).max() <= 1


def frames_and_prompts(count=3):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count)]
    return frames, [f"moving {number} cups" for number in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_options_draw_what_the_stock_pipeline_draws(prediction_type):
    pipeline = make_tiny_pipeline(prediction_type=prediction_type)
    frames, prompts = frames_and_prompts()
    options = {"num_inference_steps": 5, "guidance_scale": 7.5, "image_guidance_scale": 1.5}
    plain = SamplingOptions(**options, scheduler="euler_ancestral", residual=False, num_predictions=1)
    ours = predict_frames(pipeline, frames, prompts, [1, 2, 3], plain)
    for frame, prompt, seed, prediction in zip(frames, prompts, (1, 2, 3), ours):
        generator = torch.Generator().manual_seed(seed)
        stock = pipeline(prompt=prompt, image=Image.fromarray(frame), generator=generator, **options).images[0]
        assert np.abs(np.asarray(stock).astype(int) - prediction.sample).max() <= 1
        assert prediction.expected is prediction.uncertainty is None


def test_residual_decoding_lies_between_input_and_decoded_picture():
    pipeline = make_tiny_pipeline()
    frames, prompts = frames_and_prompts()
    options = {"num_inference_steps": 3, "num_predictions": 1}
    plain = predict_frames(pipeline, frames, prompts, [1, 2, 3], SamplingOptions(residual=False, **options))
    residual = predict_frames(pipeline, frames, prompts, [1, 2, 3], SamplingOptions(residual=True, **options))
    for frame, mixed, decoded in zip(frames, residual, plain):
        low, high = np.minimum(frame, decoded.sample), np.maximum(frame, decoded.sample)
        assert ((mixed.sample >= low) & (mixed.sample <= high)).all()
        assert not np.array_equal(mixed.sample, frame)


def test_of_several_predictions_one_is_shown_and_their_mean_beside_it():
    """The first of several is the single one. With two, both are as near to their mean, and the first is shown."""
    pipeline = make_tiny_pipeline()
    frames, prompts = frames_and_prompts(2)

    def predict(count):
        options = SamplingOptions(num_inference_steps=2, num_predictions=count, residual=False)
        return predict_frames(pipeline, frames, prompts, [5, 6], options)

    for first, both in zip(predict(1), predict(2)):
        assert first.expected is None and first.uncertainty is None
        # Two values lie standard deviation / sqrt(2) from their mean: averaged over colors that bounds the distance.
        distance = np.abs(both.expected.astype(float) - first.sample).mean(axis=2)
        assert np.abs(distance - both.uncertainty / np.sqrt(2)).max() <= 1
        other = 2.0 * both.expected - first.sample  # to within the mean's rounding
        nearest = min(np.abs(both.sample - picture).max() for picture in (first.sample.astype(float), other))
        assert nearest <= 2


@pytest.mark.parametrize("residual", [False, True])
def test_the_sample_is_the_prediction_nearest_to_the_mean(residual):
    """Levels 40, 100, 112 and 160 have the mean 103: the second is nearest, and no average of any."""
    image = np.full((32, 32, 3), 10, np.float32)
    pictures = np.stack([np.full_like(image, level) for level in (40, 100, 112, 160)])
    frame = combine(pictures, image, image if residual else None)
    assert (frame.sample == 100).all()
    if residual:  # nearly all of the mean's change is kept where predictions disagree as here
        assert 85 <= frame.expected.min() <= frame.expected.max() <= 103
    else:
        assert (frame.expected == 103).all()
    assert frame.uncertainty == pytest.approx(np.std([40, 100, 112, 160], ddof=1))


@pytest.mark.parametrize("change, shown", [(7, 0), (9, 4), (14, 14)])
def test_a_sample_keeps_the_input_or_takes_the_prediction_unless_the_change_lies_between(change, shown):
    """The expected frame mixes both for all of these changes: by 1, 4 and 11 levels."""
    image = np.full((32, 32, 3), 100, np.float32)
    frame = combine(np.stack([image + change] * 2), image, image)
    assert (frame.sample == 100 + shown).all()
    assert frame.expected.mean() - 100 == pytest.approx(change - 6.5**2 / change, abs=0.5)


@pytest.mark.parametrize("count", [1, 4])
def test_residual_decoding_keeps_the_input_where_nothing_changes(count):
    rng = np.random.default_rng(0)
    image = rng.uniform(90, 150, (96, 96, 3)).astype(np.float32).round()
    reconstruction = np.full_like(image, 120)  # the VAE loses all detail
    pictures = reconstruction + rng.normal(0, 1, (count, 96, 96, 3)).astype(np.float32)
    pictures[:, 40:80, 40:80] += 80
    kept = combine(pictures, image, reconstruction)
    frames = [kept.sample, kept.expected] if count > 1 else [kept.sample]
    for frame in frames:
        assert np.array_equal(frame[:16, :16], image[:16, :16])
        assert np.abs(frame.astype(float) - 200)[50:70, 50:70].max() < 6  # the input's detail would be 30 off
    decoded = combine(pictures, image, None).sample.astype(float)
    assert np.abs(decoded - image)[:16, :16].max() > 20


@pytest.mark.parametrize("count", (2, 4, 8))
def test_gain_removes_noise_and_keeps_agreement(count):
    rng = np.random.default_rng(0)

    def gain(pictures):
        return wiener_gain(pictures.mean(axis=0), pictures.var(axis=0, ddof=1) / count)

    noise = rng.normal(0, 8, (count, 96, 96, 3)).astype(np.float32)
    assert gain(noise).mean() < 0.15
    movement = np.zeros((96, 96, 3), np.float32)
    movement[30:60, 30:60] = 60
    of_movement = gain(noise / 4 + movement)
    assert of_movement.shape == (96, 96, 1)
    assert of_movement[35:55, 35:55].min() > 0.95
    assert of_movement[:15].mean() < 0.05
    assert gain(np.full((count, 96, 96, 3), 5, np.float32)).max() == 0  # agreed upon, but too small


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("num_steps", (1, 2, 20, 61))
def test_steps_begin_in_noise_and_are_as_many_as_asked(scheduler, num_steps):
    pipeline = make_tiny_pipeline()
    frames, prompts = frames_and_prompts(1)
    timesteps = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: timesteps.append(float(inputs[1])))
    options = SamplingOptions(num_inference_steps=num_steps, scheduler=scheduler, num_predictions=1)
    options = replace(options, guidance_scale=1.0, image_guidance_scale=1.0, strength=1.0)
    predict_frames(pipeline, frames, prompts, [0], options)
    assert len(timesteps) == num_steps
    assert timesteps[0] > 950 and min(timesteps) >= 0
    assert timesteps == sorted(timesteps, reverse=True)


def test_without_guidance_only_the_conditioned_branch_is_computed():
    pipeline = make_tiny_pipeline()
    frames, prompts = frames_and_prompts(1)
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for text, image, branches in ((1.0, 1.0, 1), (3.0, 1.0, 2), (1.5, 1.5, 2), (7.5, 1.5, 3)):
        batches.clear()
        options = SamplingOptions(num_inference_steps=1, num_predictions=1)
        options = replace(options, guidance_scale=text, image_guidance_scale=image)
        predict_frames(pipeline, frames, prompts, [0], options)
        assert batches == [branches]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_weak_start_stays_near_the_input_frame(scheduler):
    pipeline = make_tiny_pipeline()
    frames, prompts = frames_and_prompts()
    unchanged = np.stack([reconstruct_frame(pipeline, frame) for frame in frames]).astype(int)

    def distance(strength):
        options = SamplingOptions(residual=False, num_predictions=1)
        options = replace(options, scheduler=scheduler, strength=strength, num_inference_steps=10)
        predictions = predict_frames(pipeline, frames, prompts, [1, 2, 3], options)
        return np.abs(np.stack([prediction.sample for prediction in predictions]) - unchanged).mean()

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_options_of_the_command_reach_the_prediction(data_dir, tiny_model, tmp_path):
    options = "--num_samples 1 --scheduler ddim --num_predictions 2 --strength 0.5 --guidance_scale 2".split()
    sample(data_dir, tiny_model, tmp_path / "some", *options)
    [row] = json.loads((tmp_path / "some" / "metrics.json").read_text())["samples"]
    folder = tmp_path / "some" / "samples" / row["video_id"]
    assert (folder / "uncertainty.png").is_file()
    sample(data_dir, tiny_model, tmp_path / "plain", "--num_samples", 1, "--residual", "False")
    plain = tmp_path / "plain" / "samples" / row["video_id"]
    assert (plain / "prediction.png").read_bytes() != (folder / "prediction.png").read_bytes()


def test_a_single_prediction_leaves_no_expected_frame(data_dir, tiny_model, tmp_path):
    done = sample(data_dir, tiny_model, tmp_path)  # one is the default
    assert "expected" not in (tmp_path / "metrics.json").read_text() + done.stdout
    names = {path.name for path in (tmp_path / "samples").rglob("*.png")}
    assert names == {"comparison.png", "input.png", "prediction.png", "target.png"}


def test_lpips_is_scored_where_its_package_is(data_dir, tiny_model, tmp_path):
    """With a stand-in for it: everything is 0.125 apart."""
    (tmp_path / "lpips.py").write_text(
        "import torch\n"
        "LPIPS = lambda **options: lambda one, other: torch.full_like(one[:, :1], 0.125)\n"
        "im2tensor = lambda picture: torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None]\n"
    )
    command = [
        "python",
        "sample_from_pix2pix.py",
        "--model_dir",
        tiny_model,
        "--frames_dir",
        frames_dir(data_dir, SIDE),
    ]
    command += ["--val_annotations", filtered_annotations_path(data_dir, "val"), "--output_dir", tmp_path / "out"]
    done = run(*command, "--num_inference_steps", 1, "--lpips", PYTHONPATH=tmp_path)
    assert "LPIPS where something moves, lower is better: sample 0.125, copy 0.125, VAE ceiling 0.125" in done.stdout
    samples = json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"]
    assert all(
        row["moving"]["lpips"] == dict.fromkeys(("sample", "copy", "vae_ceiling"), 0.125)
        for row in samples
        if row["moving"]
    )
