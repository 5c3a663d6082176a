"""Frame pairs of Something-Something V2, and the prompts that go with them, as a Hugging Face Dataset.

Run as a module, it prints what a training run would see:

    python -m data.sthv2_dataset_hf --data_dir data/sthv2 --resolution 128 --add_progress
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from data import cli, clips, paths
from data.prompts import PROGRESS_HELP, PROGRESS_OPTION


def frame_pairs_dataset(pairs: Sequence[clips.FramePair]) -> Dataset:
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
    clips.add_frame_options(parser)
    parser.add_argument("--add_progress", **PROGRESS_OPTION, default=False, help=PROGRESS_HELP)
    args = parser.parse_args()
    clips.settle_frames(vars(args))
    choice = clips.frame_choice(vars(args))
    total = 0
    for split in paths.SPLITS:
        found, left_out = clips.find_clips(args.data_dir, split, args.resolution, choice, args.add_progress)
        print(f"{split}: {len(found)} {'frame pairs' if choice.is_one_pair else 'videos'}, {choice}")
        for task in sorted({clip.task for clip in found}):
            prompts = [clips.draw_pair(clip, choice, seed=0).edit_prompt for clip in found if clip.task == task]
            print(f"  {task}: {len(prompts)}")
            for prompt in prompts[:3]:
                print(f"    {prompt}")
        print("  " + (clips.describe_left_out(left_out, most_named=None) or "left out: none"))
        total += len(found)
    if not total:
        command = paths.extraction_command(args.data_dir, args.resolution)
        raise cli.UserError(f"not one video has both frames; choose others, or extract them with: {command}")


if __name__ == "__main__":
    cli.run_command(main)
