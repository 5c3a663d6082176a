"""Frame pairs of Something-Something V2 as a Hugging Face Dataset, and the prompts that go with them.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.dataset import sampling_rank
from data.layout import (
    DEFAULT_DATA_DIR,
    SWITCH,
    CommandParser,
    UserError,
    extraction_command,
    filtered_annotations_path,
    frame_path,
    frames_dir,
    number,
    one_line,
    read_annotations,
    run_command,
)

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_INPUT_FRAME_IDX = 20
DEFAULT_TARGET_FRAME_IDX = 21
MOST_REASONS, MOST_IDS = 3, 5  # in one line about the videos that are left out; ids for each reason


@dataclass(frozen=True)
class FramePair:
    """One training or validation sample: a row of the Dataset, whose two pictures are paths here."""

    input_image: str
    edited_image: str | None  # the frame to predict; None where the video lacks it
    edit_prompt: str  # the sentence that goes to the tokenizer
    video_id: str
    task: str
    num_frames: int | None  # of the video, None where it was not recorded


def build_prompt(label: str, progress: int | None = None) -> str:
    """The sentence the model reads; `progress` is in percent, None leaves progress out."""
    prompt = f"Generate a future frame of this action: {label}"
    if progress is None:
        return prompt
    return f"{prompt}. And {progress}% of the action has been completed."


def action_progress(input_frame_idx: int, num_frames: int) -> int:
    """How much of the action lies before the input frame, in percent, rounded down to a multiple of 10."""
    return int((input_frame_idx / num_frames) * 10) * 10


def swap_left_and_right(text: str) -> str:
    """The sentence that is true of the mirrored picture: every whole word left becomes right and back."""
    swapped = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    swapped |= {right: left for left, right in swapped.items()}
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
        raise UserError(f"input_frame_idx and target_frame_idx are both {input_frame_idx}: there is nothing to predict")
    if not frames_folder.is_dir():
        raise UserError(
            f"there is no folder {frames_folder}; extract the frames with: {extraction_command(frames_folder)}"
        )
    pairs, left_out = [], []
    for entry in entries:
        video_id, num_frames = entry["id"], entry.get("num_frames")
        input_frame = frame_path(frames_folder, video_id, input_frame_idx)
        target_frame = frame_path(frames_folder, video_id, target_frame_idx)
        has_target = target_frame.is_file()
        if not input_frame.is_file() or (target_required and not has_target):
            missing = target_frame_idx if input_frame.is_file() else input_frame_idx
            left_out.append((video_id, _why_frame_is_missing(input_frame.parent, missing, num_frames)))
            continue
        if add_progress and (num_frames is None or num_frames <= input_frame_idx):
            raise UserError(
                f"progress prompts need the number of frames, which for video {video_id} is"
                f" {num_frames or 'not recorded'}, though frame {input_frame_idx} exists; run `python -m"
                " data.video_loader` after the filtering (`python -m data.dataset`), it sets num_frames"
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


def _why_frame_is_missing(video_frames: Path, frame_idx: int, num_frames: int | None) -> str:
    if not video_frames.is_dir():
        return "no frames were extracted"
    if num_frames is not None and num_frames <= frame_idx:
        return f"too short: {num_frames} frames, frame {frame_idx} is wanted"
    return f"frame {frame_idx} is missing"


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
    annotations = filtered_annotations_path(data_dir, split)
    if not annotations.is_file():
        raise UserError(f"there is no {annotations}; make it with: python -m data.dataset --data_dir {data_dir}")
    entries = read_annotations(annotations)
    folder = frames_dir(data_dir, resolution)
    return find_frame_pairs(entries, folder, input_frame_idx, target_frame_idx, add_progress)


def verify_frames(pairs: Sequence[FramePair], resolution: int) -> str:
    """Reads every frame of the pairs once; returns a hash of all their bytes, in hexadecimal.

    Raises UserError, naming the first one, where a frame is not a whole PNG of `resolution` x `resolution` pixels. A
    pair may lack its target.
    """
    total, bad = hashlib.blake2b(digest_size=16), {}
    for pair in pairs:
        for name in filter(None, (pair.input_image, pair.edited_image)):
            path = Path(name)
            problem, content = None, b""
            try:
                content = path.read_bytes()
                problem = _find_png_damage(content, resolution)
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
            if problem:
                bad.setdefault(path.parent, f"{path} {problem}")
            total.update(hashlib.sha256(content).digest())
    if bad:
        shown = " ".join(shlex.quote(str(folder)) for folder in list(bad)[:MOST_IDS])
        shown += " ..." if len(bad) > MOST_IDS else ""
        more = f" (and frames of {len(bad) - 1} more videos)" if len(bad) > 1 else ""
        data_dir = shlex.quote(str(next(iter(bad)).parent.parent))
        raise UserError(
            f"{next(iter(bad.values()))}{more}; delete and extract again:"
            f" rm -r {shown} && python -m data.video_loader --data_dir {data_dir} --resolutions {resolution}"
        )
    return total.hexdigest()


def _find_png_damage(content: bytes, side: int) -> str | None:
    """What is wrong with a frame's file, as the end of a sentence that begins with its path; None where it is whole."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            size = image.size
            image.verify()  # compares the checksums of all parts, without decoding any
    except Exception as error:  # Pillow has no one kind of error for what a file may hold
        return f"is not a whole PNG file ({one_line(error)})" if content else "is empty"
    return None if size == (side, side) else f"is {size[0]}x{size[1]} pixels, not {side}x{side}"


def choose_pairs(pairs: Sequence[FramePair], num_samples: int | None, seed: int) -> list[FramePair]:
    """Draws pairs evenly from the tasks; the same ones for the same seed, whatever the order of `pairs`.

    With a larger `num_samples` the smaller choice is its beginning; None takes all.
    """
    by_task: dict[str, list[FramePair]] = {}
    for pair in sorted(pairs, key=lambda pair: sampling_rank(seed, pair.video_id)):
        by_task.setdefault(pair.task, []).append(pair)
    turns = [(turn, task, pair) for task, of_task in by_task.items() for turn, pair in enumerate(of_task)]
    turns.sort(key=lambda item: item[:2])
    return [pair for _, _, pair in turns[:num_samples]]


def describe_left_out(left_out: Sequence[tuple[str, str]]) -> str:
    """One line that counts the commonest reasons and names the first videos of each; empty for none left out."""
    if not left_out:
        return ""
    by_reason: dict[str, list[str]] = {}
    for video_id, reason in left_out:
        by_reason.setdefault(reason, []).append(video_id)
    parts = []
    commonest_first = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    for reason, ids in commonest_first[:MOST_REASONS]:
        named = ", ".join(ids[:MOST_IDS]) + (", …" if len(ids) > MOST_IDS else "")
        parts.append(f"{len(ids)} {reason} ({named})")
    others = [len(ids) for _, ids in commonest_first[MOST_REASONS:]]
    if others:
        parts.append(f"{sum(others)} for {len(others)} more reasons such as these")
    return f"{len(left_out)} videos left out: " + "; ".join(parts)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m data.sthv2_dataset_hf", description="Show the frame pairs and prompts that training would use."
    )
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="data directory (%(default)s)")
    parser.add_argument("--resolution", type=number(at_least=1), default=128, help="uses frames_<R>x<R> (%(default)s)")
    index = number(at_least=0)
    parser.add_argument("--input_frame_idx", type=index, default=DEFAULT_INPUT_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--target_frame_idx", type=index, default=DEFAULT_TARGET_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--add_progress", **SWITCH, help="prompts say how much of the action is done")
    parser.add_argument("--num_prompts", type=number(at_least=0), default=3, help="shown for each task (%(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    for split in ("train", "val"):
        pairs, left_out = load_frame_pairs(
            args.data_dir, split, args.resolution, args.input_frame_idx, args.target_frame_idx, args.add_progress
        )
        print(f"{split}: {len(pairs)} frame pairs, frame {args.input_frame_idx} -> {args.target_frame_idx}")
        for task, count in sorted(Counter(pair.task for pair in pairs).items()):
            print(f"  {task}: {count}")
            prompts = [pair.edit_prompt for pair in pairs if pair.task == task]
            for prompt in prompts[: args.num_prompts]:
                print(f"    {prompt}")
        reasons = Counter(reason for _, reason in left_out)
        print(f"  left out: {len(left_out)}")
        for reason, count in reasons.most_common():
            ids = [video_id for video_id, why in left_out if why == reason]
            print(f"    {count} {reason}: {', '.join(ids)}")


if __name__ == "__main__":
    run_command(main)
