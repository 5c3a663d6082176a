"""The sentence that goes with a pair of frames."""

from __future__ import annotations

import re

TASK_OF_ALL_PROMPTS = "Generate a future frame of this action: "


def build_prompt(label: str, progress: int | None = None, horizon: int | None = None) -> str:
    """The sentence the model reads; `progress` is in percent, `horizon` in frames, None leaves either out."""
    action = f"{TASK_OF_ALL_PROMPTS}{label}"
    done = "" if progress is None else f" And {progress}% of the action has been completed."
    later = "" if horizon is None else f" The frame is {horizon} frame{'' if horizon == 1 else 's'} later."
    return f"{action}.{done}{later}" if done or later else action


def action_progress(input_frame_idx: int, num_frames: int) -> int:
    """How much of the action lies before the input frame, in percent, rounded down to a multiple of 10."""
    return progress_percent(input_frame_idx / num_frames)


def progress_percent(share: float) -> int:
    """A share of the action, 0..1, as prompts tell it: in percent, rounded down to a multiple of 10, at most 90."""
    return min(int(share * 10), 9) * 10


def swap_left_and_right(text: str) -> str:
    """The sentence that is true of the mirrored picture: every whole word left becomes right and back."""
    swapped = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
    return re.sub(r"\b(?:left|right)\b", lambda match: swapped.get(match[0], match[0]), text, flags=re.IGNORECASE)
