"""The demo's base model: its directory, its tokenizer and its recipe."""

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.dataset import TASK_TEMPLATES, plain_template
from data.layout import UserError
from data.sthv2_dataset_hf import build_prompt, swap_left_and_right
from demo.make_model import check_output_dir, save_pipeline
from demo.pretraining.clips import CLIP_SEED, NUM_HELD_OUT_CLIPS, choose_frames, render_frames
from demo.pretraining.text_encoder import TEMPLATES, sentence_batch, train_text_encoder
from demo.pretraining.tokenizer import build_tokenizer
from demo.pretraining.training import (
    EncodedClip,
    PairBatch,
    drop_conditions,
    encode_clips,
    noised_batch,
    pair_batch,
    reconstruction_psnr,
    step_generator,
    vae_batch,
    validation_loss,
)
from demo.pretraining.untrained import build_pipeline, build_vae, count_parameters
from demo.renderer.clip import plan_clip
from pecn.diffusion import diffusion_loss
from tests.conftest import PROJECT, run

MEGABYTE = 10**6
BASE_MODEL = PROJECT / "demo" / "base_model"


def load(directory: Path) -> StableDiffusionInstructPix2PixPipeline:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tree_hash(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "untrained"
    steps = ("--vae_train_steps", 0, "--text_train_steps", 0, "--unet_train_steps", 0)
    run("python", "-m", "demo.make_model", "--output_dir", directory, *steps)
    return directory


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


# The directory.


def test_stock_diffusers_loads_it_in_float32_and_predicts(untrained):
    pipeline = load(untrained)
    assert {model.dtype for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.unet.config.in_channels == 8
    assert pipeline.vae_scale_factor == 4
    for side in (96, 128):
        frame = Image.new("RGB", (side, side))
        picture = pipeline("pushing a cup", image=frame, num_inference_steps=2).images[0]
        assert picture.size == (side, side)


def test_it_is_small_and_holds_no_pickles(untrained):
    assert count_parameters(load(untrained)) < 10_000_000
    names = tree_hash(untrained)
    assert sum((untrained / name).stat().st_size for name in names) <= 20 * MEGABYTE
    assert {Path(name).suffix for name in names} <= {".json", ".txt", ".safetensors"}
    assert not list(untrained.parent.glob(".*"))  # no temporary folder is left


def test_the_scheduler_is_stable_diffusions(untrained):
    scheduler = load(untrained).scheduler
    assert type(scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    config = scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert config.prediction_type == "v_prediction"


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


def test_an_initial_model_that_is_none_is_one_clear_line(tmp_path):
    out = tmp_path / "out"
    options = ("--output_dir", out, "--initial_model", tmp_path)
    done = run("python", "-m", "demo.make_model", *options, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --initial_model {tmp_path} is not a model directory")
    assert not out.exists()


def test_a_broken_initial_model_is_one_clear_line(untrained, tmp_path):
    broken = shutil.copytree(untrained, tmp_path / "broken")
    shutil.rmtree(broken / "vae")
    options = ("--output_dir", tmp_path / "out", "--initial_model", broken)
    done = run("python", "-m", "demo.make_model", *options, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert str(broken) in done.stderr and "vae/" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num_clips", "0"), "--num_clips: must be at least 1"),
        (("--unet_train_steps", "-1"), "--unet_train_steps: must be at least 0"),
        (("--initial_model", "any", "--unet_train_steps", "0"), "a UNet has to be trained after its text encoder"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, words, tmp_path):
    done = run("python", "-m", "demo.make_model", "--output_dir", tmp_path / "out", *options, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "out").exists()


# What is committed.


def test_the_vae_starts_by_resizing_and_keeps_30_db_of_unseen_frames_when_trained():
    unseen = [clip for index in range(4) for clip in render_frames(index, (96, 128))]  # held out by the recipe
    trained = load(BASE_MODEL).vae
    for clips in (unseen[0::2], unseen[1::2]):
        assert reconstruction_psnr(build_vae(), clips) > 26
        assert reconstruction_psnr(trained, clips) > 30


def test_the_committed_model_is_small_and_of_the_recipe(untrained):
    files = tree_hash(BASE_MODEL)
    assert sum((BASE_MODEL / name).stat().st_size for name in files) <= 20 * MEGABYTE
    assert files.keys() == tree_hash(untrained).keys()
    of_recipe, committed = load(untrained), load(BASE_MODEL)
    for name in ("unet", "vae", "text_encoder"):
        one, other = getattr(of_recipe, name), getattr(committed, name)
        assert {key: value.shape for key, value in one.state_dict().items()} == {
            key: value.shape for key, value in other.state_dict().items()
        }
    assert committed.tokenizer("a cup").input_ids == of_recipe.tokenizer("a cup").input_ids


def test_a_saved_model_does_not_say_where_it_was_loaded_from(untrained, tmp_path):
    save_pipeline(load(untrained), tmp_path / "saved")
    for directory in (BASE_MODEL, tmp_path / "saved"):
        assert not [path for path in directory.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_the_committed_model_reads_the_sentence():
    pipeline = load(BASE_MODEL)
    sideways = [
        index
        for index in range(NUM_HELD_OUT_CLIPS)
        if re.search(r"\b(left|right)\b", plan_clip(CLIP_SEED, "pretrain", index).annotation["label"])
    ]
    unseen = encode_clips(pipeline.vae, [clip for index in sideways for clip in render_frames(index, (96,))])
    contrary = [replace(clip, label=swap_left_and_right(clip.label)) for clip in unseen]
    assert validation_loss(pipeline, contrary, 0) > 1.02 * validation_loss(pipeline, unseen, 0)


# The tokenizer.


def expected_text(tokenizer, text: str) -> str:
    """`text` by CLIP's own rule: normal form, lower case; white space separates words and is not kept."""
    return re.sub(r"\s", "", tokenizer.backend_tokenizer.normalizer.normalize_str(text))


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_can_be_read_back_from_its_tokens(text):
    tokenizer = TOKENIZER
    for word in ("<|startoftext|>", "<|endoftext|>", "</w>"):
        text = text.replace(word, "")
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert re.sub(r"\s", "", decoded) == expected_text(tokenizer, text)


TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("text", ["推杯子 🥤👋🏽", "a\x00b\x07", "naïve Ünïcödé", "", "   ", "zzz" * 60])
def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, untrained, text):
    reloaded = load(untrained).tokenizer
    assert reloaded(text).input_ids == tokenizer(text).input_ids
    limit = reloaded.model_max_length
    padded = reloaded(text, padding="max_length", truncation=True, max_length=limit).input_ids
    assert len(padded) == limit == 77


def test_words_of_a_prompt_in_another_order_or_another_percentage_are_other_tokens(tokenizer):
    prompts = [
        build_prompt(f"pushing a cup from {one} to {other}", progress)
        for one, other in (("left", "right"), ("right", "left"))
        for progress in (None, 50, 60)
    ]
    assert len({tuple(tokenizer(prompt).input_ids) for prompt in prompts}) == len(prompts)


def test_every_template_in_a_prompt_stays_far_below_77_tokens(tokenizer):
    labels = [
        plain_template(template).lower().replace("something", "a light blue piece of paper")
        for templates in TASK_TEMPLATES.values()
        for template in templates
    ]
    lengths = {label: len(tokenizer(build_prompt(label, 60)).input_ids) for label in labels}
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)


# The recipe.


def test_training_frames_are_in_the_clip_and_pairs_cover_the_horizons():
    for index in range(50):
        for num_frames in (24, 43, 72):
            chosen = choose_frames(index, num_frames)
            assert chosen == sorted(set(chosen)) and 0 <= chosen[0] and chosen[-1] < num_frames
            gaps = {b - a for a in chosen for b in chosen}
            assert {1, 2, 3, 4, 5, 7, 8, 9, 10} <= gaps


def test_a_clip_is_rendered_once_for_all_sizes_and_never_of_make_clips_own_seed():
    small, large = render_frames(3, (96, 128))
    assert (small.resolution, large.resolution) == (96, 128)
    assert small.frames.dtype == np.uint8 and small.frames.shape == (len(small.indices), 96, 96, 3)
    assert small.indices == large.indices and small.label == large.label
    assert CLIP_SEED != 42


def test_training_steps_are_functions_of_the_seed_and_the_step():
    clips = render_frames(30, (96, 128)) + render_frames(31, (96, 128))
    by_size = {96: clips[0::2], 128: clips[1::2]}
    assert np.array_equal(vae_batch(by_size, 7, 0, cropped=True), vae_batch(by_size, 7, 0, cropped=True))
    assert not np.array_equal(vae_batch(by_size, 7, 0, cropped=True), vae_batch(by_size, 8, 0, cropped=True))
    assert {vae_batch(by_size, step, 0, cropped=False).shape[1] for step in range(20)} == {96, 128}

    encoded = [
        EncodedClip(clip.label, clip.num_frames, clip.indices, torch.randn(len(clip.indices), 8, 24, 24))
        for clip in by_size[96]
    ]
    batch, again = (pair_batch({24: encoded}, 7, 0, scaling_factor=2.0) for _ in range(2))
    assert torch.equal(batch.targets, again.targets) and batch.prompts == again.prompts
    assert not torch.equal(batch.targets, pair_batch({24: encoded}, 8, 0, scaling_factor=2.0).targets)
    assert any("% of the action" in prompt for prompt in batch.prompts)
    assert any("% of the action" not in prompt for prompt in batch.prompts)

    dropped = [drop_conditions(batch, step_generator(0, "test", step)) for step in range(400)]
    no_text = torch.tensor([[prompt == "" for prompt in one.prompts] for one in dropped])
    no_image = torch.stack([one.inputs.flatten(1).abs().sum(dim=1) == 0 for one in dropped])
    for share in (no_text & ~no_image, no_text & no_image, ~no_text & no_image):
        assert share.float().mean().item() == pytest.approx(0.05, abs=0.01)


def test_the_loss_of_a_batch_is_the_mean_squared_error_of_its_velocity():
    """v = sqrt(a) noise - sqrt(1 - a) latents (Salimans and Ho, 2022), a being the cumulative product of 1 - beta."""
    pipeline = build_pipeline(seed=0)
    torch.manual_seed(0)
    targets, inputs = torch.randn(2, 3, 4, 24, 24)
    pairs = PairBatch(targets, inputs, ["pushing a cup", "", "lifting a ball"])
    batch = noised_batch(pipeline, pairs, torch.Generator().manual_seed(1))
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = torch.cumprod(1 - betas, dim=0)[batch["timesteps"]].view(-1, 1, 1, 1)
    noise = batch["noise"]
    tokens = pipeline.tokenizer(pairs.prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = diffusion_loss(pipeline.unet, scheduler, batch)
        noisy = kept.sqrt() * targets + (1 - kept).sqrt() * noise
        text = pipeline.text_encoder(tokens).last_hidden_state
        predicted = pipeline.unet(torch.cat([noisy, inputs], dim=1), batch["timesteps"], text).sample
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * targets
    assert loss.item() == pytest.approx((predicted - velocity).square().mean().item(), rel=1e-5)


def test_the_text_encoder_learns_to_tell_sentences_apart():
    prompts, templates, progresses = sentence_batch(3, 0, 100)
    for prompt, template, progress in zip(prompts, templates.tolist(), progresses.tolist(), strict=True):
        pattern = re.sub(r"\\\[.*?\\\]", ".+", re.escape(TEMPLATES[template]))
        assert re.search(pattern, prompt, flags=re.IGNORECASE)
        assert (f"And {10 * progress}% of" in prompt) if progress < 10 else ("And" not in prompt)
    share = {
        steps: train_text_encoder(build_pipeline(seed=0), steps, 500, 0, torch.device("cpu")) for steps in (1, 120)
    }
    assert share[1] < 0.2 and share[120] > 0.6


def test_a_short_training_changes_every_model_and_reports_its_figures(untrained, tmp_path):
    steps = ("--vae_train_steps", 1, "--text_train_steps", 1, "--unet_train_steps", 1, "--num_clips", 2)
    done = run("python", "-m", "demo.make_model", "--output_dir", tmp_path / "trained", *steps)
    assert re.search(r"VAE at 96 pixels, \d+ held-out clips: [\d.]+ dB", done.stdout)
    assert "of the last batch classified correctly" in done.stdout
    assert re.search(r"held-out loss: [\d.]+; with each other's sentences: [\d.]+", done.stdout)
    assert re.search(r"on cpu .*VAE \d+ s", done.stdout)
    before, after = load(untrained), load(tmp_path / "trained")
    for name in ("unet", "vae", "text_encoder"):
        pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
    assert after.vae.config.scaling_factor != before.vae.config.scaling_factor
