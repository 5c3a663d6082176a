"""Frame pairs of Something-Something V2, and the prompts that go with them, as a Hugging Face Dataset.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from data import cli, paths
from data.cli import UserError
from data.clips import (
    FramePair,
    add_frame_options,
    describe_left_out,
    draw_pair,
    find_clips,
    frame_choice,
    settle_frames,
)
from data.prompts import PROGRESS_HELP, PROGRESS_OPTION


def frame_pairs_dataset(pairs: Sequence[FramePair]) -> Dataset:
    """The Dataset of frame pairs, for work of your own; pictures are decoded (RGB, 8 bits) when they are read."""
    text = Value("string")
    pictures = dict.fromkeys(("input_image", "edited_image"), Image(mode="RGB"))
    features = Features(**pictures, edit_prompt=text, video_id=text, task=text)
    return Dataset.from_list([asdict(pair) for pair in pairs], features=features)


def main() -> None:
    parser = cli.CommandParser(
        prog="python -m data.sthv2_dataset_hf", description="Show the frame pairs and prompts that training would use."
    )
    size = cli.number(at_least=1, at_most=4096)
    parser.add_argument("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="(%(default)s)")
    parser.add_argument("--resolution", type=size, default=128, help="uses frames_<R>x<R> (%(default)s)")
    add_frame_options(parser)
    parser.add_argument("--add_progress", **PROGRESS_OPTION, default=False, help=PROGRESS_HELP)
    args = parser.parse_args()
    settle_frames(vars(args))
    choice = frame_choice(vars(args))
    total = 0
    for split in paths.SPLITS:
        clips, left_out = find_clips(args.data_dir, split, args.resolution, choice, args.add_progress)
        print(f"{split}: {len(clips)} {'frame pairs' if choice.is_one_pair else 'videos'}, {choice}")
        for task in sorted({clip.task for clip in clips}):
            prompts = [draw_pair(clip, choice, seed=0).edit_prompt for clip in clips if clip.task == task]
            print(f"  {task}: {len(prompts)}")
            for prompt in prompts[:3]:
                print(f"    {prompt}")
        print("  " + (describe_left_out(left_out, most_named=None) or "no video left out"))
        total += len(clips)
    if not total:
        command = paths.extraction_command(args.data_dir, args.resolution)
        raise UserError(f"not one video has both frames; choose others, or extract them with: {command}")


if __name__ == "__main__":
    cli.run_command(main)
