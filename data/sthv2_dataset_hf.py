"""Frame pairs of Something-Something V2 as a Hugging Face Dataset, and the prompts that go with them.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from data import cli, paths
from data.cli import UserError
from data.clips import (
    NO_PROGRESS,
    ORACLE,
    FramePair,
    add_frame_options,
    describe_left_out,
    frame_choice,
    load_frame_pairs,
)

if TYPE_CHECKING:
    from datasets import Dataset


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


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.CommandParser(
        prog="python -m data.sthv2_dataset_hf", description="Show the frame pairs and prompts that training would use."
    )
    size = cli.number(at_least=1, at_most=4096)
    parser.add_argument("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="(%(default)s)")
    parser.add_argument("--resolution", type=size, default=128, help="uses frames_<R>x<R> (%(default)s)")
    add_frame_options(parser)
    parser.add_argument("--add_progress", **cli.SWITCH, help="prompts say how much of the action is done")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    progress_source = ORACLE if args.add_progress else NO_PROGRESS
    choice = frame_choice(args.input_frame_idx, args.target_frame_idx, args.horizon, progress_source)
    total = 0
    for split in paths.SPLITS:
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
        command = paths.extraction_command(paths.frames_dir(args.data_dir, args.resolution))
        raise UserError(f"not one video has both frames; choose others, or extract them with: {command}")


if __name__ == "__main__":
    cli.run_command(main)
