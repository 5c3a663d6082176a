"""Encoding once, and the batches that training draws from it."""

import itertools
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cli import UserError
from data.clips import FrameChoice, find_clips
from data.paths import frame_path, frames_dir
from pecn.diffusion import conditioning_dropout
from pecn.encoded_frames import TrainingBatches, encode_once
from pecn.model import encode_prompts
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return make_tiny_pipeline()


def encode(pipeline, data_dir, random_flip=False, add_progress=False, **choice):
    choice = FrameChoice(**choice)
    clips, _ = find_clips(data_dir, "train", SIDE, choice, add_progress)
    PartialState(cpu=True)
    return encode_once(pipeline, clips, choice, random_flip, data_dir / "encoded_cache")


def moments_of(encoded, sample, frame):
    clip = encoded.clips[sample]
    return torch.tensor(encoded.moments[encoded.first_rows[sample] + clip.frames.index(frame)])


@pytest.fixture(scope="module")
def encoded(pipeline, tmp_path_factory):
    return encode(pipeline, make_data_dir(tmp_path_factory.mktemp("encoded")))


@pytest.fixture(scope="module")
def encoded_with_flip(pipeline, tmp_path_factory):
    return encode(pipeline, make_data_dir(tmp_path_factory.mktemp("flipped")), random_flip=True)


def batches(encoded, **changes):
    options = {
        "seed": 42,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3,
        "max_train_steps": None,
        "scaling_factor": 0.5,
        "num_train_timesteps": 1000,
        "conditioning_dropout_prob": 0.2,
    }
    return TrainingBatches(encoded=encoded, **options | changes)


def test_latents_and_embeddings_are_what_the_models_give(pipeline, encoded, data_dir):
    frames = [
        cv2.imread(str(frame_path(frames_dir(data_dir, SIDE), "train2", index)))[:, :, ::-1] for index in (20, 21)
    ]
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        tokens = pipeline.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
        empty = pipeline.text_encoder(tokens)[0][0]
    for position, frame in enumerate((20, 21)):
        torch.testing.assert_close(moments_of(encoded, 2, frame), posterior.parameters[position], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(encoded.embeddings[0]), empty, atol=1e-5, rtol=1e-4)
    assert len(encoded.moments) == 12
    assert len(encoded.embeddings) == 4  # three labels and the empty prompt, each once


def test_second_run_encodes_nothing(pipeline, tmp_path, monkeypatch):
    data_dir = make_data_dir(tmp_path)
    first = encode(pipeline, data_dir)
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_: pytest.fail("a frame was encoded again"))
    monkeypatch.setattr(pipeline.text_encoder, "forward", lambda *_: pytest.fail("a prompt was encoded again"))
    second = encode(pipeline, data_dir)
    assert second.key == first.key
    assert np.array_equal(second.moments, first.moments)


def test_changed_inputs_never_meet_the_old_cache(pipeline, tmp_path):
    data_dir = make_data_dir(tmp_path)
    key = encode(pipeline, data_dir).key
    path = frame_path(frames_dir(data_dir, SIDE), "train0", 21)
    original = path.read_bytes()
    frame = cv2.imread(str(path))
    frame[0, 0] += 1
    cv2.imwrite(str(path), frame)
    keys = {key, encode(pipeline, data_dir).key}
    path.write_bytes(original)
    assert encode(pipeline, data_dir).key == key
    moved = tmp_path / "moved"
    pipeline.save_pretrained(moved)
    assert encode(type(pipeline).from_pretrained(moved), data_dir).key == key  # where a model lies is no part of it
    other = make_tiny_pipeline()
    with torch.no_grad():
        other.vae.decoder.conv_in.bias[0] += 1
        keys.add(encode(other, data_dir).key)
        other.text_encoder.get_input_embeddings().weight[0, 0] += 1
        keys.add(encode(other, data_dir).key)
    keys.add(encode(pipeline, data_dir, random_flip=True).key)
    keys.add(encode(pipeline, data_dir, add_progress=True).key)
    assert len(keys) == 6


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    broken = make_tiny_pipeline()
    torch.nn.init.constant_(broken.vae.encoder.conv_in.bias, math.nan)
    with pytest.raises(UserError, match="AutoencoderKL gives numbers that are not finite"):
        encode(broken, make_data_dir(tmp_path))
    assert not list((tmp_path / "encoded_cache").glob("*.npy"))
    encode(make_tiny_pipeline(), tmp_path)  # nothing stands in the way of the next run


def test_frames_of_two_sizes_are_refused(pipeline, tmp_path):
    path = frame_path(frames_dir(make_data_dir(tmp_path), SIDE), "train1", 21)
    cv2.imwrite(str(path), np.zeros((SIDE, 2 * SIDE, 3), np.uint8))
    with pytest.raises(UserError, match=f"{path} is {2 * SIDE} x {SIDE} pixels, not {SIDE} x {SIDE}"):
        encode(pipeline, tmp_path)


def test_pairs_of_any_start_and_horizon_tell_their_own(pipeline, tmp_path):
    """Each pair's prompt fits its frames, and passes through the text encoder when the batch is loaded."""
    several = encode(pipeline, make_data_dir(tmp_path), True, True, start=None, horizons=range(1, 4), tell_horizon=True)
    seen = set()
    for index, clip in enumerate(several.clips):
        for for_horizon, for_start in itertools.product(np.linspace(0, 0.99, 6), repeat=2):
            first, last, prompt = several.draw(index, for_horizon, for_start, mirrored=False)
            start, end = (clip.frames[row - several.first_rows[index]] for row in (first, last))
            assert f"And {clip.progress[start]}% of the action" in prompt
            assert prompt.endswith(f"The frame is {end - start} frame{'s' * (end - start > 1)} later.")
            seen.add((start, end))
    assert seen == {(start, end) for start in range(19, 24) for end in range(start + 1, min(start + 3, 23) + 1)}
    stream = batches(several, max_train_steps=2)
    for index, loaded in enumerate(stream.load(0, pipeline, Accelerator(cpu=True))):
        own = encode_prompts(pipeline, stream[index]["prompts"])
        torch.testing.assert_close(loaded["prompt_embeds"], own.detach())
    [resumed] = stream.load(1, pipeline, Accelerator(cpu=True))
    assert torch.equal(resumed["noise"], stream[1]["noise"])


def test_prompts_of_a_step_are_encoded_in_the_runs_precision(pipeline, tmp_path):
    several = encode(pipeline, make_data_dir(tmp_path), add_progress=True, start=None)
    run = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    stream = batches(several, max_train_steps=1)
    [loaded] = stream.load(0, pipeline, run)
    with torch.no_grad():
        plain = encode_prompts(pipeline, stream[0]["prompts"])
        with run.autocast():
            torch.testing.assert_close(loaded["prompt_embeds"], encode_prompts(pipeline, stream[0]["prompts"]))
    assert not torch.equal(loaded["prompt_embeds"].float(), plain)


def test_mirrored_pairs_have_mirrored_frames_and_prompts(pipeline, encoded_with_flip, encoded):
    assert len(encoded_with_flip.moments) == 24
    inputs = [encoded_with_flip.first_rows[sample] for sample in range(6)]  # frame 20 is a clip's first
    plain, mirrored = (torch.tensor(encoded_with_flip.moments[start:])[inputs, :4] for start in (0, 12))
    torch.testing.assert_close(plain, torch.tensor(encoded.moments)[inputs, :4], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mirrored[0], plain[0], atol=1e-2)
    way, back = (
        f"Generate a future frame of this action: pushing a cup from {way}"
        for way in ("left to right", "right to left")
    )
    with torch.no_grad():
        expected = encode_prompts(pipeline, [way, back])
    embeddings = torch.tensor(encoded_with_flip.embeddings)
    torch.testing.assert_close(
        embeddings[[encoded_with_flip.prompts[prompt] for prompt in (way, back)]], expected, atol=1e-5, rtol=1e-4
    )
    flips = batches(encoded_with_flip, conditioning_dropout_prob=0.0)
    seen = set()
    for index in range(flips.max_train_steps):
        batch = flips[index]
        for place, sample in enumerate(flips.samples_of_step(index)):
            flipped = torch.equal(batch["image_latents"][place], mirrored[sample])
            assert flipped or torch.equal(batch["image_latents"][place], plain[sample])
            if sample == 0:
                own = embeddings[encoded_with_flip.prompts[back if flipped else way]]
                assert torch.equal(batch["prompt_embeds"][place], own)
            seen.add(flipped)
    assert seen == {True, False}


@settings(deadline=None, max_examples=30)
@given(
    num_processes=st.integers(1, 4),
    passes=st.integers(1, 3),
    size=st.integers(1, 3),
    step=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_a_step_does_not_depend_on_how_its_batch_is_divided(encoded, num_processes, passes, size, step, seed):
    total = num_processes * passes * size
    whole = batches(encoded, train_batch_size=total, max_train_steps=30, seed=seed)[step]
    parts = [
        batches(
            encoded,
            num_processes=num_processes,
            process_index=process,
            train_batch_size=size,
            gradient_accumulation_steps=passes,
            max_train_steps=30,
            seed=seed,
        )[step * passes + part]
        for part in range(passes)
        for process in range(num_processes)
    ]
    empty = whole.pop("empty_embeds")
    assert all(torch.equal(part.pop("empty_embeds"), empty) for part in parts)
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name


def test_every_sample_is_seen_once_an_epoch(encoded):
    stream = batches(encoded, train_batch_size=4)
    assert stream.max_train_steps == 5  # 3 epochs of 6 samples, 4 a step
    seen = [sample for step in range(6) for sample in stream.samples_of_step(step)]
    epochs = [seen[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_targets_are_samples_of_the_scaled_posterior(encoded):
    stream = batches(encoded, train_batch_size=6, max_train_steps=400)
    mean, logvar = torch.stack([moments_of(encoded, sample, 21) for sample in range(6)]).chunk(2, dim=1)
    drawn = [[] for _ in range(6)]
    for step in range(400):
        for sample, latents in zip(stream.samples_of_step(step), stream[step]["target_latents"]):
            drawn[sample].append(latents)
    for sample in range(6):
        draws = torch.stack(drawn[sample]) / 0.5
        std = torch.exp(0.5 * logvar[sample])
        assert ((draws.mean(0) - mean[sample]).abs() < 5 * std / 400**0.5).all()
        assert 0.9 < (draws.std(0) / std).mean() < 1.1


def test_dropout_drops_text_image_and_both_equally_often(encoded):
    uniform = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    drop_text, drop_image = conditioning_dropout(uniform, 0.05)
    for dropped in (drop_text & ~drop_image, drop_text & drop_image, ~drop_text & drop_image):
        assert abs(dropped.float().mean() - 0.05) < 0.003
    assert not torch.cat(conditioning_dropout(uniform, 0.0)).any()

    all_dropped = batches(encoded, conditioning_dropout_prob=1 / 3, train_batch_size=6, max_train_steps=50)
    kinds = set()
    for step in range(50):
        batch = all_dropped[step]
        for image_latents, embedding in zip(batch["image_latents"], batch["prompt_embeds"]):
            kinds.add((bool((image_latents == 0).all()), np.array_equal(embedding, encoded.embeddings[0])))
    assert kinds == {(True, False), (False, True), (True, True)}


@settings(deadline=None)
@given(num_epochs=st.integers(1, 4), size=st.integers(1, 9))
def test_validation_steps_are_those_that_complete_epochs(encoded, num_epochs, size):
    stream = batches(encoded, train_batch_size=size)
    expected = {math.ceil(epoch * 6 / size) for epoch in range(num_epochs, 60, num_epochs)}
    assert {step for step in range(1, 40) if stream.ends_epochs(step, num_epochs)} == {s for s in expected if s < 40}
