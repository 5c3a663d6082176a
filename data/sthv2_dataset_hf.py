"""Frame pairs of Something-Something V2 as a Hugging Face Dataset, and the prompts that go with them.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import layout
from data.dataset import sampling_rank
from data.layout import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_INPUT_FRAME_IDX = 20
DEFAULT_TARGET_FRAME_IDX = 21
TASK_OF_ALL_PROMPTS = "Generate a future frame of this action: "
MOST_NAMED = 5  # videos that one line of a message names


@dataclass(frozen=True)
class FramePair:
    """One training or validation sample: a row of the Dataset, whose two pictures are paths here."""

    input_image: str
    edited_image: str | None  # the frame to predict; None where the video lacks it
    edit_prompt: str  # the sentence that goes to the tokenizer
    video_id: str
    task: str
    num_frames: int | None  # of the video, None where it was not recorded


def build_prompt(label: str, progress: int | None = None, horizon: int | None = None) -> str:
    """The sentence the model reads; `progress` is in percent, `horizon` in frames, None leaves either out."""
    action = f"{TASK_OF_ALL_PROMPTS}{label}"
    done = "" if progress is None else f" And {progress}% of the action has been completed."
    later = "" if horizon is None else f" The frame is {horizon} frame{'' if horizon == 1 else 's'} later."
    return f"{action}.{done}{later}" if done or later else action


def action_progress(input_frame_idx: int, num_frames: int) -> int:
    """How much of the action lies before the input frame, in percent, rounded down to a multiple of 10."""
    return int((input_frame_idx / num_frames) * 10) * 10


def swap_left_and_right(text: str) -> str:
    """The sentence that is true of the mirrored picture: every whole word left becomes right and back."""
    swapped = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
    return re.sub(r"\b(?:left|right)\b", lambda match: swapped.get(match[0], match[0]), text, flags=re.IGNORECASE)


def derive_seed(seed: int, *what: object) -> int:
    """A seed in [0, 2**63) for one use of randomness, named by `what`: it depends on the arguments and nothing else."""
    text = "/".join(str(part) for part in (seed, *what))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def find_frame_pairs(
    entries: Sequence[dict[str, Any]],
    frames_folder: Path,
    input_frame_idx: int = DEFAULT_INPUT_FRAME_IDX,
    target_frame_idx: int = DEFAULT_TARGET_FRAME_IDX,
    add_progress: bool = False,
    target_required: bool = True,
) -> tuple[list[FramePair], list[tuple[str, str]]]:
    """Pairs up the frames of filtered annotations.

    Returns the pairs, and (video id, reason) for each video that lacks a frame. Without `target_required` a missing
    target frame is None instead of a reason. Raises UserError where the frames folder is missing, where both
    indices are the same, and where progress is asked of entries whose `num_frames` is missing or too small.
    """
    frames_folder = Path(frames_folder)
    if input_frame_idx == target_frame_idx:
        raise UserError(f"input_frame_idx and target_frame_idx are both {input_frame_idx}: choose a later target")
    if not frames_folder.is_dir():
        command = layout.extraction_command(frames_folder)
        raise UserError(f"there is no folder {frames_folder}; extract the frames with: {command}")
    pairs, left_out = [], []
    for entry in entries:
        video_id, num_frames = entry["id"], entry.get("num_frames")
        input_frame = layout.frame_path(frames_folder, video_id, input_frame_idx)
        target_frame = layout.frame_path(frames_folder, video_id, target_frame_idx)
        has_input, has_target = input_frame.is_file(), target_frame.is_file()
        if not has_input or (target_required and not has_target):
            missing = target_frame_idx if has_input else input_frame_idx
            has_frames = input_frame.parent.is_dir()
            left_out.append((video_id, f"without frame {missing}" if has_frames else "without extracted frames"))
            continue
        if add_progress and (num_frames is None or num_frames <= input_frame_idx):
            raise UserError(
                f"progress prompts need num_frames, which for video {video_id} is {num_frames or 'not recorded'},"
                f" though frame {input_frame_idx} exists; set it with: python -m data.video_loader"
            )
        progress = action_progress(input_frame_idx, num_frames) if add_progress else None
        pairs.append(
            FramePair(
                input_image=str(input_frame),
                edited_image=str(target_frame) if has_target else None,
                edit_prompt=build_prompt(entry["label"], progress),
                video_id=video_id,
                task=entry.get("task", "unknown"),
                num_frames=num_frames,
            )
        )
    return pairs, left_out


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
    data_dir: Path,
    split: str,
    resolution: int,
    input_frame_idx: int = DEFAULT_INPUT_FRAME_IDX,
    target_frame_idx: int = DEFAULT_TARGET_FRAME_IDX,
    add_progress: bool = False,
) -> tuple[list[FramePair], list[tuple[str, str]]]:
    """`find_frame_pairs` for one split ("train" or "val") of a data directory."""
    entries = layout.read_filtered_annotations(data_dir, split)
    folder = layout.frames_dir(data_dir, resolution)
    return find_frame_pairs(entries, folder, input_frame_idx, target_frame_idx, add_progress)


def verify_frames(pairs: Sequence[FramePair], resolution: int) -> str:
    """Reads every frame of the pairs once; returns a hash of all their bytes, in hexadecimal.

    Raises UserError at the first frame that is not a whole PNG of `resolution` x `resolution` pixels. A pair may lack
    its target.
    """
    from PIL import Image

    total = hashlib.blake2b(digest_size=16)
    paths = [path for pair in pairs for path in (pair.input_image, pair.edited_image) if path]
    for path in map(Path, paths):
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


def choose_pairs(pairs: Sequence[FramePair], num_samples: int | None, seed: int) -> list[FramePair]:
    """Draws pairs evenly from the tasks; the same ones for the same seed, whatever the order of `pairs`.

    With a larger `num_samples` the smaller choice is its beginning; None takes all.
    """
    by_task = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: sampling_rank(seed, pair.video_id)):
        by_task[pair.task].append(pair)
    turns = itertools.zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [pair for turn in turns for pair in turn if pair][:num_samples]


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
    size, index = layout.number(at_least=1, at_most=4096), layout.number(at_least=0, at_most=999_999)
    parser.add_argument("--data_dir", type=Path, default=layout.DEFAULT_DATA_DIR, help="(%(default)s)")
    parser.add_argument("--resolution", type=size, default=128, help="uses frames_<R>x<R> (%(default)s)")
    parser.add_argument("--input_frame_idx", type=index, default=DEFAULT_INPUT_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--target_frame_idx", type=index, default=DEFAULT_TARGET_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--add_progress", **layout.SWITCH, help="prompts say how much of the action is done")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    total = 0
    for split in layout.SPLITS:
        pairs, left_out = load_frame_pairs(
            args.data_dir, split, args.resolution, args.input_frame_idx, args.target_frame_idx, args.add_progress
        )
        print(f"{split}: {len(pairs)} frame pairs, frame {args.input_frame_idx} -> {args.target_frame_idx}")
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
