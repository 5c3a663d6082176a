"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

or how the videos go on (`--rollout 10`), or what follows a picture of your own, which nothing can be compared with:

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --image photo.jpg --prompt "pushing a cup"

What the command leaves out is as the model was trained and validated (its training_config.json); DEFAULTS are for a
model that does not say. Training predicts its validation pictures with the same functions (pecn/sampling.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data import cli, paths
from data.cli import SWITCH, number
from data.clips import (
    ANY,
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    ESTIMATED,
    NO_PROGRESS,
    add_frame_options,
    horizons_of,
)
from pecn.sampling_options import DEFAULT_OPTIONS, add_sampling_options, number_of_samples

DEFAULTS = {  # for a model that does not say how it was trained and validated, such as those on the hub
    "train_data_dir": paths.DEFAULT_DATA_DIR,
    "resolution": 128,
    "input_frame_idx": DEFAULT_INPUT_FRAME_IDX,
    "target_frame_idx": DEFAULT_TARGET_FRAME_IDX,
    "horizon": None,
    "progress_source": NO_PROGRESS,
    "progress_estimator": None,
    **vars(DEFAULT_OPTIONS),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.CommandParser(
        usage="%(prog)s [options]",
        description="Predict frames of validation videos, save pictures and scores; or predict what follows a picture."
        " What is left out is as the model was trained and validated; in parentheses: where the model does not say.",
    )
    add = parser.add_argument
    frames_dir = paths.frames_dir(DEFAULTS["train_data_dir"], DEFAULTS["resolution"])
    annotations = paths.filtered_annotations_path(DEFAULTS["train_data_dir"], "val")
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--settings_of", help="take what is left out from this model in place of --model_dir's, to compare the two")
    add("--frames_dir", type=Path, help=f"of the model's resolution ({frames_dir})")
    add("--val_annotations", type=Path, help=f"entries to choose from ({annotations})")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add_frame_options(parser, defaults=False, progress=True)
    rollout_help = "predict the N frames after the input frame, in place of one target"
    add("--rollout", type=number(at_least=1, at_most=999), metavar="N", help=rollout_help)
    mode_help = "each from the input frame, or from the prediction before (direct where the model knows horizons)"
    add("--rollout_mode", choices=["direct", "chained"], help=mode_help)
    add("--num_samples", type=number_of_samples, default=8, help="how many pairs to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the pairs and their noise (%(default)s)")
    add_sampling_options(parser)
    parser.set_defaults(**dict.fromkeys(vars(DEFAULT_OPTIONS)))  # so that what is left out is known
    add("--batch_size", type=number(at_least=1), default=8, help="pictures predicted at once (%(default)s)")
    add("--against", type=Path, help="output directory of an earlier run, to compare with on the videos of both")
    add("--lpips", **SWITCH, help="score LPIPS too; needs the package lpips (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    add = parser.add_argument_group("one picture of your own, in place of validation videos").add_argument
    add("--image", type=Path, help="the picture, of any size; it becomes a square as training frames do")
    add("--prompt", help="what is done in it, as in 'pushing a cup from left to right'")
    percent, side = number(at_least=0, at_most=90, multiple_of=10), number(at_least=8, at_most=4096, multiple_of=8)
    add("--progress", type=percent, help="how much of it is done, in percent, for a model with progress prompts")
    add("--resolution", type=side, help=f"of the prediction, in pixels ({DEFAULTS['resolution']})")
    args = parser.parse_args(arguments)
    if (args.image is None) != (args.prompt is None):
        parser.error("--image and --prompt need each other")
    if args.image is None and any(value is not None for value in (args.progress, args.resolution)):
        parser.error("--progress and --resolution need --image and --prompt")
    if args.image is not None and args.horizon is not None and len(horizons_of(args.horizon)) > 1:
        parser.error("--image is followed by one prediction: give --horizon one number")
    if args.image is not None and (args.input_frame_idx is not None or args.target_frame_idx is not None):
        parser.error("--input_frame_idx and --target_frame_idx are of videos; for --image there is --horizon")
    if args.progress_estimator is not None and args.progress_source not in (None, ESTIMATED):
        parser.error(f"--progress_estimator is for --progress_source {ESTIMATED}")
    others = args.image or args.against or args.lpips or args.target_frame_idx is not None
    if args.rollout and (others or args.input_frame_idx == ANY):
        parser.error("--rollout goes without --image, --against, --lpips, --target_frame_idx, --input_frame_idx any")
    if args.rollout_mode and not args.rollout:
        parser.error("--rollout_mode needs --rollout")
    return args


def main() -> None:
    args = parse_args()
    from pecn.evaluation import run

    run(args)


if __name__ == "__main__":
    cli.run_command(main)
