"""Frame pairs of Something-Something V2 as a Hugging Face Dataset, and the prompts that go with them.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data import layout
from data.dataset import sampling_rank
from data.frame_choice import DEFAULT_CHOICE, NO_PROGRESS, ORACLE, FrameChoice, add_frame_options, frame_choice
from data.layout import UserError

if TYPE_CHECKING:
    from datasets import Dataset

TASK_OF_ALL_PROMPTS = "Generate a future frame of this action: "
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
        return [layout.frame_path(self.folder.parent, self.video_id, frame) for frame in self.frames]

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
        command = layout.extraction_command(frames_folder)
        raise UserError(f"there is no folder {frames_folder}; extract the frames with: {command}")
    clips, left_out = [], []
    for entry in entries:
        video_id, num_frames = entry["id"], entry.get("num_frames")
        extracted = layout.extracted_frames(frames_folder / video_id)
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
        target = layout.frame_path(clip.folder.parent, clip.video_id, start + horizon)
        pairs.append(
            FramePair(
                input_image=str(layout.frame_path(clip.folder.parent, clip.video_id, start)),
                edited_image=str(target) if start + horizon in clip.frame_set else None,
                edit_prompt=clip.prompt(choice, start, horizon),
                video_id=clip.video_id,
                task=clip.task,
                num_frames=clip.num_frames,
            )
        )
    return pairs


Sample = TypeVar("Sample", FramePair, Clip)


def frame_pairs_dataset(pairs: Sequence[FramePair]) -> Dataset:
    """The Dataset of frame pairs; pictures are decoded (RGB, 8 bits) when they are read."""
    from datasets import Dataset, Features, Image, Value

    features = Features(
        input_image=Image(mode="RGB"),
        edited_image=Image(mode="RGB"),
        edit_prompt=Value("string"),
        video_id=Value("string"),
        task=Value("string"),
        num_frames=Value("int32"),
    )
    return Dataset.from_list([asdict(pair) for pair in pairs], features=features)


def load_frame_pairs(
    data_dir: Path, split: str, resolution: int, choice: FrameChoice = DEFAULT_CHOICE, seed: int = 0
) -> tuple[list[FramePair], list[tuple[str, str]]]:
    """`find_frame_pairs` for one split ("train" or "val") of a data directory."""
    entries = layout.read_filtered_annotations(data_dir, split)
    return find_frame_pairs(entries, layout.frames_dir(data_dir, resolution), choice, seed=seed)


def load_clips(
    data_dir: Path,
    split: str,
    resolution: int,
    choice: FrameChoice = DEFAULT_CHOICE,
    frames_per_video: int | None = None,
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """`find_clips` for one split ("train" or "val") of a data directory."""
    entries = layout.read_filtered_annotations(data_dir, split)
    return find_clips(entries, layout.frames_dir(data_dir, resolution), choice, frames_per_video)


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
            commands = f"rm -r {shlex.quote(str(path.parent))} && {layout.extraction_command(path.parents[1])}"
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


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = layout.CommandParser(
        prog="python -m data.sthv2_dataset_hf", description="Show the frame pairs and prompts that training would use."
    )
    size = layout.number(at_least=1, at_most=4096)
    parser.add_argument("--data_dir", type=Path, default=layout.DEFAULT_DATA_DIR, help="(%(default)s)")
    parser.add_argument("--resolution", type=size, default=128, help="uses frames_<R>x<R> (%(default)s)")
    add_frame_options(parser)
    parser.add_argument("--add_progress", **layout.SWITCH, help="prompts say how much of the action is done")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    progress_source = ORACLE if args.add_progress else NO_PROGRESS
    choice = frame_choice(args.input_frame_idx, args.target_frame_idx, args.horizon, progress_source)
    total = 0
    for split in layout.SPLITS:
        pairs, left_out = load_frame_pairs(args.data_dir, split, args.resolution, choice)
        print(f"{split}: {len(pairs)} {'frame pairs' if choice.is_one_pair else 'videos'}, {choice}")
        for task in sorted({pair.task for pair in pairs}):
            prompts = [pair.edit_prompt for pair in pairs if pair.task == task]
            print(f"  {task}: {len(prompts)}")
            for prompt in prompts[:3]:
                print(f"    {prompt}")
        print("  " + (describe_left_out(left_out, most_named=None) or "no video left out"))
        total += len(pairs)
    if not total:
        command = layout.extraction_command(layout.frames_dir(args.data_dir, args.resolution))
        raise UserError(f"not one video has both frames; choose others, or extract them with: {command}")


if __name__ == "__main__":
    layout.run_command(main)
