"""Frame pairs of Something-Something V2 as a Hugging Face Dataset, and the prompts that go with them.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.layout import (
    DEFAULT_DATA_DIR,
    UserError,
    extraction_command,
    filtered_annotations_path,
    frame_path,
    frames_dir,
    read_annotations,
    run_command,
)

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_INPUT_FRAME_IDX = 20
DEFAULT_TARGET_FRAME_IDX = 21
# In one line about the videos that are left out:
MOST_REASONS = 3
MOST_IDS = 5  # for each reason


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
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Pairs up the frames of filtered annotations.

    Returns the pairs, dictionaries with the dataset's columns in which the two images are paths, and a list
    of (video id, reason) for the videos that lack a frame. Without `target_required` a missing target frame
    is None instead of a reason. Raises UserError where the frames folder is missing, where both indices are
    the same or one is below 0, and where progress is asked of entries that have no `num_frames`.
    """
    frames_folder = Path(frames_folder)
    if min(input_frame_idx, target_frame_idx) < 0:
        raise UserError(f"frame indices start at 0, not {min(input_frame_idx, target_frame_idx)}")
    if input_frame_idx == target_frame_idx:
        raise UserError(f"input_frame_idx and target_frame_idx are both {input_frame_idx}: there is nothing to predict")
    if not frames_folder.is_dir():
        raise UserError(
            f"there is no folder {frames_folder}; extract the frames with: {extraction_command(frames_folder)}"
        )
    pairs, left_out = [], []
    for entry in entries:
        video_id = entry["id"]
        input_frame = frame_path(frames_folder, video_id, input_frame_idx)
        target_frame = frame_path(frames_folder, video_id, target_frame_idx)
        has_target = target_frame.is_file()
        if not input_frame.is_file() or (target_required and not has_target):
            missing = target_frame_idx if input_frame.is_file() else input_frame_idx
            left_out.append((video_id, _why_frame_is_missing(input_frame.parent, missing, entry.get("num_frames"))))
            continue
        progress = None
        if add_progress:
            progress = action_progress(input_frame_idx, _num_frames(entry))
        pairs.append(
            {
                "input_image": str(input_frame),
                "edited_image": str(target_frame) if has_target else None,
                "edit_prompt": build_prompt(entry["label"], progress),
                "video_id": video_id,
                "task": entry.get("task", "unknown"),
                "num_frames": entry.get("num_frames"),
            }
        )
    return pairs, left_out


def _why_frame_is_missing(video_frames: Path, frame_idx: int, num_frames: int | None) -> str:
    if not video_frames.is_dir():
        return "no frames were extracted"
    if num_frames is not None and num_frames <= frame_idx:
        return f"too short: {num_frames} frames, frame {frame_idx} is wanted"
    return f"frame {frame_idx} is missing"


def _num_frames(entry: dict[str, Any]) -> int:
    num_frames = entry.get("num_frames")
    if not isinstance(num_frames, int) or num_frames < 1:
        raise UserError(
            f"progress prompts need num_frames, which the annotations of video {entry['id']} lack; run"
            " `python -m data.video_loader` after the filtering (`python -m data.dataset`), it adds them"
        )
    return num_frames


def frame_pairs_dataset(pairs: Sequence[dict[str, Any]]) -> Dataset:
    """The Dataset of `find_frame_pairs`' pairs; pictures are decoded (RGB, 8 bits) when they are read."""
    from datasets import Dataset, Features, Image, Value

    features = Features(
        input_image=Image(mode="RGB"),
        edited_image=Image(mode="RGB"),
        edit_prompt=Value("string"),
        video_id=Value("string"),
        task=Value("string"),
        num_frames=Value("int32"),
    )
    return Dataset.from_list(list(pairs), features=features)


def load_frame_pairs(
    data_dir: Path,
    split: str,
    resolution: int,
    input_frame_idx: int = DEFAULT_INPUT_FRAME_IDX,
    target_frame_idx: int = DEFAULT_TARGET_FRAME_IDX,
    add_progress: bool = False,
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """`find_frame_pairs` for one split ("train" or "val") of a data directory."""
    annotations = filtered_annotations_path(data_dir, split)
    if not annotations.is_file():
        raise UserError(f"there is no {annotations}; make it with: python -m data.dataset --data_dir {data_dir}")
    entries = read_annotations(annotations)
    folder = frames_dir(data_dir, resolution)
    return find_frame_pairs(entries, folder, input_frame_idx, target_frame_idx, add_progress)


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
    parser = argparse.ArgumentParser(description="Show the frame pairs and prompts that training would use.")
    parser.add_argument("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="data directory (%(default)s)")
    parser.add_argument("--resolution", type=int, default=128, help="uses frames_<R>x<R> (%(default)s)")
    parser.add_argument("--input_frame_idx", type=int, default=DEFAULT_INPUT_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--target_frame_idx", type=int, default=DEFAULT_TARGET_FRAME_IDX, help="(%(default)s)")
    parser.add_argument("--add_progress", action="store_true", help="prompts say how much of the action is done")
    parser.add_argument("--num_prompts", type=int, default=3, help="prompts to show for each task (%(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    for split in ("train", "val"):
        pairs, left_out = load_frame_pairs(
            args.data_dir, split, args.resolution, args.input_frame_idx, args.target_frame_idx, args.add_progress
        )
        dataset = frame_pairs_dataset(pairs)
        print(f"{split}: {len(dataset)} frame pairs, frame {args.input_frame_idx} -> {args.target_frame_idx}")
        for task, count in sorted(Counter(dataset["task"]).items()):
            print(f"  {task}: {count}")
            prompts = [pair["edit_prompt"] for pair in pairs if pair["task"] == task]
            for prompt in prompts[: args.num_prompts]:
                print(f"    {prompt}")
        reasons = Counter(reason for _, reason in left_out)
        print(f"  left out: {len(left_out)}")
        for reason, count in reasons.most_common():
            ids = [video_id for video_id, why in left_out if why == reason]
            print(f"    {count} {reason}: {', '.join(ids)}")


if __name__ == "__main__":
    run_command(main)
