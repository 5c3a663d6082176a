"""Frame pairs and prompts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.cli import UserError
from data.clips import (
    DEFAULT_CHOICE,
    ORACLE,
    FrameChoice,
    derive_seed,
    describe_left_out,
    draw_pairs,
    find_clips,
    frame_choice,
    load_frame_pairs,
    verify_frames,
)
from data.paths import filtered_annotations_path, frames_dir, read_annotations, write_annotations
from data.prompts import action_progress, build_prompt, swap_left_and_right
from data.sthv2_dataset_hf import frame_pairs_dataset
from tests.conftest import SIDE, make_data_dir, run


def test_prompts_are_the_published_sentences():
    assert build_prompt("moving a cup up") == "Generate a future frame of this action: moving a cup up"
    assert build_prompt("moving a cup up", 60) == (
        "Generate a future frame of this action: moving a cup up. And 60% of the action has been completed."
    )
    assert build_prompt("moving a cup up", 0).endswith("And 0% of the action has been completed.")
    assert build_prompt("moving a cup up", 60, horizon=5) == (
        "Generate a future frame of this action: moving a cup up. And 60% of the action has been completed."
        " The frame is 5 frames later."
    )
    assert build_prompt("moving a cup up", horizon=1).endswith(": moving a cup up. The frame is 1 frame later.")


@given(st.integers(1, 10_000), st.data())
def test_progress_is_a_tenth_below_the_share_that_has_passed(num_frames, data):
    input_frame_idx = data.draw(st.integers(0, num_frames - 1))
    progress = action_progress(input_frame_idx, num_frames)
    assert progress in range(0, 100, 10)
    assert progress == int((input_frame_idx / num_frames) * 10) * 10


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("pushing a cup from left to right", "pushing a cup from right to left"),
        ("Left, RIGHT", "Right, LEFT"),
        ("putting a bottle upright next to leftovers", "putting a bottle upright next to leftovers"),
    ],
)
def test_mirroring_swaps_whole_words_only(text, mirrored):
    assert swap_left_and_right(text) == mirrored
    assert swap_left_and_right(mirrored) == text


def test_derived_seeds_differ_by_every_argument():
    seeds = {derive_seed(seed, name, step) for seed in (0, 1) for name in ("order", "step") for step in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_dataset_has_the_promised_columns_and_pictures(data_dir):
    pairs, left_out = load_frame_pairs(data_dir, "train", SIDE, FrameChoice(progress_source=ORACLE))
    dataset = frame_pairs_dataset(pairs)
    assert dataset.column_names == ["input_image", "edited_image", "edit_prompt", "video_id", "task", "num_frames"]
    assert list(dataset["video_id"]) == [f"train{number}" for number in range(6)]
    row = dataset[1]
    assert row["task"] == "drop_object"
    assert row["num_frames"] == 40
    assert row["edit_prompt"].endswith("dropping a ball onto a table. And 50% of the action has been completed.")
    input_image, edited_image = (np.asarray(row[name]) for name in ("input_image", "edited_image"))
    assert input_image.shape == (SIDE, SIDE, 3)
    assert (np.roll(input_image[8:16], 1, axis=1) == edited_image[8:16]).mean() > 0.9  # the square moved by a pixel
    assert left_out == [("train_short", "without frame 21")]


def test_any_frame_pair_can_be_asked_for(data_dir):
    pairs, left_out = load_frame_pairs(data_dir, "train", SIDE, frame_choice(19, 22, None))
    assert len(pairs) == 6
    assert pairs[0].input_image.endswith("00019.png")
    assert pairs[0].edited_image.endswith("00022.png")
    assert len(left_out) == 1


def test_videos_without_a_frame_are_named_with_the_reason(tmp_path):
    data_dir = make_data_dir(tmp_path)
    frames = frames_dir(data_dir, SIDE)
    shutil.rmtree(frames / "train0")
    (frames / "train1" / "00021.png").unlink()
    pairs, left_out = load_frame_pairs(data_dir, "train", SIDE)
    assert len(pairs) == 4
    assert dict(left_out) == {
        "train0": "without extracted frames",
        "train1": "without frame 21",
        "train_short": "without frame 21",
    }
    assert "train0" in describe_left_out(left_out)
    assert describe_left_out([]) == ""


def test_many_left_out_stay_one_readable_line():
    left_out = [
        (f"video{number}", "without extracted frames" if number % 4 else "without frame 900") for number in range(100)
    ]
    assert describe_left_out(left_out) == (
        "100 videos left out: 75 without extracted frames (video1, video2, video3, video5, video6, …);"
        " 25 without frame 900 (video0, video4, video8, video12, video16, …)"
    )
    assert all(video_id in describe_left_out(left_out, most_named=None) for video_id, _ in left_out)


def test_target_may_be_missing_where_it_is_only_predicted(data_dir):
    entries = read_annotations(filtered_annotations_path(data_dir, "val"))
    clips, left_out = find_clips(entries, frames_dir(data_dir, SIDE), DEFAULT_CHOICE, target_required=False)
    assert left_out == []
    pairs = draw_pairs(clips, DEFAULT_CHOICE, seed=0)
    assert [pair.video_id for pair in pairs if pair.edited_image is None] == ["val_short"]
    assert frame_pairs_dataset(pairs)[3]["edited_image"] is None


def test_progress_without_num_frames_says_what_to_run(tmp_path):
    data_dir = make_data_dir(tmp_path)
    path = filtered_annotations_path(data_dir, "train")
    entries = read_annotations(path)
    del entries[2]["num_frames"]
    write_annotations(path, entries)
    with pytest.raises(UserError, match="train2 is not recorded.*: python -m data.video_loader"):
        load_frame_pairs(data_dir, "train", SIDE, FrameChoice(progress_source=ORACLE))
    entries[2]["num_frames"] = 20
    write_annotations(path, entries)
    with pytest.raises(UserError, match="train2 is 20, though frame 20 exists"):
        load_frame_pairs(data_dir, "train", SIDE, FrameChoice(progress_source=ORACLE))
    assert len(load_frame_pairs(data_dir, "train", SIDE)[0]) == 6


def test_missing_preparation_names_the_command(tmp_path, data_dir):
    with pytest.raises(UserError, match=r"python -m data\.dataset --data_dir"):
        load_frame_pairs(tmp_path, "train", SIDE)
    with pytest.raises(UserError, match=r"python -m data\.video_loader --data_dir .* --resolutions 64"):
        load_frame_pairs(data_dir, "train", 64)


def test_module_shows_what_training_would_see(data_dir):
    command = ("python", "-m", "data.sthv2_dataset_hf", "--data_dir", data_dir, "--resolution", SIDE)
    shown = run(*command, "--add_progress").stdout
    assert "train: 6 frame pairs, frame 20 to 21" in shown
    assert "val: 3 frame pairs" in shown
    assert shown.count("pushing a cup from left to right. And 50% of the action has been completed.") == 3
    assert "1 videos left out: 1 without frame 21 (train_short)" in shown
    nothing = run(*command, "--input_frame_idx", 70, "--target_frame_idx", 71, check=False)
    assert nothing.returncode == 1 and "error: not one video has both frames" in nothing.stderr


def test_frames_hash_names_their_bytes(tmp_path):
    pairs, _ = load_frame_pairs(make_data_dir(tmp_path), "train", SIDE)
    before = verify_frames(pairs, SIDE)
    assert verify_frames(pairs[:-1], SIDE) != before == verify_frames(pairs, SIDE)
    frame = np.asarray(Image.open(pairs[0].input_image)).copy()
    frame[0, 0, 0] ^= 1
    Image.fromarray(frame).save(pairs[0].input_image)
    assert verify_frames(pairs, SIDE) != before
    with pytest.raises(UserError, match=f"is {SIDE}x{SIDE} pixels, not 64x64; .*python -m data.video_loader"):
        verify_frames(pairs, 64)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.booleans())
def test_every_damage_to_a_frame_is_found(data_dir, tmp_path_factory, position, change, cut):
    pairs, _ = load_frame_pairs(data_dir, "train", SIDE)
    content = bytearray(Path(pairs[0].input_image).read_bytes())
    if cut:
        del content[position % (len(content) - 8) :]
    else:
        content[position % (len(content) - 12)] ^= change  # the last 12 bytes say only that the file ends
    damaged = tmp_path_factory.getbasetemp() / "damaged.png"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="damaged.png is "):
        verify_frames([replace(pairs[0], input_image=str(damaged))], SIDE)
