"""Compares ways to predict with one trained model: guidance, scheduler, steps, start, several predictions, background.

    python -m benchmarks.sampling_options --model_dir outputs/run --data_dir data/sthv2

Each row changes what its name says of the way the model was validated, which the flags of `sample_from_pix2pix.py`
change for all rows; the first rows start from InstructPix2Pix's settings instead. All rows predict the same pairs from
the same seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.cli import CommandParser, UserError, number, run_command
from data.clips import FramePair, add_frame_options, choose_balanced, draw_pair, find_clips, frame_choice, settle_frames
from pecn.evaluation import RECORDED, loaded_model
from pecn.model import Pipeline, find_model, read_training_config
from pecn.sampling import predict_pairs
from pecn.sampling_options import SCHEDULERS, SamplingOptions, add_sampling_options, sampling_options
from pecn.scores import PREDICTED, gain_in_words, score_prediction, summarize

INSTRUCT_PIX2PIX = SamplingOptions(
    num_inference_steps=20,
    guidance_scale=7.5,
    image_guidance_scale=1.5,
    scheduler="euler_ancestral",
    strength=1.0,
    num_predictions=1,
    keep_background=False,
)
QUICK_SAMPLES, QUICK_STEPS = 3, 2
HEAD = "{:34}{:>10}{:>11}{:>13}{:>18}{:>16}{:>9}".format
HEADINGS = ("where something moves", "", "sharpness", "good frames", "SSIM - copy", "PSNR - copy", "s/pair")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, those left out being as the model was trained and validated."""
    parser = CommandParser(prog="python -m benchmarks.sampling_options", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--data_dir", type=Path, default=Path("data/demo"), help="prepared data directory (%(default)s)")
    add("--num_samples", type=count, default=60, help="validation pairs, spread over the tasks (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the pairs and their noise (%(default)s)")
    add("--batch_size", type=count, default=16, help="pictures predicted at once (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames, where a model does not say it (%(default)s)")
    add("--quick", action="store_true", help="under a minute: 3 pairs, 2 steps, the first 4 rows")
    add_frame_options(parser)
    add_sampling_options(parser)
    trained = read_training_config(find_model(parser.parse_args(arguments).model_dir))
    recorded = {name: trained[name] for name in RECORDED if name in trained}
    parser.set_defaults(**{"add_progress": False} | recorded)
    args = parser.parse_args(arguments)
    settle_frames(vars(args))
    if args.quick:
        args.num_samples = QUICK_SAMPLES
    return args


def alternatives(base: SamplingOptions) -> dict[str, SamplingOptions]:
    """The rows of the table; what is the same as an earlier row is left out."""
    paper = INSTRUCT_PIX2PIX
    rows = {
        "InstructPix2Pix's own": paper,
        "  without text guidance": replace(paper, guidance_scale=1.0),
        "  without any guidance": replace(paper, guidance_scale=1.0, image_guidance_scale=1.0),
        "as validated, or as the flags say": base,
        "  keeping the background": replace(base, keep_background=True),
    }
    for count in (1, 4, 8):
        rows[f"  predictions: {count}"] = replace(base, num_predictions=count)
    for text, image in ((1.0, 1.0), (1.0, 1.3), (1.3, 1.3), (1.0, 1.5), (1.5, 1.0), (2.0, 1.5), (7.5, 1.5)):
        rows[f"  guidance: text {text}, image {image}"] = replace(base, guidance_scale=text, image_guidance_scale=image)
    for steps in (1, 2, 4, 8, 20, 50):
        rows[f"  steps: {steps}"] = replace(base, num_inference_steps=steps)
    for name in SCHEDULERS:
        rows[f"  scheduler: {name}"] = replace(base, scheduler=name)
    for strength in (0.5, 0.75, 0.9, 1.0):
        rows[f"  strength: {strength}"] = replace(base, strength=strength)
    first_names = {options: name for name, options in reversed(rows.items())}
    return {name: options for name, options in rows.items() if first_names[options] == name}


def find_pairs(args: argparse.Namespace) -> list[FramePair]:
    """Validation pairs that have their target, spread over the tasks."""
    choice = frame_choice(vars(args))
    clips, _ = find_clips(args.data_dir, "val", args.resolution, choice, args.add_progress)
    if not clips:
        raise UserError(f"no validation video of {args.data_dir} has both frames ({choice})")
    return [draw_pair(clip, choice, args.seed) for clip in choose_balanced(clips, args.seed, args.num_samples)]


def print_row(
    name: str, pipeline: Pipeline, pairs: list[FramePair], args: argparse.Namespace, options: SamplingOptions
) -> None:
    """Predicts all pairs, and prints how the sample and the expected frame do where something moves."""
    started = time.perf_counter()
    predictions = list(predict_pairs(pipeline, pairs, args.seed, args.batch_size, options))
    seconds = (time.perf_counter() - started) / len(pairs)
    figures = summarize([score_prediction(prediction) for prediction in predictions])["all"]
    if not figures["num_moving"]:
        raise UserError("nothing moves in these pairs; choose more with --num_samples")
    for way in (way for way in PREDICTED if way in figures):
        of_way = figures[way]
        gains = [gain_in_words(of_way[metric], form) for metric, form in (("ssim", ".3f"), ("psnr", ".2f"))]
        sharpness, good = of_way["sharpness"]["value"], of_way["good_frame"]["value"]
        print(HEAD(name, way, f"{sharpness:.2f}", f"{good:.0%}", *gains, f"{seconds:.2f}"), flush=True)
        name = ""


def main(args: argparse.Namespace) -> None:
    base = sampling_options(args)
    rows = alternatives(base)
    if args.quick:
        rows = {name: replace(options, num_inference_steps=QUICK_STEPS) for name, options in list(rows.items())[:4]}
    pairs = find_pairs(args)
    flags = " ".join(f"--{name} {value}" for name, value in vars(base).items())
    print(f"{len(pairs)} pairs of {args.data_dir}, model {args.model_dir}, {flags}")
    if args.quick:
        print(f"all rows in {QUICK_STEPS} steps")
    print(HEAD(*HEADINGS))
    with loaded_model(args.model_dir) as pipeline:
        for name, options in rows.items():
            print_row(name, pipeline, pairs, args, options)


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
