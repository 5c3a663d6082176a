"""The Hugging Face Dataset of frame pairs, and the command that shows it."""

import numpy as np

from data import sthv2_dataset_hf
from data.clips import FrameChoice, draw_pair, find_clips
from data.sthv2_dataset_hf import frame_pairs_dataset
from tests.commands import call
from tests.conftest import SIDE


def test_dataset_has_the_promised_columns_and_pictures(data_dir):
    clips, _ = find_clips(data_dir, "train", SIDE, FrameChoice(), add_progress=True)
    dataset = frame_pairs_dataset([draw_pair(clip, FrameChoice(), seed=0) for clip in clips])
    assert dataset.column_names == ["input_image", "edited_image", "edit_prompt", "video_id", "task"]
    assert list(dataset["video_id"]) == [f"train{number}" for number in range(6)]
    row = dataset[1]
    assert row["task"] == "drop_object"
    assert row["edit_prompt"].endswith("dropping a ball onto a table. And 50% of the action has been completed.")
    input_image, edited_image = (np.asarray(row[name]) for name in ("input_image", "edited_image"))
    assert input_image.shape == (SIDE, SIDE, 3)
    assert (np.roll(input_image[8:16], 1, axis=1) == edited_image[8:16]).mean() > 0.9  # the square moved by a pixel


def test_a_frame_to_predict_that_is_not_there_is_none(data_dir):
    clips, left_out = find_clips(data_dir, "val", SIDE, FrameChoice(), target_required=False)
    dataset = frame_pairs_dataset([draw_pair(clip, FrameChoice(), seed=0) for clip in clips])
    assert left_out == []
    assert [row["video_id"] for row in dataset if row["edited_image"] is None] == ["val_short"]


def test_command_shows_what_training_would_see(data_dir):
    command = (sthv2_dataset_hf, "--data_dir", data_dir, "--resolution", SIDE)
    shown = call(*command, "--add_progress").stdout
    assert "train: 6 frame pairs, frame 20 to 21" in shown
    assert "val: 3 frame pairs" in shown
    assert shown.count("pushing a cup from left to right. And 50% of the action has been completed.") == 3
    assert "left out: 1 without frame 21 (train_short)" in shown
    assert (
        "train: 7 videos, any frame to the one 1 to 3 later"
        in call(*command, "--input_frame_idx", "any", "--horizon", "1-3").stdout
    )
    nothing = call(*command, "--input_frame_idx", 70, "--target_frame_idx", 71)
    assert nothing.returncode == 1 and nothing.stderr.startswith("error: not one video has both frames")
