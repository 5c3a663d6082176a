"""Sampling, scores and comparison pictures."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data.dataset import UserError, filtered_annotations_path, frames_dir
from data.sthv2_dataset_hf import load_frame_pairs
from sample_from_pix2pix import (
    HIGHEST_PSNR,
    choose_samples,
    comparison_picture,
    contact_sheet,
    load_pipeline,
    mean_scores,
    predict_and_score,
    read_training_config,
    reconstruct_frames,
    score_frame,
    wrap_text,
)
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline, run


def sample(data_dir, model, output_dir, *extra, check=True):
    command = ["python", "sample_from_pix2pix.py", "--model_dir", model, "--frames_dir", frames_dir(data_dir, SIDE)]
    command += ["--val_annotations", filtered_annotations_path(data_dir, "val"), "--output_dir", output_dir]
    return run(*command, "--num_inference_steps", 2, *extra, check=check)


@pytest.fixture(scope="module")
def model_with_config(tiny_model, tmp_path_factory):
    """As training leaves it: the model learnt frame 20 -> 21 with progress prompts."""
    path = tmp_path_factory.mktemp("models") / "trained"
    shutil.copytree(tiny_model, path)
    arguments = {"resolution": SIDE, "input_frame_idx": 20, "target_frame_idx": 21, "add_progress": True}
    (path / "training_config.json").write_text(json.dumps({"arguments": arguments, "library_versions": {}}))
    return path


def test_run_leaves_pictures_scores_and_a_table(data_dir, model_with_config, tmp_path):
    (tmp_path / "samples" / "old").mkdir(parents=True)
    done = sample(data_dir, model_with_config, tmp_path, "--num_samples", "all", "--batch_size", 3)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    summary, samples = metrics["summary"], metrics["samples"]
    assert (summary["num_samples"], summary["num_without_target"]) == (3, 1)
    assert sorted(row["video_id"] for row in samples) == ["val0", "val1", "val2", "val_short"]
    for row in samples:
        folder = tmp_path / "samples" / row["video_id"]
        pictures = {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}
        if row["video_id"] == "val_short":
            assert row["psnr"] is row["ssim"] is None
            assert sorted(pictures) == ["comparison", "input", "prediction"]
            continue
        assert sorted(pictures) == ["comparison", "input", "prediction", "target"]
        target = pictures["target"]
        for name, picture in (("prediction", pictures["prediction"]), ("copy", pictures["input"])):
            expected = peak_signal_noise_ratio(target, picture, data_range=255)
            assert row["psnr"][name] == pytest.approx(expected)
            expected = structural_similarity(target, picture, channel_axis=2, data_range=255)
            assert row["ssim"][name] == pytest.approx(expected)
    assert sum(row["prompt"].endswith("And 50% of the action has been completed.") for row in samples) == 3
    scored = [row for row in samples if row["psnr"]]
    for name in ("prediction", "copy", "vae_ceiling"):
        assert summary["psnr"][name] == pytest.approx(np.mean([row["psnr"][name] for row in scored]))
    assert summary["per_task"]["drop_object"]["num_samples"] == 1
    assert f"{summary['psnr']['copy']:.2f}" in done.stdout and "cover_object" in done.stdout
    assert "1 samples have no frame 21" in done.stdout
    assert (tmp_path / "overview.png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "overview.png", "samples"]
    assert not (tmp_path / "samples" / "old").exists()


def test_pictures_do_not_depend_on_batch_or_number_of_samples(data_dir, model_with_config, tmp_path):
    sample(data_dir, model_with_config, tmp_path / "all", "--num_samples", "all", "--batch_size", 4)
    sample(data_dir, model_with_config, tmp_path / "two", "--num_samples", 2, "--batch_size", 1)
    folders = list((tmp_path / "two" / "samples").iterdir())
    assert len(folders) == 2
    for folder in folders:
        one = np.asarray(Image.open(folder / "prediction.png")).astype(int)
        other = np.asarray(Image.open(tmp_path / "all" / "samples" / folder.name / "prediction.png")).astype(int)
        assert np.abs(one - other).max() <= 1  # rounding of the last bit differs with the batch


def test_other_frames_than_trained_work_with_a_warning(data_dir, model_with_config, tiny_model, tmp_path):
    done = sample(data_dir, model_with_config, tmp_path, "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning: input_frame_idx is 19" in done.stderr and "was trained with 20" in done.stderr
    assert "target_frame_idx" not in done.stderr
    plain = sample(data_dir, tiny_model, tmp_path, "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning" not in plain.stderr
    assert "completed" not in json.loads((tmp_path / "metrics.json").read_text())["samples"][0]["prompt"]


def test_mistakes_get_one_line_and_leave_former_results(data_dir, tiny_model, tmp_path, tmp_path_factory):
    (tmp_path / "metrics.json").write_text("former")

    def message(*extra: object, model=tiny_model) -> str:
        done = sample(data_dir, model, tmp_path, *extra, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
        return done.stderr.splitlines()[-1]

    assert "python -m data.dataset" in message("--val_annotations", data_dir / "nothing.json")
    assert "python -m data.video_loader" in message("--frames_dir", data_dir / "frames_64x64")
    assert "no video of" in message("--input_frame_idx", 70)
    assert "at least 1" in message("--image_guidance_scale", 0.5)
    assert "no model_index.json" in message(model=data_dir)
    odd = make_data_dir(tmp_path_factory.mktemp("odd"), side=36)
    assert "36 pixels wide; the model needs a multiple of 8" in message("--frames_dir", frames_dir(odd, 36))


def test_model_errors_name_the_model(tmp_path, tiny_model):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="broken cannot be loaded"):
        load_pipeline(str(broken))
    pickled = tmp_path / "pickled"
    make_tiny_pipeline().save_pretrained(pickled, safe_serialization=False)
    with pytest.raises(UserError, match="pickled cannot be loaded"):
        load_pipeline(str(pickled))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 20), st.randoms())
def test_choice_is_even_over_tasks_and_independent_of_order(seed, num_samples, random):
    pairs = [{"video_id": str(number), "task": "abc"[number % 3]} for number in range(18)]
    chosen = choose_samples(pairs, num_samples, seed)
    shuffled = random.sample(pairs, len(pairs))
    assert choose_samples(shuffled, num_samples, seed) == chosen
    assert choose_samples(pairs, None, seed)[:num_samples] == chosen
    counts = [sum(pair["task"] == task for pair in chosen) for task in "abc"]
    assert max(counts) - min(counts) <= 1
    assert len(chosen) == min(num_samples, 18)


def test_config_of_a_model_on_the_hub_is_read_too(model_with_config, monkeypatch):
    def download(name, file, revision):
        assert (name, file, revision) == ("user/model", "training_config.json", "main")
        return str(model_with_config / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_training_config("user/model", revision="main")["add_progress"] is True


def test_another_seed_chooses_other_samples_and_noise(data_dir):
    pairs, _ = load_frame_pairs(data_dir, "val", SIDE)
    many = [{"video_id": str(number), "task": "a"} for number in range(50)]
    assert choose_samples(many, 5, 1) != choose_samples(many, 5, 2)
    pipeline = make_tiny_pipeline()
    one, same, other = (
        predict_and_score(pipeline, pairs[:1], seed, 1, show_progress=False, num_inference_steps=2)[0]["prediction"]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_identical_pictures_have_finite_scores():
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert score_frame(frame, frame) == (HIGHEST_PSNR, 1.0)
    brighter = np.minimum(frame.astype(int) + 1, 255).astype(np.uint8)
    assert 48 < score_frame(brighter, frame)[0] < 50  # an error of one level everywhere is 48.1 dB


def test_means_leave_out_what_has_no_target():
    scores = {"prediction": 20.0, "copy": 30.0, "vae_ceiling": 40.0}
    results = [{"psnr": scores, "ssim": scores}, {"psnr": None, "ssim": None}]
    assert mean_scores(results) == {"num_samples": 1, "psnr": scores, "ssim": scores}
    assert mean_scores(results[1:])["psnr"] == {"prediction": None, "copy": None, "vae_ceiling": None}


def test_reconstruction_is_the_decoded_mode():
    import torch

    pipeline = make_tiny_pipeline()
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().numpy()[0].transpose(1, 2, 0)
    assert np.abs(reconstruct_frames(pipeline, [frame])[0] - expected).max() <= 1


def test_comparison_shows_all_three_frames_and_the_words():
    frames = {
        name: np.full((SIDE, SIDE, 3), level, np.uint8)
        for name, level in (("input", 50), ("prediction", 100), ("target", 150))
    }
    scores = {"psnr": dict.fromkeys(("prediction", "copy", "vae_ceiling"), 20.0)}
    scores["ssim"] = scores["psnr"]
    result = frames | scores | {"prompt": "moving a cup up " * 20}
    picture = comparison_picture(result, "step 7")
    thirds = np.array_split(picture[60:200], 3, axis=1)
    assert [int(np.median(third)) for third in thirds] == [50, 100, 150]
    assert (picture[-20:] < 128).any()  # the last line of words
    without_target = comparison_picture(result | {"target": None, "psnr": None, "ssim": None})
    assert np.median(np.array_split(without_target[60:200], 3, axis=1)[2]) == 255


def test_contact_sheet_keeps_every_picture():
    pictures = [np.full((10 + index, 8, 3), index, np.uint8) for index in range(3)]
    sheet = contact_sheet(pictures)
    assert sheet.shape == (11 + 12, 16, 3)
    assert [(sheet[..., 0] == index).sum() for index in range(3)] == [80, 88, 96]
    assert contact_sheet(pictures[:1]).shape == (10, 8, 3)


@given(st.text(max_size=300), st.integers(40, 400))
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    font = ImageFont.load_default(size=13)
    lines = wrap_text(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
