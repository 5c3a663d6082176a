"""Which pairs of frames a clip offers, how they are drawn, and what training and sampling make of any start."""

import argparse
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from data.cli import CommandParser, UserError
from data.clips import (
    FrameChoice,
    add_frame_options,
    choose_balanced,
    describe_left_out,
    draw_pair,
    find_clips,
    frame_choice,
    horizons_of,
    settle_frames,
)
from data.files import write_json
from data.paths import filtered_annotations_path, frame_path, frames_dir, read_annotations
from data.prompts import swap_left_and_right
from data.video_decoder import load_picture
from pecn.encoded_frames import TrainingBatches, encode_once, stored_array
from pecn.model import encode_prompts
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline, run_forked, sampling_command, train

ANY_START = FrameChoice(None, range(1, 4), tell_horizon=True)


# Which pairs are meant.


def choice_of(*flags):
    parser = CommandParser()
    add_frame_options(parser)
    arguments = vars(parser.parse_args([str(flag) for flag in flags]))
    settle_frames(arguments)
    return frame_choice(arguments)


@pytest.mark.parametrize(
    ("flags", "start", "horizons", "tells", "words"),
    [
        ((), 20, [1], False, "frame 20 to 21"),
        (("--target_frame_idx", 25), 20, [5], False, "frame 20 to 25"),
        (("--input_frame_idx", 0, "--horizon", 5), 0, [5], False, "frame 0 to 5"),
        (("--horizon", "1-10"), 20, list(range(1, 11)), True, "frame 20 to the one 1 to 10 later"),
        (("--input_frame_idx", "any"), None, [1], False, "any frame to the one 1 later"),
        (("--input_frame_idx", "any", "--horizon", "2-3"), None, [2, 3], True, "any frame to the one 2 to 3 later"),
    ],
)
def test_flags_say_which_pairs_are_meant(flags, start, horizons, tells, words):
    choice = choice_of(*flags)
    assert (choice.start, list(choice.horizons), choice.tell_horizon, str(choice)) == (start, horizons, tells, words)


def test_frames_that_make_no_pair_are_refused(capsys):
    for target in (20, 19):
        with pytest.raises(UserError, match=f"{target} is not after input_frame_idx 20: choose a later target"):
            choice_of("--target_frame_idx", target)
    with pytest.raises(UserError, match="any start has no target 25: say with HORIZON"):
        choice_of("--input_frame_idx", "any", "--target_frame_idx", 25)
    for text in ("0", "-3", "10-1", "5-", "x", "1-2-3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="neither a number of frames"):
            horizons_of(text)
    with pytest.raises(SystemExit):
        choice_of("--target_frame_idx", 25, "--horizon", 5)
    assert "not allowed with argument" in capsys.readouterr().err


def test_drawn_pairs_are_among_the_frames_and_each_horizon_and_start_is_equally_likely():
    choice, numbers = FrameChoice(None, range(1, 5)), np.random.default_rng(0).random((20_000, 2))
    drawn = Counter(choice.draw(range(6), *pair) for pair in numbers)
    for horizon in choice.horizons:
        starts = [drawn[start, horizon] for start in range(6 - horizon)]
        assert sum(starts) / 20_000 == pytest.approx(1 / 4, abs=0.01)
        assert max(starts) < 1.2 * min(starts)
    assert len(drawn) == 5 + 4 + 3 + 2
    frames = {3, 4, 20, 22, 25}
    assert {FrameChoice(20, range(1, 11)).draw(frames, *pair) for pair in numbers} == {(20, 2), (20, 5)}
    assert {FrameChoice(None, (5,)).draw(frames, *pair) for pair in numbers} == {(20, 5)}
    assert FrameChoice(20, (1,)).draw(frames, 0, 0) is None


# Seeded choice.


@dataclass(frozen=True)
class Item:
    video_id: str
    task: str


@given(st.lists(st.integers(0, 1000), unique=True, max_size=30), st.integers(1, 30), st.integers(), st.randoms())
def test_choice_is_balanced_and_depends_on_the_seed_and_ids_alone(numbers, count, seed, random):
    items = [Item(str(number), "abc"[number % 3]) for number in numbers]
    chosen = choose_balanced(items, seed, count)
    random.shuffle(items)
    assert choose_balanced(items, seed, count) == chosen
    assert choose_balanced(items, seed, count + 1)[:count] == chosen and len(chosen) == min(count, len(items))
    taken, present = Counter(item.task for item in chosen), Counter(item.task for item in items)
    assert all(taken[task] == present[task] or taken[task] >= max(taken.values()) - 1 for task in present)
    alone = choose_balanced([item for item in items if item.task == "a"], seed, most_per_task=count)
    assert alone == [item for item in choose_balanced(items, seed, most_per_task=count) if item.task == "a"]


def test_a_clips_pair_is_drawn_by_the_seed_and_the_video(data_dir):
    clips, _ = find_clips(data_dir, "train", SIDE, ANY_START)
    first, again, other = ([draw_pair(clip, ANY_START, seed) for clip in clips] for seed in (1, 1, 2))
    assert first == again != other
    assert len({(pair.input_image[-9:], pair.edited_image[-9:]) for pair in first}) > 2
    for pair in first:
        start, target = (int(Path(path).stem) for path in (pair.input_image, pair.edited_image))
        later = "1 frame later." if target - start == 1 else f"{target - start} frames later."
        assert pair.edit_prompt.endswith(f" The frame is {later}")


# The clips of a data directory.


def change_entry(data_dir, place, **changes):
    path = filtered_annotations_path(data_dir, "train")
    entries = read_annotations(path)
    entries[place] = {key: value for key, value in (entries[place] | changes).items() if value is not None}
    write_json(path, entries)


def test_videos_without_a_pair_are_named_with_the_reason(tmp_path):
    data_dir = make_data_dir(tmp_path)
    frames = frames_dir(data_dir, SIDE)
    shutil.rmtree(frames / "train0")
    (frames / "train1" / "00021.png").unlink()
    clips, left_out = find_clips(data_dir, "train", SIDE, FrameChoice())
    assert [clip.video_id for clip in clips] == ["train2", "train3", "train4", "train5"]
    reasons = {"train0": "without extracted frames", **dict.fromkeys(("train1", "train_short"), "without frame 21")}
    assert dict(left_out) == reasons
    clips, left_out = find_clips(data_dir, "train", SIDE, FrameChoice(None, (3,)))
    assert left_out[1:] == [("train_short", "without two frames 3 apart")]
    assert clips[-1].frames == (19, 20, 22, 23)  # frame 21 takes part in no pair


def test_many_left_out_stay_one_readable_line():
    left_out = [
        (f"video{number}", "without extracted frames" if number % 4 else "without frame 900") for number in range(100)
    ]
    assert describe_left_out(left_out) == (
        "left out: 75 without extracted frames (video1, video2, video3, video5, video6, …);"
        " 25 without frame 900 (video0, video4, video8, video12, video16, …)"
    )
    assert all(video_id in describe_left_out(left_out, most_named=None) for video_id, _ in left_out)
    assert describe_left_out([]) == ""


@pytest.mark.parametrize(
    ("num_frames", "choice", "message"),
    [
        (None, FrameChoice(), "train2 is not recorded.*: python -m data.video_loader"),
        (20, FrameChoice(), "train2 is 20, though frame 20 exists"),
        (22, FrameChoice(None), "train2 is 22, though frame 22 exists"),
    ],
)
def test_progress_needs_the_length_of_every_video(tmp_path, num_frames, choice, message):
    data_dir = make_data_dir(tmp_path)
    change_entry(data_dir, 2, num_frames=num_frames)
    with pytest.raises(UserError, match=message):
        find_clips(data_dir, "train", SIDE, choice, add_progress=True)
    assert len(find_clips(data_dir, "train", SIDE, choice)[0]) >= 6


def test_estimates_of_a_file_are_told_and_none_may_be_missing(data_dir, tmp_path):
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps({"train": {f"train{number}": {"20": 10 * number} for number in range(6)}}))
    clips, _ = find_clips(data_dir, "train", SIDE, FrameChoice(), add_progress=str(path))
    prompts = [draw_pair(clip, FrameChoice(), seed=0).edit_prompt for clip in clips]
    assert [f"And {10 * number}% of the action" in prompt for number, prompt in enumerate(prompts)] == [True] * 6
    with pytest.raises(UserError, match="estimates.json has no estimate for frame 20 of video val0"):
        find_clips(data_dir, "val", SIDE, FrameChoice(), add_progress=str(path))


def test_a_frame_that_is_cut_is_refused_by_name(tmp_path):
    path = frame_path(frames_dir(make_data_dir(tmp_path), SIDE), "train0", 20)
    content = path.read_bytes()
    assert load_picture(path).shape == (SIDE, SIDE, 3)
    for length in range(0, len(content) - 30, 5):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="00020.png cannot be read as a picture"):
            load_picture(path)


# Arrays in files.

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def test_an_array_is_written_whole_or_not_at_all_and_once(tmp_path):
    def stopped():
        yield ROWS[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored_array(tmp_path / "rows.npy", np.float32, ROWS.shape, stopped())
    assert not list(tmp_path.glob("*.npy"))
    for blocks in (np.split(ROWS, [8, 16]), (pytest.fail("written again") for _ in range(1))):
        assert np.array_equal(stored_array(tmp_path / "rows.npy", np.float32, ROWS.shape, blocks), ROWS)
    assert [path.name for path in tmp_path.glob("*[!k]")] == ["rows.npy"]  # but for the lock


# Any start, several horizons.


def test_any_start_trains_on_pairs_that_the_prompt_describes(tmp_path):
    pipeline, data_dir = make_tiny_pipeline(), make_data_dir(tmp_path)
    clips, _ = find_clips(data_dir, "train", SIDE, ANY_START, add_progress=True)
    accelerator = Accelerator(cpu=True)
    encoded = encode_once(pipeline, clips, ANY_START, True, data_dir / "encoded_cache")
    assert len(encoded.moments) == 2 * (6 * 5 + 2)  # each frame once, and once mirrored
    assert encoded.embeddings is None
    sizes = {"train_batch_size": 6, "gradient_accumulation_steps": 1, "num_train_epochs": 20, "max_train_steps": None}
    batches = TrainingBatches(encoded=encoded, seed=3, scaling_factor=0.5, num_train_timesteps=1000, **sizes)
    seen = set()
    for step, ready in enumerate(batches.load(0, pipeline, accelerator)):
        batch = batches[step]
        assert torch.equal(ready["image_latents"], batch["image_latents"])
        with torch.no_grad():
            torch.testing.assert_close(ready["prompt_embeds"], encode_prompts(pipeline, batch["prompts"]))
        for place, sample in enumerate(batches.samples_of_step(step)):
            clip, first_row, prompt = clips[sample], encoded.first_rows[sample], batch["prompts"][place]
            rows = {
                (start, flip): first_row + index + flip * encoded.mirrored_rows
                for index, start in enumerate(clip.frames)
                for flip in (False, True)
            }
            latents = batch["image_latents"][place]
            [(start, flip)] = [key for key, row in rows.items() if np.array_equal(encoded.moments[row, :4], latents)]
            told = [clip.prompt(start, horizon) for horizon in ANY_START.horizons]
            horizon = 1 + [swap_left_and_right(text) if flip else text for text in told].index(prompt)
            mean, logvar = torch.tensor(encoded.moments[rows[start + horizon, flip]]).chunk(2)
            error = (batch["target_latents"][place] / 0.5 - mean) / torch.exp(0.5 * logvar)
            assert error.abs().mean() < 1.5  # drawn from the posterior of that very frame
            seen.add((start, horizon, flip))
    assert len({(start, horizon) for start, horizon, _ in seen}) == 4 + 3 + 2
    assert {flip for *_, flip in seen} == {True, False}


def test_a_model_of_any_start_is_trained_and_sampled_from(data_dir, tiny_model, tmp_path):
    flags, model = ("--input_frame_idx", "any", "--horizon", "1-3", "--add_progress"), tmp_path / "model"
    done = train(data_dir, tiny_model, model, *flags, "--max_train_steps", 2)
    assert "training on 7 videos (any frame to the one 1 to 3 later" in done.stdout

    def sample(*options):
        command = sampling_command(data_dir, model, tmp_path / "out", "--num_samples", "all", *options)
        done = run_forked([word for word in command if word not in ("--resolution", str(SIDE))])
        return done, json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"]

    done, rows = sample()
    assert "any frame to the one 1 to 3 later" in done.stdout and len(rows) == 4
    assert all(row["edit_prompt"].endswith("later.") and "of the action" in row["edit_prompt"] for row in rows)
    done, rows = sample("--target_frame_idx", 23)
    assert "frame 20 to 23" in done.stdout and "warning" not in done.stderr
    assert all(row["edit_prompt"].endswith("The frame is 3 frames later.") for row in rows)
    done, _ = sample("--input_frame_idx", 19, "--horizon", 4)
    assert "warning: predicting frame 19 to 23" in done.stderr
