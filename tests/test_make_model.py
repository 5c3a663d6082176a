"""The demo's base model: its directory and its recipe."""

import argparse
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from PIL import Image

from data.cli import UserError
from data.prompts import action_progress, build_prompt, swap_left_and_right
from demo.make_model import check_output_dir, save_pipeline
from demo.pretraining.clips import (
    CLIP_SEED,
    NUM_HELD_OUT_CLIPS,
    RESOLUTIONS,
    StoredClips,
    clip_indices,
    render_frames,
    rendered_clips,
)
from demo.pretraining.recipe import pretrain
from demo.pretraining.text_encoder import TEMPLATES, read_sentences, sentence_batch
from demo.pretraining.tokenizer import build_tokenizer
from demo.pretraining.unet import WINDOW, draw_pairs, moving_windows, noised_batch, unet_batch
from demo.pretraining.untrained import build_pipeline, count_parameters
from demo.pretraining.vae import encode_all, vae_batch
from demo.renderer.clip import plan_clip
from pecn.diffusion import diffusion_loss
from pecn.model import encode_prompts
from pecn.sampling import reconstruct_frame
from pecn.scores import psnr
from tests.conftest import PROJECT, run, scalars

MEGABYTE = 10**6
BASE_MODEL = PROJECT / "demo" / "base_model"
STAGES = ("vae", "text", "unet")
TINY = {"num_clips": 8, "seed": 0, "checkpointing_steps": 2, "validation_steps": 2}
TINY |= {f"{stage}_train_steps": 3 for stage in STAGES} | {f"{stage}_batch_size": 4 for stage in STAGES}


def load(directory: Path) -> StableDiffusionInstructPix2PixPipeline:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tree_hash(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_model(**options: object) -> str:
    """What the command prints with these options."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return run("python", "-m", "demo.make_model", *words).stdout


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "untrained"
    make_model(output_dir=directory, **{f"{stage}_train_steps": 0 for stage in STAGES})
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An undisturbed run of 3 steps of each stage, on 8 clips: its model, its work folder, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    printed = make_model(output_dir=folder / "model", work_dir=folder / "work", **TINY)
    return folder / "model", folder / "work", printed


@pytest.fixture(scope="module")
def frames(trained) -> list[StoredClips]:
    """The frames that run has rendered, of either size."""
    return [rendered_clips(trained[1], TINY["num_clips"], side) for side in RESOLUTIONS]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# The directory.


def test_stock_diffusers_loads_it_in_float32_and_predicts(untrained):
    pipeline = load(untrained)
    assert {model.dtype for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels == 8
    assert pipeline.vae_scale_factor == 4
    for side in (96, 128):
        frame = Image.new("RGB", (side, side))
        picture = pipeline("pushing a cup", image=frame, num_inference_steps=2).images[0]
        assert picture.size == (side, side)


def test_it_is_small_and_holds_no_pickles(untrained):
    assert count_parameters(load(untrained)) < 15_000_000
    names = tree_hash(untrained)
    assert sum((untrained / name).stat().st_size for name in names) <= 30 * MEGABYTE
    assert {Path(name).suffix for name in names} <= {".json", ".txt", ".safetensors"}
    assert not list(untrained.parent.glob(".*"))  # no temporary folder is left


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(untrained, tmp_path):
    torch.rand(3)  # the global generator's state must not matter, nor be disturbed
    state = torch.get_rng_state()
    save_pipeline(build_pipeline(seed=0), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert tree_hash(tmp_path / "again") == tree_hash(untrained)
    other = build_pipeline(seed=1)
    assert not torch.equal(other.unet.conv_in.weight, build_pipeline(seed=0).unet.conv_in.weight)


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("python", "-m", "demo.make_model", "--output_dir", tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_or_an_empty_folder_may_be_replaced_but_a_file_may_not(untrained, tmp_path):
    check_output_dir(untrained)
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        check_output_dir(tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num_clips", "0"), "--num_clips: must be at least 1"),
        (("--unet_train_steps", "-1"), "--unet_train_steps: must be at least 0"),
        (("--unet_batch_size", "0"), "--unet_batch_size: must be at least 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, words, tmp_path):
    done = run("python", "-m", "demo.make_model", "--output_dir", tmp_path / "out", *options, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "out").exists()


# What is committed.


def test_the_vae_starts_by_resizing_and_the_committed_one_keeps_30_db_of_unseen_frames():
    pipeline, trained = build_pipeline(seed=0), load(BASE_MODEL)
    for side in RESOLUTIONS:
        unseen = [frame for index in range(2) for frame in render_frames(index, side)[::9]]  # held out by the recipe
        assert np.mean([psnr(reconstruct_frame(pipeline, frame), frame) for frame in unseen]) > 22
        assert np.mean([psnr(reconstruct_frame(trained, frame), frame) for frame in unseen]) > 30


def test_the_committed_model_is_small_and_has_the_files_of_the_recipe(trained):
    files = tree_hash(BASE_MODEL)
    assert sum((BASE_MODEL / name).stat().st_size for name in files) <= 30 * MEGABYTE
    assert files.keys() == tree_hash(trained[0]).keys()


def test_a_saved_model_does_not_say_where_it_was_loaded_from(untrained, tmp_path):
    save_pipeline(load(untrained), tmp_path / "saved")
    for directory in (BASE_MODEL, tmp_path / "saved"):
        assert not [path for path in directory.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_the_committed_model_reads_the_sentence():
    pipeline = load(BASE_MODEL)
    moments, prompts = [], []
    for index in range(NUM_HELD_OUT_CLIPS):
        plan = plan_clip(CLIP_SEED, "pretrain", index)
        if re.search(r"\b(left|right)\b", plan.annotation["label"]):
            starts = range(4, plan.num_frames - 8, 5)
            rows = [row for start in starts for row in (start, start + 5)]
            moments.append(next(encode_all(pipeline.vae, render_frames(index, 96)[rows], 0)))
            progresses = [action_progress(start, plan.num_frames) for start in starts]
            prompts += [build_prompt(plan.annotation["label"], progress) for progress in progresses]
    inputs, targets = torch.from_numpy(np.concatenate(moments)).unflatten(0, (-1, 2)).unbind(1)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def loss(prompts: list[str]) -> float:
        generator = torch.Generator().manual_seed(0)
        batch = noised_batch(pipeline, inputs, targets, prompts, generator, dropout=0)
        with torch.no_grad():
            return diffusion_loss(pipeline.unet, scheduler, batch).item()

    assert loss([swap_left_and_right(prompt) for prompt in prompts]) > 1.02 * loss(prompts)


@pytest.mark.parametrize("text", ["推杯子 🥤👋🏽", "a\x00b\x07", "naïve Ünïcödé", "", "   ", "zzz" * 60])
def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, untrained, text):
    reloaded = load(untrained).tokenizer
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    limit = reloaded.model_max_length
    padded = reloaded(text, padding="max_length", truncation=True, max_length=limit).input_ids
    assert len(padded) == limit == 77


# The recipe.


def test_all_frames_of_a_clip_are_stored_and_no_clip_is_both_trained_on_and_held_out(frames):
    for stored, side in zip(frames, RESOLUTIONS):
        clips = stored.held_out + stored.training
        assert stored.rows.dtype == np.uint8 and stored.rows.shape[1:] == (side, side, 3)
        assert len(stored.rows) == sum(clip.num_frames for clip in clips)
        assert [clip.first_row for clip in clips] == np.cumsum([0] + [clip.num_frames for clip in clips[:-1]]).tolist()
        assert stored.training_rows == range(stored.training[0].first_row, len(stored.rows))
    again = frames[0].held_out[1]
    assert np.array_equal(render_frames(1, 96), frames[0].rows[again.first_row :][: again.num_frames])
    small, large = (clip_indices(side, 3000) for side in RESOLUTIONS)
    assert small[0] == large[0] == list(range(24)) and sorted(small[1] + large[1]) == list(range(24, 3024))
    assert len(large[1]) == 375


def test_pairs_have_any_start_and_horizon_and_their_prompts_say_so(frames):
    clips, rng = frames[0].training, np.random.default_rng(0)
    inputs, targets, prompts = draw_pairs(clips, 12_000, rng)
    horizons = np.array(targets) - inputs
    assert set(horizons) == set(range(1, 11))
    assert len(set(zip(inputs, targets))) > 0.95 * sum(clip.num_frames - h for clip in clips for h in range(1, 11))
    told = {"progress": 0, "horizon": 0}
    for source, horizon, prompt in zip(inputs, horizons, prompts):
        clip = next(clip for clip in reversed(clips) if clip.first_row <= source)
        start = source - clip.first_row
        assert start + horizon < clip.num_frames and clip.label in prompt
        if "% of" in prompt:
            told["progress"] += 1
            assert f"And {action_progress(start, clip.num_frames)}% of" in prompt
        if "later" in prompt:
            told["horizon"] += 1
            assert prompt.endswith(f" The frame is {horizon} frame{'s' if horizon > 1 else ''} later.")
    assert {name: count / 12_000 for name, count in told.items()} == pytest.approx(dict.fromkeys(told, 0.75), abs=0.02)


def test_training_steps_are_functions_of_the_seed_and_the_step(frames):
    one, same = (vae_batch(frames, 7, 0, 4, cropped=True) for _ in range(2))
    assert one.dtype == np.uint8 and one.shape == (4, 64, 64, 3) and np.array_equal(one, same)
    assert not np.array_equal(one, vae_batch(frames, 8, 0, 4, cropped=True))
    assert {vae_batch(frames, step, 0, 4, cropped=False).shape[1] for step in range(30)} == {96, 128}

    pipeline = build_pipeline(seed=0)
    rows = np.random.default_rng(0).normal(size=(len(frames[0].rows), 8, 24, 24)).astype(np.float16)
    latents = [StoredClips(frames[0].held_out, frames[0].training, rows)]
    batch, again, other = (unet_batch(pipeline, latents, step, 0, 512) for step in (7, 7, 8))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not any(torch.equal(batch[name], other[name]) for name in batch)
    late, last = ((batch["timesteps"] >= first).float().mean().item() for first in (500, 999))
    assert last == pytest.approx(0.1, abs=0.05) and late == pytest.approx(0.55, abs=0.06)
    no_image = (batch["image_latents"] == 0).flatten(1).all(dim=1)
    with torch.no_grad():
        empty = encode_prompts(pipeline, [""])
    no_text = torch.isclose(batch["prompt_embeds"], empty, atol=1e-4).flatten(1).all(dim=1)
    for dropped in (no_image & ~no_text, no_image & no_text, ~no_image & no_text):
        assert dropped.float().mean().item() == pytest.approx(0.05, abs=0.03)


def test_most_steps_train_on_the_same_window_of_both_frames_where_something_moves(frames):
    rows = np.zeros((len(frames[0].rows), 8, 24, 24), np.float16)
    rows[:, 0] = np.arange(24 * 24).reshape(24, 24)  # where a value comes from
    rows[1::2, 1, 20:, 20:] = 1  # what changes between two frames an odd number apart
    even, odd = (torch.from_numpy(rows[row : row + 1].astype(np.float32)).repeat(64, 1, 1, 1) for row in (0, 1))
    windows = moving_windows([even, odd], torch.Generator().manual_seed(0))
    assert all(window.shape == (64, 8, WINDOW, WINDOW) for window in windows)
    assert torch.equal(windows[0][:, 0], windows[1][:, 0])
    assert (windows[1][:, 1] == 1).flatten(1).any(dim=1).all()
    nothing_moves = moving_windows([even, even], torch.Generator().manual_seed(0))
    assert len(nothing_moves[0][:, 0, 0, 0].unique()) > 20

    pipeline, latents = build_pipeline(seed=0), [StoredClips(frames[0].held_out, frames[0].training, rows)]
    sides = [unet_batch(pipeline, latents, step, 0, 4)["target_latents"].shape[-1] for step in range(60)]
    assert set(sides) == {WINDOW, 24} and sides.count(WINDOW) / len(sides) == pytest.approx(0.75, abs=0.15)


def test_the_loss_of_a_batch_is_the_mean_squared_error_of_its_velocity():
    """v = sqrt(a) noise - sqrt(1 - a) latents (Salimans and Ho, 2022), a being the cumulative product of 1 - beta."""
    pipeline = build_pipeline(seed=0)
    inputs, targets = torch.randn(2, 3, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    targets[:, 4:] = -100  # next to no variance
    prompts = ["pushing a cup", "", "lifting a ball"]
    batch = noised_batch(pipeline, inputs, targets, prompts, torch.Generator().manual_seed(1), 0, last_timestep=0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.cumprod(1 - betas, dim=0)[batch["timesteps"]].view(-1, 1, 1, 1)
    noise, targets = batch["noise"], targets[:, :4]
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = diffusion_loss(pipeline.unet, scheduler, batch)
        noisy = kept.sqrt() * targets + (1 - kept).sqrt() * noise
        text = pipeline.text_encoder(tokens).last_hidden_state
        predicted = pipeline.unet(torch.cat([noisy, inputs[:, :4]], dim=1), batch["timesteps"], text).sample
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * targets
    assert loss.item() == pytest.approx((predicted - velocity).square().mean().item(), rel=1e-4)


def test_the_text_encoder_learns_from_sentences_that_tell_template_progress_and_horizon():
    prompts, classes = sentence_batch(3, 0, 100, 64)
    for prompt, (template, progress, horizon) in zip(prompts, classes.tolist(), strict=True):
        pattern = re.sub(r"\\\[.*?\\\]", ".+", re.escape(TEMPLATES[template]))
        assert re.search(pattern, prompt, flags=re.IGNORECASE)
        assert (f"And {10 * progress}% of" in prompt) if progress < 10 else ("And" not in prompt)
        assert (f"The frame is {horizon} frame" in prompt) if horizon else ("later" not in prompt)
    assert (classes[:, 1:] == torch.tensor([10, 0])).float().mean().item() == pytest.approx(0.25, abs=0.12)

    pipeline = build_pipeline(seed=0)
    reader = torch.nn.Linear(pipeline.text_encoder.config.hidden_size, len(TEMPLATES) + 22)
    for scores, right in read_sentences(pipeline, reader, prompts, classes):
        assert len(scores) == len(right) >= 64 * 20 and right.max() < scores.shape[1]


def test_a_short_training_changes_every_model_and_shows_what_it_does(untrained, trained):
    model, work_dir, printed = trained
    figures = r"sharpness [\d.]+, SSIM - copy [-+][\d.]+, PSNR [\d.]+ dB, - copy [-+][\d.]+ dB, frames \d+%"
    assert re.search(rf"VAE, the best that a prediction could be: {figures}", printed)
    assert re.search(r"text encoder: \d+% of a batch read correctly", printed)
    assert re.findall(rf"UNet, step (\d+): {figures}", printed) == ["2", "3"]
    with Image.open(work_dir / "validation" / "step-000003.png") as picture:
        assert picture.size == (2 * (3 * 2 * 96 + 8), 2 * 96)  # both held-out pairs
    for name in ("sharpness", "ssim_gain", "psnr_gain", "frames"):
        assert scalars(work_dir / "logs", f"validation/{name}").keys() == {2, 3}
    before, after = load(untrained), load(model)
    for name in ("unet", "vae", "text_encoder"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
    assert after.vae.config.scaling_factor != before.vae.config.scaling_factor


def tiny_arguments(work_dir: Path, **changed: object) -> argparse.Namespace:
    return argparse.Namespace(work_dir=work_dir, **({"pretrained_model_name_or_path": None} | TINY | changed))


def assert_same_state(one: object, other: object) -> None:
    """Both are the same numbers, lists and tensors, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    if isinstance(one, dict | list | tuple):
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same_state(one[key], other[key])
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_stopped_in_each_stage_and_resumed_equals_an_undisturbed_one(trained, tmp_path, monkeypatch):
    for path in trained[1].glob("frames-*"):
        shutil.copy2(path, tmp_path)
    steps_begun, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_or_stop(*arguments):
        """Stops in the third step of each stage, after the checkpoint of the second, the first time it comes there."""
        steps_begun.append(len(steps_begun) + 1)
        if steps_begun[-1] in (3, 7, 11):
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_stop)
    for _ in STAGES:
        with pytest.raises(KeyboardInterrupt):
            pretrain(build_pipeline(seed=0), tiny_arguments(tmp_path))
    pipeline = build_pipeline(seed=0)
    pretrain(pipeline, tiny_arguments(tmp_path))
    assert len(steps_begun) == 12
    for stage in STAGES:
        one, other = (torch.load(folder / f"{stage}.pt", weights_only=True) for folder in (trained[1], tmp_path))
        assert one["step"] == 3
        assert_same_state(one, other)
    save_pipeline(pipeline, tmp_path / "model")
    assert tree_hash(tmp_path / "model") == tree_hash(trained[0])


def test_a_second_run_finds_everything_and_other_settings_are_refused(trained, capsys):
    model, work_dir, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in work_dir.iterdir() if path.is_file()}
    assert sorted(name.split("-")[0] for name in before) == 2 * ["frames"] + 2 * ["latents"] + [
        "text.pt",
        "unet.pt",
        "vae.pt",
    ]
    pipeline = build_pipeline(seed=0)
    pretrain(pipeline, tiny_arguments(work_dir))
    assert {path.name: path.stat().st_mtime_ns for path in work_dir.iterdir() if path.is_file()} == before
    assert torch.equal(pipeline.unet.conv_in.weight.half(), load(model).unet.conv_in.weight.half())
    for changed, words in (
        ({"seed": 1}, "vae.pt belongs to other settings (seed was 0, is 1)"),
        ({"text_batch_size": 5}, "text.pt belongs to other settings (text_batch_size was 4, is 5)"),
        ({"unet_batch_size": 5}, "unet.pt belongs to other settings (unet_batch_size was 4, is 5)"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            pretrain(build_pipeline(seed=0), tiny_arguments(work_dir, **changed))


def test_training_goes_on_from_a_model_whose_other_parts_stay_as_they_are(trained, tmp_path):
    (tmp_path / "work").mkdir()
    for path in trained[1].glob("frames-*"):
        (tmp_path / "work" / path.name).symlink_to(path)
    start, only_unet = {"pretrained_model_name_or_path": trained[0]}, {"vae_train_steps": 0, "text_train_steps": 0}
    make_model(output_dir=tmp_path / "model", work_dir=tmp_path / "work", **(TINY | only_unet | start))
    before, after = tree_hash(trained[0]), tree_hash(tmp_path / "model")
    changed = {name for name in before if after[name] != before[name] and name.endswith(".safetensors")}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}
    assert load(tmp_path / "model").vae.config.scaling_factor == load(trained[0]).vae.config.scaling_factor
    with pytest.raises(UserError, match="unet.pt belongs to other settings .start_weights was .* another --work_dir"):
        pretrain(load(tmp_path / "model"), tiny_arguments(tmp_path / "work", **only_unet))


def test_a_damaged_checkpoint_is_one_clear_line(trained, tmp_path):
    for path in trained[1].glob("frames-*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "vae.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="vae.pt cannot be read .*; delete it"):
        pretrain(build_pipeline(seed=0), tiny_arguments(tmp_path))
