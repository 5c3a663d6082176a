"""Which two frames of a video make a pair: a given start or any, and how many frames later the target lies."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.layout import UserError, number

DEFAULT_INPUT_FRAME_IDX = 20
DEFAULT_TARGET_FRAME_IDX = 21
ANY = "any"  # as input_frame_idx: every frame of a video can be the start
# Where the progress in prompts comes from. The oracle knows the length of the whole clip, which nobody has while it is
# going on; an estimator (pecn/progress.py) sees the frames up to the input.
ORACLE, ESTIMATED, NO_PROGRESS = "oracle", "estimated", "none"


@dataclass(frozen=True)
class FrameChoice:
    """The pairs of frames that a video offers, and what their prompts tell."""

    start: int | None = DEFAULT_INPUT_FRAME_IDX  # index of the input frame; None: any
    horizons: Sequence[int] = (DEFAULT_TARGET_FRAME_IDX - DEFAULT_INPUT_FRAME_IDX,)  # in frames, each equally likely
    progress_source: str = NO_PROGRESS  # of the progress that prompts tell, if any
    tell_horizon: bool = False

    @property
    def add_progress(self) -> bool:
        """Whether prompts tell progress."""
        return self.progress_source != NO_PROGRESS

    @property
    def is_estimated(self) -> bool:
        """Whether prompts tell an estimated progress."""
        return self.progress_source == ESTIMATED

    @property
    def is_one_pair(self) -> bool:
        """Whether every video offers one pair, and the same one."""
        return self.start is not None and len(self.horizons) == 1

    @property
    def has_one_prompt(self) -> bool:
        """Whether all pairs of a video share one prompt."""
        return (self.start is not None or not self.add_progress) and (len(self.horizons) == 1 or not self.tell_horizon)

    def starts(self, frames: Collection[int], horizon: int) -> list[int]:
        """Those of `frames` that can be the input of a pair whose target is among them too."""
        starts = sorted(frames) if self.start is None else [self.start]
        return [start for start in starts if start in frames and start + horizon in frames]

    def draw(self, frames: Collection[int], for_horizon: float, for_start: float) -> tuple[int, int] | None:
        """One pair (start, horizon), chosen by two numbers in [0, 1); None where the frames offer none."""
        offered = {horizon: starts for horizon in self.horizons if (starts := self.starts(frames, horizon))}
        if not offered:
            return None
        horizon = list(offered)[int(for_horizon * len(offered))]
        return offered[horizon][int(for_start * len(offered[horizon]))], horizon

    def spread(self, frames: Collection[int], most: int, turn: int) -> set[int]:
        """At most `most` of frames that offer a pair, as pairs spread over the video, whose horizons take turns.

        `turn` is the video's number, so that all videos together have each horizon equally often.
        """
        chosen: set[int] = set()
        num_pairs = max(1, most // 2)
        offered = [horizon for horizon in self.horizons if self.starts(frames, horizon)]
        for place in range(num_pairs):
            # No horizon has a place of its own in the video.
            horizon = offered[(turn * num_pairs + (place + turn) % num_pairs) % len(offered)]
            starts = self.starts(frames, horizon)
            start = starts[int((place + 0.5) / num_pairs * len(starts))]
            chosen |= {start, start + horizon}
        return chosen

    def __str__(self) -> str:
        if self.is_one_pair:
            return f"frame {self.start} to {self.start + self.horizons[0]}"
        first, last = self.horizons[0], self.horizons[-1]
        later = f"{first}" if first == last else f"{first} to {last}"
        return f"{'any frame' if self.start is None else f'frame {self.start}'} to that {later} later"

    @property
    def in_full(self) -> str:
        """The pairs, and where the progress in their prompts comes from, if they tell it."""
        origin = f" (progress from an {'estimator' if self.is_estimated else 'oracle'})" if self.add_progress else ""
        return f"{self}{origin}"


DEFAULT_CHOICE = FrameChoice()


def add_frame_options(add: argparse._ActionsContainer, defaults: bool = True, progress: bool = False) -> None:
    """The flags that `frame_choice` reads; without `defaults` they are None where the command leaves them out.

    With `progress` these include where the progress in prompts comes from, and the estimator's directory.
    """
    start, target = (DEFAULT_INPUT_FRAME_IDX, DEFAULT_TARGET_FRAME_IDX) if defaults else (None, None)
    start_help = f"frame that is given, or '{ANY}': drawn for each video ({DEFAULT_INPUT_FRAME_IDX})"
    add.add_argument("--input_frame_idx", type=start_frame, default=start, help=start_help)
    target_help = f"frame to predict ({DEFAULT_TARGET_FRAME_IDX})"
    add.add_argument("--target_frame_idx", type=number(at_least=0, at_most=999_999), default=target, help=target_help)
    horizon_help = "in place of the target: predict as many frames later, such as 5, or each of 1-10"
    add.add_argument("--horizon", type=horizon_text, help=horizon_help)

    if progress:
        sources, source = ([ORACLE, ESTIMATED], ORACLE) if defaults else ([ORACLE, ESTIMATED, NO_PROGRESS], None)
        source_help = f"of progress in prompts: the {ORACLE} knows the clip's length, {ESTIMATED} is from frames so far"
        source_help += f" ({source or NO_PROGRESS})"
        add.add_argument("--progress_source", choices=sources, default=source, help=source_help)
        add.add_argument("--progress_estimator", type=Path, help=f"for {ESTIMATED}: what pecn.progress trained")


def start_frame(text: str) -> int | str:
    """An argparse type: a frame's index, or ANY."""
    return ANY if text == ANY else number(at_least=0, at_most=999_999)(text)


def horizon_text(text: str) -> str:
    """An argparse type: what `horizons_of` reads, as it was given."""
    horizons_of(text)
    return text


def horizons_of(text: str) -> Sequence[int]:
    """The horizons that "5" or "1-10" names."""
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of frames, such as 5, nor a range, such as 1-10"
        )
    return range(first, last + 1)


def tells_horizon(horizon: str | None) -> bool:
    """Whether prompts tell the horizon: where more than one is trained."""
    return horizon is not None and len(horizons_of(horizon)) > 1


def frame_choice(
    input_frame_idx: int | str,
    target_frame_idx: int,
    horizon: str | None,
    progress_source: str = NO_PROGRESS,
    tell_horizon: bool | None = None,
) -> FrameChoice:
    """The choice that the flags describe; `tell_horizon` is None where there is no other model to follow.

    With any start and no horizon the target is the next frame. Raises UserError where the target does not come after
    the input, and where a target other than the default is asked for with any start.
    """
    if horizon is not None:
        horizons = horizons_of(horizon)
    elif input_frame_idx == ANY:
        if target_frame_idx != DEFAULT_TARGET_FRAME_IDX:
            raise UserError(f"any start has no target {target_frame_idx}: say with HORIZON how many frames later it is")
        horizons = (1,)
    else:
        horizons = (target_frame_idx - input_frame_idx,)
    if horizons[0] <= 0:
        raise UserError(
            f"target_frame_idx {target_frame_idx} is not after input_frame_idx {input_frame_idx}: choose a later target"
        )
    tell_horizon = tells_horizon(horizon) if tell_horizon is None else tell_horizon
    return FrameChoice(None if input_frame_idx == ANY else input_frame_idx, horizons, progress_source, tell_horizon)


def choice_of(arguments: Mapping[str, Any]) -> FrameChoice:
    """The choice of a training's arguments: parsed ones, or those that its model's training config records."""
    frames = (arguments["input_frame_idx"], arguments["target_frame_idx"], arguments.get("horizon"))
    return frame_choice(*frames, arguments.get("progress_source", NO_PROGRESS))
