"""The sentence that goes with a pair of frames, and the progress that it tells."""

import argparse
import json
import re
from pathlib import Path

from data.cli import UserError, one_line

PROMPT_PREFIX = "Generate a future frame of this action: "
# What `build_prompt` puts behind the action.
TOLD = re.compile(r"\.(?: And \d+% of the action has been completed\.)?(?: The frame is \d+ frames? later\.)?$")


def build_prompt(
    label: str, progress: int | None = None, horizon: int | None = None, prefix: str = PROMPT_PREFIX
) -> str:
    """The sentence the model reads; `progress` is in percent, `horizon` in frames, None leaves either out."""
    action = f"{prefix.rstrip()} {label}".lstrip()
    done = "" if progress is None else f" And {progress}% of the action has been completed."
    later = "" if horizon is None else f" The frame is {horizon} frame{'' if horizon == 1 else 's'} later."
    return f"{action}.{done}{later}" if done or later else action


def swap_left_and_right(text: str) -> str:
    """The sentence that is true of the mirrored picture: every whole word left becomes right and back."""
    swapped = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
    return re.sub(r"\b(?:left|right)\b", lambda match: swapped.get(match[0], match[0]), text, flags=re.IGNORECASE)


def action_progress(input_frame_idx: int, num_frames: int) -> int:
    """How much of the action lies before the input frame, in percent, rounded down to a multiple of 10."""
    return progress_percent(input_frame_idx / num_frames)


def progress_percent(share: float) -> int:
    """A share of the action, 0..1, as prompts tell it: in percent, rounded down to a multiple of 10, at most 90."""
    return min(int(share * 10), 9) * 10


# Options: prompts tell no progress (False), that by the clip's length (True), or a file's (pecn/progress.py).


def progress_option(text: str) -> bool | str:
    """An argparse type: False, True, or the path of a file of estimates."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is neither True, False, nor a file that pecn.progress has written")
    return text


PROGRESS_OPTION = {"type": progress_option, "nargs": "?", "const": True, "metavar": "True|False|FILE"}
PROGRESS_HELP = "prompts say how much of the action is done: by the clip's length (True), or as pecn.progress estimated"


def read_estimates(path: str) -> dict[str, dict[int, int]]:
    """{video id: {frame: percent}} of a file {split: {video id: {frame: percent}}} that `pecn.progress` has written."""
    try:
        splits = json.loads(Path(path).read_bytes())
        return {
            video_id: {int(frame): int(percent) for frame, percent in of_video.items()}
            for videos in splits.values()
            for video_id, of_video in videos.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no estimates of progress ({one_line(error)}); see: -m pecn.progress") from error
