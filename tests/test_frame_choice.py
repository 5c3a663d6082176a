"""Which pairs of frames a video offers, and training and sampling with any start and several horizons."""

import argparse
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cli import UserError
from data.clips import (
    ANY,
    ORACLE,
    FrameChoice,
    find_frame_pairs,
    frame_choice,
    horizons_of,
    load_clips,
    tells_horizon,
    verify_frames,
)
from data.paths import filtered_annotations_path, frames_dir, read_annotations, write_annotations
from data.prompts import swap_left_and_right
from pecn.encoded_frames import TrainingBatches, encode_once, load_batches
from pecn.model import encode_prompts
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline, run
from tests.test_train import final_weights, train

ANY_START = ("--input_frame_idx", "any", "--horizon", "1-3", "--add_progress")


def test_flags_say_which_pairs_are_meant():
    assert frame_choice(20, 25, None) == FrameChoice(20, (5,))
    assert list(frame_choice(20, 21, "1-10").horizons) == list(range(1, 11))
    assert frame_choice(ANY, 21, None) == FrameChoice(None, (1,))
    assert str(frame_choice(20, 25, None)) == "frame 20 to 25"
    assert str(frame_choice(ANY, 21, "1-10")) == "any frame to that 1 to 10 later"
    assert [tells_horizon(text) for text in (None, "5", "1-2")] == [False, False, True]
    for target in (20, 19):
        with pytest.raises(UserError, match=f"{target} is not after input_frame_idx 20: choose a later target"):
            frame_choice(20, target, None)
    with pytest.raises(UserError, match="any start has no target 25: say with HORIZON"):
        frame_choice(ANY, 25, None)
    for text in ("0", "-3", "10-1", "5-", "x", "1-2-3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="neither a number of frames"):
            horizons_of(text)


@settings(deadline=None)
@given(frames=st.sets(st.integers(0, 40)), numbers=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_drawn_pairs_are_among_the_frames(frames, numbers):
    for choice in (FrameChoice(None, range(1, 11)), FrameChoice(20, range(1, 11)), FrameChoice(None, (5,))):
        pair = choice.draw(frames, *numbers)
        if pair is None:
            assert not any(choice.starts(frames, horizon) for horizon in choice.horizons)
        else:
            start, horizon = pair
            assert {start, start + horizon} <= frames and horizon in choice.horizons
            assert choice.start in (None, start)


def test_each_horizon_is_equally_likely_and_so_is_each_start():
    choice, numbers = FrameChoice(None, range(1, 5)), np.random.default_rng(0).random((20_000, 2))
    drawn = Counter(choice.draw(range(6), *pair) for pair in numbers)
    for horizon in choice.horizons:
        starts = [drawn[start, horizon] for start in range(6 - horizon)]
        assert sum(starts) / 20_000 == pytest.approx(1 / 4, abs=0.01)
        assert max(starts) < 1.2 * min(starts)
    assert sum(drawn.values()) == sum(drawn[start, h] for h in choice.horizons for start in range(6 - h))


def test_a_spread_of_frames_has_pairs_of_every_horizon_from_all_over_the_video():
    choice = FrameChoice(None, range(1, 11))
    spreads = [choice.spread(range(40), 8, turn) for turn in range(50)]
    assert all(4 < len(frames) <= 8 for frames in spreads)
    starts = [start for frames in spreads for start in sorted(frames)[:1]]
    assert max(starts) < 15 and min(max(frames) for frames in spreads) > 25
    horizons = Counter(h for frames in spreads for h in choice.horizons if choice.starts(frames, h))
    assert min(horizons[h] for h in choice.horizons) >= 20  # of 50 videos with 4 of the 10 each
    firsts = [starts[0] for frames in spreads if (starts := choice.starts(frames, 1))]
    assert max(firsts) - min(firsts) > 10  # no horizon has a place of its own
    assert all(choice.spread(range(3), 2, turn) for turn in range(10))  # where not every horizon fits


def encode(pipeline, data_dir, choice, random_flip=False):
    clips, left_out = load_clips(data_dir, "train", SIDE, choice)
    arguments = (verify_frames(clips, SIDE), random_flip, data_dir / "encoded_cache", Accelerator(cpu=True))
    return encode_once(pipeline, clips, choice, *arguments), left_out


def batches(encoded, **options):
    sizes = {"train_batch_size": 6, "gradient_accumulation_steps": 1, "num_train_epochs": 20, "max_train_steps": None}
    constants = {"seed": 3, "scaling_factor": 0.5, "num_train_timesteps": 1000}
    return TrainingBatches(encoded=encoded, **sizes, **constants, **options)


def test_any_start_trains_on_pairs_that_the_prompt_describes(tmp_path):
    pipeline, choice = make_tiny_pipeline(), FrameChoice(None, range(1, 4), progress_source=ORACLE, tell_horizon=True)
    encoded, left_out = encode(pipeline, make_data_dir(tmp_path), choice, random_flip=True)
    assert left_out == [] and len(encoded.moments) == 2 * (6 * 5 + 2)  # each frame once, and once mirrored
    assert encoded.embeddings is None
    stream = batches(encoded)
    loader = load_batches(stream, 0, torch.device("cpu"), pipeline)
    seen = set()
    for step in range(len(stream)):
        batch, ready = stream[step], next(loader)
        assert torch.equal(ready["image_latents"], batch["image_latents"])
        with torch.no_grad():
            torch.testing.assert_close(ready["prompt_embeds"], encode_prompts(pipeline, batch["prompts"]))
        for place, sample in enumerate(stream.samples_of_step(step)):
            clip, first_row, prompt = encoded.clips[sample], encoded.first_rows[sample], batch["prompts"][place]
            rows = {
                (start, flip): first_row + index + flip * encoded.mirrored_rows
                for index, start in enumerate(clip.frames)
                for flip in (False, True)
            }
            image_latents = batch["image_latents"][place]
            [(start, flip)] = [
                key for key, row in rows.items() if np.array_equal(encoded.moments[row, :4], image_latents)
            ]
            told = [clip.prompt(choice, start, horizon) for horizon in choice.horizons]
            horizon = 1 + [swap_left_and_right(text) if flip else text for text in told].index(prompt)
            mean, logvar = torch.tensor(encoded.moments[rows[start + horizon, flip]]).chunk(2)
            error = (batch["target_latents"][place] / 0.5 - mean) / torch.exp(0.5 * logvar)
            assert error.abs().mean() < 1.5  # drawn from the posterior of that very frame
            seen.add((start, horizon, flip))
    assert len({(start, horizon) for start, horizon, _ in seen}) == 4 + 3 + 2
    assert {flip for *_, flip in seen} == {True, False}


def test_input_noise_changes_the_input_alone(tmp_path):
    encoded, _ = encode(make_tiny_pipeline(), make_data_dir(tmp_path), FrameChoice())
    plain, noisy = batches(encoded), batches(encoded, input_noise=0.7)
    strengths = []
    for step in range(len(plain)):
        before, after = plain[step], noisy[step]
        assert all(torch.equal(before[name], after[name]) for name in before if name != "image_latents")
        strengths += (after["image_latents"] - before["image_latents"]).std(dim=(1, 2, 3)).tolist()
    assert max(strengths) == pytest.approx(0.7 / 0.5, rel=0.1)  # in units of the scaled latents
    assert np.mean(strengths) == pytest.approx(0.35 / 0.5, rel=0.1)


def test_a_video_without_such_frames_is_named(tmp_path):
    data_dir = make_data_dir(tmp_path)
    clips, left_out = load_clips(data_dir, "train", SIDE, FrameChoice(None, (3,)))
    assert len(clips) == 6 and left_out == [("train_short", "without two frames 3 apart")]
    assert clips[0].frames == (19, 20, 22, 23)  # frame 21 takes part in no pair
    clips, _ = load_clips(data_dir, "train", SIDE, FrameChoice(None, range(1, 4)), frames_per_video=2)
    assert {len(clip.frames) for clip in clips} == {2}


def test_validation_pairs_are_drawn_by_the_seed_and_the_video(data_dir):
    entries = read_annotations(filtered_annotations_path(data_dir, "train"))
    choice, folder = FrameChoice(None, range(1, 4), tell_horizon=True), frames_dir(data_dir, SIDE)
    first, again, other = (find_frame_pairs(entries, folder, choice, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert find_frame_pairs(entries[::-1], folder, choice, seed=1)[0] == first[::-1]
    assert len({(pair.input_image[-9:], pair.edited_image[-9:]) for pair in first}) > 2


@pytest.fixture(scope="module")
def any_start_model(data_dir, tiny_model, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("any_start")
    done = train(data_dir, tiny_model, output_dir, *ANY_START, "--validation_epochs", 2)
    assert "training on 7 videos (any frame to that 1 to 3 later, " in done.stdout
    return output_dir


def test_any_start_resumes_with_the_same_result(any_start_model, data_dir, tiny_model, tmp_path):
    train(data_dir, tiny_model, tmp_path, *ANY_START, "--max_train_steps", 5)
    checkpoint = tmp_path / "checkpoint-3"
    assert (
        "horizon was 1-3, is None"
        in train(
            data_dir,
            tiny_model,
            tmp_path,
            "--input_frame_idx",
            "any",
            "--add_progress",
            "--resume_from_checkpoint",
            checkpoint,
            check=False,
        ).stderr
    )
    shutil.rmtree(tmp_path / "unet")
    train(data_dir, tiny_model, tmp_path, *ANY_START, "--resume_from_checkpoint", checkpoint)
    assert final_weights(tmp_path) == final_weights(any_start_model)


def test_sampling_follows_a_model_of_any_start(any_start_model, data_dir, tmp_path):
    def sample(*flags):
        command = ("python", "sample_from_pix2pix.py", "--model_dir", any_start_model, "--output_dir", tmp_path)
        done = run(*command, "--num_inference_steps", 1, "--num_samples", "all", *flags)
        return done, json.loads((tmp_path / "metrics.json").read_text())["samples"]

    done, rows = sample()
    assert "any frame to that 1 to 3 later (progress from an oracle), " in done.stdout and len(rows) == 4
    assert all(row["edit_prompt"].endswith("later.") and "of the action" in row["edit_prompt"] for row in rows)
    done, rows = sample("--target_frame_idx", 23)
    assert "frame 20 to 23 (progress" in done.stdout and "warning" not in done.stderr
    assert all(row["edit_prompt"].endswith("The frame is 3 frames later.") for row in rows)
    command = ("--image", tmp_path / "input.png", "--prompt", "a cup", "--target_frame_idx", 23)
    refused = run("python", "sample_from_pix2pix.py", "--model_dir", any_start_model, *command, check=False)
    assert refused.returncode == 2 and "for --image there is --horizon" in refused.stderr
    done, _ = sample("--input_frame_idx", 19, "--horizon", 4)
    assert "warning: predicting frame 19 to 23" in done.stderr


def test_any_start_needs_the_length_of_every_video_for_progress(tmp_path):
    data_dir = make_data_dir(tmp_path)
    path = filtered_annotations_path(data_dir, "train")
    entries = read_annotations(path)
    entries[1]["num_frames"] = 22
    write_annotations(path, entries)
    with pytest.raises(UserError, match="train1 is 22, though frame 22 exists"):
        load_clips(data_dir, "train", SIDE, FrameChoice(None, (1,), progress_source=ORACLE))
