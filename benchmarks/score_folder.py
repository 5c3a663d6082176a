"""Scores pictures that any system predicted, with the table, intervals and pictures of `sample_from_pix2pix.py`.

    python -m benchmarks.score_folder --predictions DIR --against DIR2

DIR holds `<video id>.png` for each video, or is the OUTPUT_DIR of sampling; `--layout strip` is for pictures of input,
target and prediction side by side, which need neither frames nor annotations.
"""

from __future__ import annotations

import argparse
import functools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import cli, files, paths
from data.cli import UserError
from data.clips import (
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    FramePair,
    describe_left_out,
    find_frame_pairs,
    frame_choice,
)
from data.dataset import sampling_rank

SEED = 42  # puts the videos in a random order, of which random_pairs.png shows the first


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.CommandParser(prog="python -m benchmarks.score_folder", description=__doc__.splitlines()[0])
    add, index = parser.add_argument, cli.number(at_least=0)
    frames_dir = paths.frames_dir(paths.DEFAULT_DATA_DIR, 128)
    annotations = paths.filtered_annotations_path(paths.DEFAULT_DATA_DIR, "val")
    add("--predictions", type=Path, required=True, help="folder of <video id>.png, or an OUTPUT_DIR of sampling")
    add("--against", type=Path, help="another such folder, for the paired difference to it")
    layouts = "'single': a picture is a prediction; 'strip': it is input, target, prediction side by side (%(default)s)"
    add("--layout", choices=["single", "strip"], default="single", help=layouts)
    add("--output_dir", type=Path, default=Path("test_result/score_folder"), help="(%(default)s)")
    add = parser.add_argument_group("what single predictions are compared with").add_argument
    add("--frames_dir", type=Path, default=frames_dir, help="of the predictions' resolution (%(default)s)")
    add("--val_annotations", type=Path, default=annotations, help="(%(default)s)")
    add("--input_frame_idx", type=index, default=DEFAULT_INPUT_FRAME_IDX, help="frame that was given (%(default)s)")
    add("--target_frame_idx", type=index, default=DEFAULT_TARGET_FRAME_IDX, help="frame predicted (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import numpy as np

from data.video_decoder import load_picture
from pecn.pictures import METRICS_FILE, check_output_dir, read_scores, save_results
from pecn.sampling import Prediction
from pecn.scores import format_table, paired_difference, score_prediction, verdict


def main(args: argparse.Namespace) -> None:
    folders = [folder for folder in (args.predictions, args.against) if folder]
    if args.output_dir.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(
            f"{args.output_dir} holds predictions, and pictures there are replaced; name another --output_dir"
        )
    found = [find_predictions(folder, args) for folder in folders]
    check_output_dir(args.output_dir)
    with files.only_one(args.output_dir, "scoring"):
        summary = save_results(found[0], args.output_dir, str(args.predictions))
        scores = read_scores(args.output_dir)
    print(format_table(summary))
    print(f"{args.output_dir} holds the pictures (overview.png, samples/, …) and the scores ({METRICS_FILE})")
    print(f"{args.predictions}, {verdict(summary)}")
    if args.against:
        others = [{"video_id": other.video_id} | score_prediction(other) for other in found[1]]
        difference = paired_difference(scores, others)
        print(f"\nsample: {args.predictions}, other: {args.against}\n{format_table(difference)}")
        if difference["unpaired"]:
            print(describe_left_out(difference["unpaired"]))
        print(f"{args.predictions}, {verdict(difference, str(args.against))}")


def find_predictions(folder: Path, args: argparse.Namespace) -> Iterator[Prediction]:
    """The folder's predictions, read one by one; names at once what it leaves out."""
    pictures = find_pictures(folder)
    if args.layout == "strip":
        return (read_strip(video_id, path) for video_id, path in pictures.items())
    return (read_single(pair, pictures[pair.video_id]) for pair in find_pairs(folder, pictures, args))


def find_pictures(folder: Path) -> dict[str, Path]:
    """The picture of each video id, in a random order. Raises UserError where there is none."""
    paths = {path.parent.name: path for path in folder.glob("samples/*/prediction.png")}
    paths = paths or {path.stem: path for path in folder.glob("*.png")}
    if not paths:
        raise UserError(f"{folder} has no <video id>.png, and no samples/ of sampling; name a folder of predictions")
    return {video_id: paths[video_id] for video_id in sorted(paths, key=functools.partial(sampling_rank, SEED))}


def find_pairs(folder: Path, pictures: dict[str, Path], args: argparse.Namespace) -> list[FramePair]:
    """The frames of the videos that have a picture, in its order. Raises UserError where no video has both."""
    if not args.val_annotations.is_file():
        raise UserError(f"there is no file {args.val_annotations}; make it with: python -m data.dataset")
    entries = {entry["id"]: entry for entry in paths.read_annotations(args.val_annotations)}
    predicted = [entries[video_id] for video_id in pictures if video_id in entries]
    choice = frame_choice(args.input_frame_idx, args.target_frame_idx, None)
    pairs, left_out = find_frame_pairs(predicted, args.frames_dir, choice)
    left_out += [(video_id, "without a prediction") for video_id in entries if video_id not in pictures]
    left_out += [(video_id, f"not in {args.val_annotations}") for video_id in pictures if video_id not in entries]
    if left_out:
        print(f"{folder}: {describe_left_out(left_out)}")
    if not pairs:
        raise UserError(
            f"no picture of {folder} is named after a video of {args.val_annotations} that has frames"
            f" {args.input_frame_idx} and {args.target_frame_idx} in {args.frames_dir}; name those of its videos"
        )
    return pairs


def read_single(pair: FramePair, path: Path) -> Prediction:
    """A prediction beside its video's frames. Raises UserError where the sizes differ, or sampling had other frames."""
    frames = [load_picture(file) for file in (pair.input_image, pair.edited_image, path)]
    if len({frame.shape for frame in frames}) > 1:
        sizes = ", ".join(f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames)
        raise UserError(
            f"{path}: input, target and prediction are of {sizes} pixels; name its --frames_dir, or --layout strip"
        )
    for name, frame in zip(("input", "target"), frames):
        saved = path.with_name(f"{name}.png")  # beside the predictions of our own sampling
        if path.name == "prediction.png" and saved.is_file() and not np.array_equal(load_picture(saved), frame):
            raise UserError(f"{path} is of other frames; name them with --input_frame_idx and --target_frame_idx")
    return make_prediction(pair.video_id, pair.task, pair.edit_prompt, *frames)


def read_strip(video_id: str, path: Path) -> Prediction:
    """A prediction from a strip of three squares. Raises UserError where it is something else."""
    strip = load_picture(path)
    height, width, _ = strip.shape
    if width != 3 * height:
        raise UserError(f"{path} has {width}x{height} pixels, not three squares side by side; see --layout")
    # The strip does not say what is done in it; its id finds it among the pictures.
    return make_prediction(video_id, "unknown", video_id, *np.split(strip, 3, axis=1))


def make_prediction(
    video_id: str, task: str, edit_prompt: str, given: np.ndarray, target: np.ndarray, sample: np.ndarray
) -> Prediction:
    missing = dict.fromkeys(("expected", "uncertainty", "vae_ceiling"))
    return Prediction(
        video_id=video_id, task=task, edit_prompt=edit_prompt, input=given, target=target, sample=sample, **missing
    )


if __name__ == "__main__":
    cli.run_command(functools.partial(main, ARGS))
