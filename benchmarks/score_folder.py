"""Scores pictures that any system predicted, with the table, intervals and pictures of `sample_from_pix2pix.py`.

    python -m benchmarks.score_folder --predictions DIR --data_dir data/sthv2 --against test_result/baseline

DIR holds `<video id>.png` for each video; with `--layout strip` each picture is input, target and prediction side by
side, which needs no data directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data import paths
from data.cli import CommandParser, UserError, number, run_command
from data.clips import (
    FramePair,
    add_frame_options,
    derive_seed,
    describe_left_out,
    draw_pair,
    find_clips,
    frame_choice,
    settle_frames,
)
from data.files import write_json
from data.video_decoder import load_picture
from pecn.evaluation import METRICS_FILE, read_metrics, results_folder, save_predictions
from pecn.sampling import PredictedFrame, Prediction
from pecn.scores import better_or_not, format_table, paired_difference, summarize, verdict

SEED = 42  # puts the videos in a random order, of which random_pairs.png shows the first; draws the starts


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.score_folder", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--predictions", type=Path, required=True, help="folder of <video id>.png")
    layouts = "'single': a picture is a prediction; 'strip': it is input, target, prediction side by side (%(default)s)"
    add("--layout", choices=["single", "strip"], default="single", help=layouts)
    add("--output_dir", type=Path, default=Path("test_result/score_folder"), help="(%(default)s)")
    against = "output directory of sampling or of this command, for the paired difference to it"
    add("--against", type=Path, help=against)
    add("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="for single predictions (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames and predictions (%(default)s)")
    add_frame_options(parser)
    args = parser.parse_args(arguments)
    settle_frames(vars(args))
    return args


def find_pictures(folder: Path) -> dict[str, Path]:
    """The picture of each video id, in a random order. Raises UserError where there is none."""
    pictures = {path.stem: path for path in folder.glob("*.png")}
    if not pictures:
        raise UserError(f"{folder} has no <video id>.png; name a folder of predictions")
    return {video_id: pictures[video_id] for video_id in sorted(pictures, key=lambda name: derive_seed(SEED, name))}


def find_pairs(pictures: dict[str, Path], args: argparse.Namespace) -> list[FramePair]:
    """The frames of the videos that have a picture, in its order; names what is left out.

    Raises UserError where no video has both.
    """
    choice = frame_choice(vars(args))
    clips, left_out = find_clips(args.data_dir, "val", args.resolution, choice)
    by_id = {clip.video_id: clip for clip in clips}
    left_out = [(video_id, reason) for video_id, reason in left_out if video_id in pictures]
    known = by_id.keys() | {video_id for video_id, _ in left_out}
    left_out += [(video_id, "without a prediction") for video_id in by_id if video_id not in pictures]
    left_out += [(video_id, "not a validation video") for video_id in pictures if video_id not in known]
    if left_out:
        print(describe_left_out(left_out))
    pairs = [draw_pair(by_id[video_id], choice, SEED) for video_id in pictures if video_id in by_id]
    if not pairs:
        raise UserError(
            f"no picture of {args.predictions} is named after a validation video of {args.data_dir} that has both"
            f" frames ({choice})"
        )
    return pairs


def read_predictions(args: argparse.Namespace) -> Iterator[Prediction]:
    """Reads the folder's predictions one by one. Raises UserError where sizes do not fit."""
    pictures = find_pictures(args.predictions)
    if args.layout == "strip":
        for video_id, path in pictures.items():
            strip = load_picture(path)
            if strip.shape[1] != 3 * strip.shape[0]:
                raise UserError(f"{path} has {strip.shape[1]}x{strip.shape[0]} pixels, not three squares side by side")
            given, target, sample = np.split(strip, 3, axis=1)
            yield Prediction(video_id, "unknown", video_id, given, PredictedFrame(sample, None, None), target)
        return
    for pair in find_pairs(pictures, args):
        path = pictures[pair.video_id]
        given, target, sample = (load_picture(file) for file in (pair.input_image, pair.edited_image, path))
        if not given.shape == target.shape == sample.shape:
            sizes = [f"{frame.shape[1]}x{frame.shape[0]}" for frame in (sample, given)]
            raise UserError(f"{path} has {sizes[0]} pixels, the frames {sizes[1]}; choose their --resolution")
        predicted = PredictedFrame(sample, None, None)
        yield Prediction(pair.video_id, pair.task, pair.edit_prompt, given, predicted, target)


def main(args: argparse.Namespace) -> None:
    others = read_metrics(args.against)["samples"] if args.against else None
    with results_folder(args.output_dir, METRICS_FILE) as new:
        rows = save_predictions(new, read_predictions(args), str(args.predictions))
        summary = summarize(rows)
        write_json(new / METRICS_FILE, {"summary": summary, "samples": rows})
    print(format_table(summary))
    print(f"{args.output_dir} has overview.png, random_pairs.png, scores.png, samples/ and {METRICS_FILE}")
    print(verdict(summary["all"]))
    if others is not None:
        compared, unpaired = paired_difference(rows, others)
        if unpaired:
            print(describe_left_out(unpaired))
        words = better_or_not(compared["psnr"], compared["num_moving"], str(args.against))
        print(f"where something moves the prediction is {words}")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
