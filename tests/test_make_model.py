"""The demo's base model: its directory and its recipe."""

import argparse
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from data.cli import UserError
from data.prompts import action_progress, build_prompt, swap_left_and_right
from demo import make_model
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
from demo.pretraining.unet import draw_pairs, noised_batch, unet_batch
from demo.pretraining.untrained import build_pipeline, count_parameters
from demo.pretraining.vae import encode_all, vae_batch
from demo.renderer.clip import plan_clip
from pecn.diffusion import diffusion_loss
from pecn.model import Pipeline
from pecn.sampling import reconstruct_frame
from pecn.scores import psnr
from tests.commands import call, error_line
from tests.conftest import PROJECT, scalars

BASE_MODEL = PROJECT / "demo" / "base_model"
STAGES = ("vae", "text", "unet", "guided")
TINY = {"num_clips": 8, "seed": 0, "checkpointing_steps": 2, "validation_steps": 2}
TINY |= {f"{stage}_train_steps": 3 for stage in STAGES} | {f"{stage}_batch_size": 4 for stage in STAGES}


def load(directory: Path) -> Pipeline:
    pipeline = Pipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tree_hash(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(**options: object) -> str:
    """What the command prints with these options."""
    done = call(make_model, *(word for name, value in options.items() for word in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "untrained"
    make(output_dir=directory, **{f"{stage}_train_steps": 0 for stage in STAGES})
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An undisturbed run of 3 steps of each stage, on 8 clips: its model, its work folder, what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    printed = make(output_dir=folder / "model", work_dir=folder / "work", **TINY)
    return folder / "model", folder / "work", printed


@pytest.fixture(scope="module")
def frames(trained) -> list[StoredClips]:
    """The frames that run has rendered, of either size."""
    return [rendered_clips(trained[1], TINY["num_clips"], side) for side in RESOLUTIONS]


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


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(untrained, tmp_path):
    torch.rand(3)  # the global generator's state must not matter, nor be disturbed
    state = torch.get_rng_state()
    save_pipeline(build_pipeline(seed=0), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert tree_hash(tmp_path / "again") == tree_hash(untrained)
    other = build_pipeline(seed=1)
    assert not torch.equal(other.unet.conv_in.weight, build_pipeline(seed=0).unet.conv_in.weight)


def test_only_a_model_or_an_empty_folder_is_replaced(untrained, tmp_path):
    for folder in (untrained, tmp_path, tmp_path / "new"):
        check_output_dir(folder)
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        assert f"{path} exists and is no model directory" in error_line(call(make_model, "--output_dir", path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# What is committed.


def test_the_vae_starts_by_resizing_and_the_committed_one_keeps_30_db_of_unseen_frames():
    pipeline, trained = build_pipeline(seed=0), load(BASE_MODEL)
    for side in RESOLUTIONS:
        unseen = [frame for index in range(2) for frame in render_frames(index, side)[::9]]  # held out by the recipe
        assert np.mean([psnr(reconstruct_frame(pipeline, frame), frame) for frame in unseen]) > 22
        assert np.mean([psnr(reconstruct_frame(trained, frame), frame) for frame in unseen]) > 30


def test_the_committed_model_is_small_and_has_the_files_of_the_recipe(trained, untrained):
    files = tree_hash(BASE_MODEL)
    assert files.keys() == tree_hash(trained[0]).keys() == tree_hash(untrained).keys()
    assert {Path(name).suffix for name in files} <= {".json", ".txt", ".safetensors"}
    assert not [path for path in BASE_MODEL.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]
    assert sum((BASE_MODEL / name).stat().st_size for name in files) <= 30_000_000
    assert count_parameters(load(untrained)) < 15_000_000


def test_the_committed_model_reads_the_sentence():
    pipeline = load(BASE_MODEL)
    moments, prompts = [], []
    for index in range(NUM_HELD_OUT_CLIPS):
        plan = plan_clip(CLIP_SEED, "pretrain", index)
        if re.search(r"\b(left|right)\b", plan.annotation["label"]):
            starts = range(4, plan.num_frames - 8, 5)
            rows = [row for start in starts for row in (start, start + 5)]
            moments.append(next(encode_all(pipeline.vae, render_frames(index, 96)[rows])))
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


# The recipe.


def test_all_frames_of_a_clip_are_stored_and_no_clip_is_both_trained_on_and_held_out(frames):
    for stored, side in zip(frames, RESOLUTIONS):
        clips = stored.held_out + stored.training
        assert stored.rows.shape == (sum(clip.num_frames for clip in clips), side, side, 3)
        assert [clip.first_row for clip in clips] == np.cumsum([0] + [clip.num_frames for clip in clips[:-1]]).tolist()
        assert stored.training_rows == range(stored.training[0].first_row, len(stored.rows))
    again = frames[0].held_out[1]
    assert np.array_equal(render_frames(1, 96), frames[0].rows[again.first_row :][: again.num_frames])
    small, large = (clip_indices(side, 3000) for side in RESOLUTIONS)
    assert small[0] == large[0] == list(range(24)) and sorted(small[1] + large[1]) == list(range(24, 3024))
    assert len(large[1]) == 375


def test_half_of_the_pairs_have_the_usual_start_and_almost_half_without_a_told_horizon_the_next_frame(frames):
    clips, rng = frames[0].training, np.random.default_rng(0)
    inputs, targets, prompts = draw_pairs(clips, 2_000, rng)
    horizons = np.array(targets) - inputs
    assert set(horizons) == set(range(1, 11))
    starts = []
    for source, horizon, prompt in zip(inputs, horizons, prompts):
        clip = next(clip for clip in reversed(clips) if clip.first_row <= source)
        start = source - clip.first_row
        assert start + horizon < clip.num_frames and clip.label in prompt
        starts.append(start)
        if "% of" in prompt:
            assert f"And {action_progress(start, clip.num_frames)}% of" in prompt
        if "later" in prompt:
            assert prompt.endswith(f" The frame is {horizon} frame{'s' if horizon > 1 else ''} later.")
    assert 0.3 < starts.count(20) / len(starts) < 0.7 and set(starts) >= set(range(20))
    told = np.array(["later" in prompt for prompt in prompts])
    assert 0.05 < np.mean(horizons[told] == 1) < 0.15 and 0.35 < np.mean(horizons[~told] == 1) < 0.55


def test_training_steps_are_functions_of_the_seed_and_the_step(frames):
    one, same = (vae_batch(frames, 7, 0, 4, cropped=True) for _ in range(2))
    assert one.dtype == np.uint8 and one.shape == (4, 64, 64, 3) and np.array_equal(one, same)
    assert not np.array_equal(one, vae_batch(frames, 8, 0, 4, cropped=True))

    pipeline, rng = build_pipeline(seed=0), np.random.default_rng(0)
    rows = rng.normal(size=(len(frames[0].rows), 8, 24, 24)).astype(np.float16)
    latents = [StoredClips(frames[0].held_out, frames[0].training, rows)]
    batch, again, other = (unet_batch(pipeline, latents, step, 0, 64) for step in (7, 7, 8))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not any(torch.equal(batch[name], other[name]) for name in batch if name != "empty_embeds")


def test_a_short_training_changes_every_model_and_shows_what_it_does(untrained, trained):
    model, work_dir, printed = trained
    figures = r"sharpness [\d.]+, SSIM - copy [-+][\d.]+, PSNR [\d.]+ dB, - copy [-+][\d.]+ dB, good frames \d+%"
    assert re.search(rf"VAE, the best that a prediction could be: {figures}", printed)
    assert re.search(r"text encoder: \d+% of a batch read correctly", printed)
    assert re.findall(rf"UNet, step (\d+): {figures}", printed) == ["2", "3", "5", "6"]
    with Image.open(work_dir / "validation" / "step-000003.png") as picture:
        assert picture.width == 2 * (3 * (2 * 96 + 8) + 8)  # input, sample and target of both held-out pairs
    for name in ("sharpness", "ssim_gain", "psnr_gain", "good_frames"):
        assert scalars(work_dir / "logs", f"validation/{name}").keys() == {2, 3, 5, 6}
    before, after = load(untrained), load(model)
    for name in ("unet", "vae", "text_encoder"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
    assert after.vae.config.scaling_factor != before.vae.config.scaling_factor


def tiny_arguments(work_dir: Path, **changed: object) -> argparse.Namespace:
    return argparse.Namespace(work_dir=work_dir, **({"pretrained_model_name_or_path": None} | TINY | changed))


def link_frames(work_dir: Path, other: Path) -> None:
    """Lets a run in `other` find the frames that are rendered in `work_dir`."""
    other.mkdir(exist_ok=True)
    for path in work_dir.glob("frames-*"):
        (other / path.name).symlink_to(path)


def test_a_run_stopped_in_two_stages_and_resumed_equals_an_undisturbed_one(trained, tmp_path, monkeypatch):
    link_frames(trained[1], tmp_path)
    steps_begun, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_or_stop(*arguments):
        """Stops in the third step of the VAE and of the UNet's last stage, after the checkpoint of the second."""
        steps_begun.append(len(steps_begun) + 1)
        if steps_begun[-1] in (3, 13):
            raise KeyboardInterrupt
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain(build_pipeline(seed=0), tiny_arguments(tmp_path))
    pipeline = build_pipeline(seed=0)
    pretrain(pipeline, tiny_arguments(tmp_path))
    assert len(steps_begun) == 14
    save_pipeline(pipeline, tmp_path / "model")
    assert tree_hash(tmp_path / "model") == tree_hash(trained[0])


def test_a_second_run_repeats_nothing_and_other_settings_and_damage_are_refused(trained, tmp_path):
    model, work_dir, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in work_dir.glob("[!.]*.*")}
    kinds = sorted(name.split("-")[0] for name in before)
    assert kinds == ["frames", "frames", "guided.pt", "latents", "latents", "text.pt", "unet.pt", "vae.pt"]
    pipeline = build_pipeline(seed=0)
    pretrain(pipeline, tiny_arguments(work_dir))
    assert {path.name: path.stat().st_mtime_ns for path in work_dir.glob("[!.]*.*")} == before
    assert torch.equal(pipeline.unet.conv_in.weight.half(), load(model).unet.conv_in.weight.half())
    for changed, words in (
        ({"seed": 1}, "vae.pt belongs to other settings (seed was 0, is 1)"),
        ({"unet_batch_size": 5}, "unet.pt belongs to other settings (unet_batch_size was 4, is 5)"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            pretrain(build_pipeline(seed=0), tiny_arguments(work_dir, **changed))
    link_frames(work_dir, tmp_path)
    (tmp_path / "vae.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="vae.pt cannot be read .*; delete it"):
        pretrain(build_pipeline(seed=0), tiny_arguments(tmp_path))


def test_training_goes_on_from_a_model_whose_other_parts_stay_as_they_are(trained, tmp_path):
    link_frames(trained[1], tmp_path / "work")
    only_unet = {"vae_train_steps": 0, "text_train_steps": 0, "unet_train_steps": 1, "guided_train_steps": 0}
    start = {"pretrained_model_name_or_path": trained[0]}
    make(output_dir=tmp_path / "model", work_dir=tmp_path / "work", **(TINY | only_unet | start))
    before, after = tree_hash(trained[0]), tree_hash(tmp_path / "model")
    changed = {name for name in before if after[name] != before[name] and name.endswith(".safetensors")}
    assert changed == {"unet/diffusion_pytorch_model.safetensors"}
    assert load(tmp_path / "model").vae.config.scaling_factor == load(trained[0]).vae.config.scaling_factor
    with pytest.raises(UserError, match="unet.pt belongs to other settings .start_weights was .* another --work_dir"):
        pretrain(load(tmp_path / "model"), tiny_arguments(tmp_path / "work", **only_unet))
