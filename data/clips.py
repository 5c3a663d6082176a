"""Which pairs of frames the clips of a data directory offer, and how they are drawn."""

import argparse
import functools
import hashlib
import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data import paths
from data.cli import UserError, number
from data.prompts import PROMPT_PREFIX, action_progress, build_prompt, read_estimates

DEFAULT_INPUT_FRAME_IDX, DEFAULT_HORIZON = 20, "1"
ANY = "any"  # as input_frame_idx: every frame of a video can be the start

Item = TypeVar("Item")


def derive_seed(seed: int, *what: object) -> int:
    """A number in [0, 2**63) for one use of randomness, named by `what`: it depends on the arguments and nothing else.

    Things sorted by such numbers are in random order.
    """
    text = f"{seed}:{'/'.join(map(str, what))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def choose_balanced(
    items: Sequence[Item],
    seed: int,
    most: int | None = None,
    most_per_task: int | None = None,
    task_and_id: Callable[[Item], tuple[str, str]] = operator.attrgetter("task", "video_id"),
) -> list[Item]:
    """Draws items evenly from the tasks, which take turns; the same ones for the same seed, whatever their order.

    A smaller choice is the beginning of a larger one. None takes all.
    """
    by_task = defaultdict(list)
    for item in sorted(items, key=lambda item: derive_seed(seed, task_and_id(item)[1])):
        by_task[task_and_id(item)[0]].append(item)
    turns = itertools.zip_longest(*(by_task[task][:most_per_task] for task in sorted(by_task)))
    return [item for turn in turns for item in turn if item is not None][:most]


# Which two frames make a pair.


@dataclass(frozen=True)
class FrameChoice:
    """The pairs of frames that a video offers."""

    start: int | None = DEFAULT_INPUT_FRAME_IDX  # index of the input frame; None: any
    horizons: Sequence[int] = (1,)  # how many frames later the target lies; each is equally likely
    tell_horizon: bool = False  # whether prompts tell it
    prompt_prefix: str = PROMPT_PREFIX  # what they begin with

    @property
    def is_one_pair(self) -> bool:
        """Whether every video offers one pair, and the same one."""
        return self.start is not None and len(self.horizons) == 1

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

    def __str__(self) -> str:
        if self.is_one_pair:
            return f"frame {self.start} to {self.start + self.horizons[0]}"
        first, last = self.horizons[0], self.horizons[-1]
        later = f"{first}" if first == last else f"{first} to {last}"
        return f"{'any frame' if self.start is None else f'frame {self.start}'} to the one {later} later"


def add_frame_options(parser: argparse._ActionsContainer) -> None:
    """The flags of a FrameChoice; those of frames are None where they are left out. `frame_choice` reads them."""
    start_help = f"frame that is given, or '{ANY}': drawn for each video ({DEFAULT_INPUT_FRAME_IDX})"
    index = number(at_least=0, at_most=999_999)
    parser.add_argument("--input_frame_idx", type=lambda text: ANY if text == ANY else index(text), help=start_help)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--target_frame_idx", type=index, help="frame to predict (the next one)")
    horizon_help = "in place of the target: predict so many frames later, such as 5, or each of 1-10"
    either.add_argument("--horizon", type=lambda text: horizons_of(text) and text, help=horizon_help)
    parser.add_argument("--prompt_prefix", default=PROMPT_PREFIX, help="what prompts begin with (%(default)s)")


def horizons_of(text: str) -> Sequence[int]:
    """The horizons that "5" or "1-10" names."""
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of frames, as 5, nor a range, as 1-10")
    return range(first, last + 1)


def settle_frames(arguments: dict[str, Any]) -> None:
    """Turns a target among parsed options into a horizon, and puts defaults where options were left out, in place.

    Raises UserError where the target does not come after the input, or the input is any frame.
    """
    target, start = arguments.pop("target_frame_idx", None), arguments["input_frame_idx"]
    if start is None:
        arguments["input_frame_idx"] = start = DEFAULT_INPUT_FRAME_IDX
    if target is not None:
        if start == ANY:
            raise UserError(f"any start has no target {target}: say with HORIZON how many frames later it is")
        if target <= start:
            raise UserError(f"target_frame_idx {target} is not after input_frame_idx {start}: choose a later target")
        arguments["horizon"] = str(target - start)
    arguments["horizon"] = arguments.get("horizon") or DEFAULT_HORIZON
    arguments.setdefault("tell_horizon", len(horizons_of(arguments["horizon"])) > 1)


def frame_choice(arguments: Mapping[str, Any]) -> FrameChoice:
    """The choice of options that `settle_frames` has settled: parsed ones, or those recorded with a model."""
    start = None if arguments["input_frame_idx"] == ANY else arguments["input_frame_idx"]
    prefix = arguments.get("prompt_prefix", PROMPT_PREFIX)
    return FrameChoice(start, horizons_of(arguments["horizon"]), arguments["tell_horizon"], prefix)


def example_prompt(arguments: Mapping[str, Any]) -> str:
    """A prompt under these options: other wordings of the same action give other ones."""
    told = (None if arguments["add_progress"] is False else 60, 5 if arguments["tell_horizon"] else None)
    return build_prompt("pushing a cup from left to right", *told, arguments["prompt_prefix"])


# Clips and their pairs.


@dataclass(frozen=True)
class Clip:
    """The frames of one video that pairs are made of."""

    video_id: str
    task: str
    label: str
    folder: Path
    frames: tuple[int, ...]  # indices, sorted
    progress: Mapping[int, int] | None = None  # in percent, for each frame; None: prompts tell none
    prompt_prefix: str = PROMPT_PREFIX

    @functools.cached_property
    def frame_set(self) -> frozenset[int]:
        return frozenset(self.frames)

    @property
    def paths(self) -> list[Path]:
        return [self.path(frame) for frame in self.frames]

    def path(self, frame: int) -> Path:
        return paths.frame_path(self.folder.parent, self.video_id, frame)

    def prompt(self, start: int, horizon: int | None) -> str:
        """The sentence for the pair of frames `start` and `start` + `horizon`; None: it does not tell the horizon."""
        return build_prompt(self.label, self.progress and self.progress[start], horizon, self.prompt_prefix)


@dataclass(frozen=True)
class FramePair:
    """Two frames of a video and their prompt: a row of the Dataset, whose two pictures are paths here."""

    input_image: str
    edited_image: str | None  # the frame to predict; None where the video lacks it
    edit_prompt: str  # the sentence that goes to the tokenizer
    video_id: str
    task: str


def find_clips(
    data_dir: Path,
    split: str,
    resolution: int,
    choice: FrameChoice,
    add_progress: bool | str = False,
    target_required: bool = True,
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The clips of a split ("train" or "val") whose extracted frames offer pairs.

    `add_progress` is as `progress_option` returns it. Returns the clips, with the frames that pairs use, and (video
    id, reason) for each video that offers no pair. Without `target_required` a given start alone is enough. Raises
    UserError where frames, lengths or estimates are missing.
    """
    if not data_dir.is_dir():
        raise UserError(f"there is no data directory {data_dir}: name another")
    frames_folder = paths.frames_dir(data_dir, resolution)
    if not frames_folder.is_dir():
        command = paths.extraction_command(data_dir, resolution)
        raise UserError(f"there is no folder {frames_folder}; extract the frames with: {command}")
    estimates = read_estimates(add_progress) if isinstance(add_progress, str) else None
    clips, left_out, record = [], [], paths.command("video_loader", data_dir)
    for entry in paths.read_filtered_annotations(data_dir, split):
        folder = frames_folder / entry["id"]
        extracted = paths.extracted_frames(folder)
        pairs = [(start, start + horizon) for horizon in choice.horizons for start in choice.starts(extracted, horizon)]
        frames = {frame for pair in pairs for frame in pair}
        if choice.start in extracted and not target_required:
            frames.add(choice.start)
        if not frames:
            left_out.append((entry["id"], why_without_pair(choice, extracted)))
            continue
        progress = None
        if add_progress:
            starts = {start for start, _ in pairs} or {choice.start}
            progress = told_progress(entry, starts, record) if estimates is None else estimates.get(entry["id"], {})
            if missing := starts - progress.keys():
                raise UserError(f"{add_progress} has no estimate for frame {min(missing)} of video {entry['id']}")
        what = (folder, tuple(sorted(frames)), progress, choice.prompt_prefix)
        clips.append(Clip(entry["id"], entry.get("task", "unknown"), entry["label"], *what))
    return clips, left_out


def told_progress(entry: Mapping[str, Any], starts: Collection[int], command: str) -> dict[int, int]:
    """The progress in percent at each frame of a video whose length is recorded; `command` records it."""
    num_frames = entry.get("num_frames")
    if num_frames is None or num_frames <= max(starts):
        length = f"for video {entry['id']} is {num_frames or 'not recorded'}, though frame {max(starts)} exists"
        raise UserError(f"progress prompts need num_frames, which {length}; set it with: {command}")
    return {frame: action_progress(frame, num_frames) for frame in range(num_frames)}


def why_without_pair(choice: FrameChoice, extracted: set[int]) -> str:
    if not extracted:
        return "without extracted frames"
    if choice.start is None:
        return f"without two frames {choice.horizons[0]} apart"
    return f"without frame {choice.start + (choice.horizons[0] if choice.start in extracted else 0)}"


def draw_pair(clip: Clip, choice: FrameChoice, seed: int) -> FramePair:
    """The pair of a clip's frames that `seed` draws; a given start that lacks its target is drawn all the same."""
    numbers = (derive_seed(seed, "pair", clip.video_id, what) / 2**63 for what in ("horizon", "start"))
    start, horizon = choice.draw(clip.frame_set, *numbers) or (choice.start, choice.horizons[0])
    return FramePair(
        input_image=str(clip.path(start)),
        edited_image=str(clip.path(start + horizon)) if start + horizon in clip.frame_set else None,
        edit_prompt=clip.prompt(start, horizon if choice.tell_horizon else None),
        video_id=clip.video_id,
        task=clip.task,
    )


def describe_left_out(left_out: Sequence[tuple[str, str]], most_named: int | None = 5) -> str:
    """One line that counts the reasons and names the first of each (None: all); empty for none left out."""
    if not left_out:
        return ""
    ids_of = defaultdict(list)
    for video_id, reason in left_out:
        ids_of[reason].append(video_id)
    reasons = [
        f"{len(ids)} {reason} ({', '.join(ids[:most_named])}{', …' if ids[:most_named] != ids else ''})"
        for reason, ids in sorted(ids_of.items(), key=lambda item: -len(item[1]))
    ]
    return f"left out: {'; '.join(reasons)}"
