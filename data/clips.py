"""Which pairs of frames the clips of a data directory offer, and how they are drawn."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data import paths
from data.cli import UserError, number
from data.dataset import sampling_rank
from data.prompts import action_progress, build_prompt

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


MOST_NAMED = 5  # videos that one line of a message names


MANY_FRAMES = 10_000  # from here on reading them takes long enough for a progress bar


@dataclass(frozen=True)
class Clip:
    """The frames of one video that pairs are made of."""

    video_id: str
    task: str
    label: str
    num_frames: int | None  # of the video, None where it was not recorded
    folder: Path
    frames: tuple[int, ...]  # indices, sorted
    estimated_progress: Mapping[int, int] | None = None  # in percent, for the starts of pairs; None: not estimated

    @functools.cached_property
    def frame_set(self) -> frozenset[int]:
        return frozenset(self.frames)

    @property
    def paths(self) -> list[Path]:
        return [paths.frame_path(self.folder.parent, self.video_id, frame) for frame in self.frames]

    def prompt(self, choice: FrameChoice, start: int, horizon: int) -> str:
        """The sentence for the pair of frames `start` and `start` + `horizon`."""
        progress = None
        if choice.is_estimated:
            progress = self.estimated_progress[start]
        elif choice.add_progress:
            progress = action_progress(start, self.num_frames)
        return build_prompt(self.label, progress, horizon if choice.tell_horizon else None)

    def starts(self, choice: FrameChoice) -> set[int]:
        """The input frames of all pairs that the clip offers."""
        return {start for horizon in choice.horizons for start in choice.starts(self.frame_set, horizon)}

    def drawn_pair(self, choice: FrameChoice, seed: int) -> tuple[int, int]:
        """The pair (start, horizon) that `seed` draws; a given start that lacks its target is drawn all the same."""
        numbers = (derive_seed(seed, "pair", self.video_id, what) / 2**63 for what in ("horizon", "start"))
        return choice.draw(self.frame_set, *numbers) or (choice.start, choice.horizons[0])


@dataclass(frozen=True)
class FramePair:
    """Two frames of a video and their prompt: a row of the Dataset, whose two pictures are paths here."""

    input_image: str
    edited_image: str | None  # the frame to predict; None where the video lacks it
    edit_prompt: str  # the sentence that goes to the tokenizer
    video_id: str
    task: str
    num_frames: int | None  # of the video, None where it was not recorded

    @property
    def paths(self) -> list[Path]:
        return [Path(path) for path in (self.input_image, self.edited_image) if path]


def derive_seed(seed: int, *what: object) -> int:
    """A seed in [0, 2**63) for one use of randomness, named by `what`: it depends on the arguments and nothing else."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def find_clips(
    entries: Sequence[dict[str, Any]],
    frames_folder: Path,
    choice: FrameChoice,
    frames_per_video: int | None = None,
    target_required: bool = True,
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The clips of filtered annotations whose extracted frames offer pairs.

    Returns the clips, with the frames that pairs use (at most `frames_per_video`, spread), and (video id, reason) for
    each video that offers no pair. Without `target_required` a given start without its target is no such reason.
    Raises UserError where the frames folder is missing, and where progress is asked of entries whose `num_frames` is
    missing or too small.
    """
    frames_folder = Path(frames_folder)
    if not frames_folder.is_dir():
        command = paths.extraction_command(frames_folder)
        raise UserError(f"there is no folder {frames_folder}; extract the frames with: {command}")
    clips, left_out = [], []
    for entry in entries:
        video_id, num_frames = entry["id"], entry.get("num_frames")
        extracted = paths.extracted_frames(frames_folder / video_id)
        pairs = [(start, start + horizon) for horizon in choice.horizons for start in choice.starts(extracted, horizon)]
        frames = {frame for pair in pairs for frame in pair}
        if not pairs and choice.start in extracted and not target_required:
            frames = {choice.start}
        if not frames:
            left_out.append((video_id, why_without_pair(choice, extracted)))
            continue
        last_start = max((start for start, _ in pairs), default=choice.start)
        needs_length = choice.add_progress and not choice.is_estimated
        if needs_length and (num_frames is None or num_frames <= last_start):
            raise UserError(
                f"progress prompts need num_frames, which for video {video_id} is {num_frames or 'not recorded'},"
                f" though frame {last_start} exists; set it with: python -m data.video_loader"
            )
        if frames_per_video and len(frames) > frames_per_video:
            frames = choice.spread(frames, frames_per_video, turn=len(clips))
        task, folder = entry.get("task", "unknown"), frames_folder / video_id
        clips.append(Clip(video_id, task, entry["label"], num_frames, folder, tuple(sorted(frames))))
    return clips, left_out


def why_without_pair(choice: FrameChoice, extracted: set[int]) -> str:
    if not extracted:
        return "without extracted frames"
    if choice.start is None:
        return f"without two frames {choice.horizons[0]} apart"
    return f"without frame {choice.start + (choice.horizons[0] if choice.start in extracted else 0)}"


def find_frame_pairs(
    entries: Sequence[dict[str, Any]],
    frames_folder: Path,
    choice: FrameChoice = DEFAULT_CHOICE,
    seed: int = 0,
) -> tuple[list[FramePair], list[tuple[str, str]]]:
    """One pair of frames of each entry of filtered annotations; where a video offers several, `seed` draws it.

    Returns the pairs, and (video id, reason) for each video that lacks a frame. Raises UserError as `find_clips` does.
    """
    clips, left_out = find_clips(entries, frames_folder, choice)
    return draw_pairs(clips, choice, seed), left_out


def draw_pairs(clips: Sequence[Clip], choice: FrameChoice, seed: int) -> list[FramePair]:
    """The pair of frames of each clip that `seed` draws. Estimated progress must have been estimated before."""
    pairs = []
    for clip in clips:
        start, horizon = clip.drawn_pair(choice, seed)
        target = paths.frame_path(clip.folder.parent, clip.video_id, start + horizon)
        pairs.append(
            FramePair(
                input_image=str(paths.frame_path(clip.folder.parent, clip.video_id, start)),
                edited_image=str(target) if start + horizon in clip.frame_set else None,
                edit_prompt=clip.prompt(choice, start, horizon),
                video_id=clip.video_id,
                task=clip.task,
                num_frames=clip.num_frames,
            )
        )
    return pairs


Sample = TypeVar("Sample", FramePair, Clip)


def load_frame_pairs(
    data_dir: Path, split: str, resolution: int, choice: FrameChoice = DEFAULT_CHOICE, seed: int = 0
) -> tuple[list[FramePair], list[tuple[str, str]]]:
    """`find_frame_pairs` for one split ("train" or "val") of a data directory."""
    entries = paths.read_filtered_annotations(data_dir, split)
    return find_frame_pairs(entries, paths.frames_dir(data_dir, resolution), choice, seed=seed)


def load_clips(
    data_dir: Path,
    split: str,
    resolution: int,
    choice: FrameChoice = DEFAULT_CHOICE,
    frames_per_video: int | None = None,
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """`find_clips` for one split ("train" or "val") of a data directory."""
    entries = paths.read_filtered_annotations(data_dir, split)
    return find_clips(entries, paths.frames_dir(data_dir, resolution), choice, frames_per_video)


def verify_frames(samples: Sequence[FramePair | Clip], resolution: int) -> str:
    """Reads every frame of pairs or clips once; returns a hash of all their bytes, in hexadecimal.

    Raises UserError at the first frame that is not a whole PNG of `resolution` x `resolution` pixels. A pair may lack
    its target.
    """
    from PIL import Image
    from tqdm import tqdm

    total = hashlib.blake2b(digest_size=16)
    paths = [path for sample in samples for path in sample.paths]
    for path in tqdm(paths, desc="Checking frames", unit="frame", disable=len(paths) < MANY_FRAMES):
        try:
            content = path.read_bytes()
            total.update(hashlib.sha256(content).digest())
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                width, height = image.size
                image.verify()  # compares the checksums of all parts, without decoding any
            problem = "" if width == height == resolution else f"{width}x{height} pixels, not {resolution}x{resolution}"
        except Exception as error:  # Pillow has no one kind of error for what a file may hold
            problem = f"not a whole PNG file ({getattr(error, 'strerror', None) or 'damaged'})"
        if problem:
            commands = f"rm -r {shlex.quote(str(path.parent))} && {paths.extraction_command(path.parents[1])}"
            raise UserError(f"{path} is {problem}; delete and extract again: {commands}")
    return total.hexdigest()


def choose_samples(samples: Sequence[Sample], num_samples: int | None, seed: int) -> list[Sample]:
    """Draws pairs, or clips, evenly from the tasks; the same ones for the same seed, whatever the order of `samples`.

    With a larger `num_samples` the smaller choice is its beginning; None takes all.
    """
    by_task = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sampling_rank(seed, sample.video_id)):
        by_task[sample.task].append(sample)
    turns = itertools.zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [sample for turn in turns for sample in turn if sample][:num_samples]


def describe_left_out(left_out: Sequence[tuple[str, str]], most_named: int | None = MOST_NAMED) -> str:
    """One line that counts the reasons and names the first videos of each (None: all); empty for none left out."""
    if not left_out:
        return ""
    ids_of = defaultdict(list)
    for video_id, reason in left_out:
        ids_of[reason].append(video_id)
    reasons = []
    for reason, ids in sorted(ids_of.items(), key=lambda item: -len(item[1])):
        named = ids[:most_named]
        reasons.append(f"{len(ids)} {reason} ({', '.join(named)}{', …' if len(named) < len(ids) else ''})")
    return f"{len(left_out)} videos left out: {'; '.join(reasons)}"
