"""The sentence of a pair, the progress it tells, and the mirrored sentence."""

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cli import UserError
from data.prompts import action_progress, build_prompt, progress_option, read_estimates, swap_left_and_right


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
    assert build_prompt("moving a cup up", prefix="Edit:") == "Edit: moving a cup up"
    assert build_prompt("moving a cup up", prefix=" ") == "moving a cup up"


@given(st.integers(1, 10_000), st.data())
def test_progress_is_the_published_formula(num_frames, data):
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


def test_progress_comes_from_the_clips_length_or_from_a_file(tmp_path):
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps({"train": {"1": {"20": 40}}, "val": {"2": {"19": 0, "20": 90}}}))
    assert [progress_option(text) for text in ("True", "false", str(path))] == [True, False, str(path)]
    assert read_estimates(str(path)) == {"1": {20: 40}, "2": {19: 0, 20: 90}}
    with pytest.raises(argparse.ArgumentTypeError, match="'nothing.json' is neither True, False, nor a file"):
        progress_option("nothing.json")
    for content in ("[]", "{", '{"train": {"1": [40]}}', '{"train": {"1": {"20": "half"}}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="estimates.json holds no estimates of progress"):
            read_estimates(str(path))
