"""Compares ways to predict with one trained model: guidance, sampler, steps, several predictions, residual decoding.

    python -m benchmarks.sampling_options --model_dir outputs/run --data_dir data/sthv2

Each row changes what its name says of the way the model was validated, which the flags of `sample_from_pix2pix.py`
change for all rows; the first five start from the paper's settings instead. All rows predict the same pairs from the
same seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.cli import CommandParser, UserError, number, run_command
from data.clips import DEFAULT_CHOICE, choice_of
from data.files import write_file
from pecn.sampling_options import DEFAULT_OPTIONS, SCHEDULERS, SamplingOptions, add_sampling_options

PAPER = SamplingOptions(
    num_inference_steps=20,
    guidance_scale=7.5,
    image_guidance_scale=1.5,
    scheduler="euler_ancestral",
    strength=1.0,
    num_predictions=1,
    residual=False,
)
BASE_ROW = "as validated, or as the flags say"  # the sixth; the rows below it start from it
DEFAULT_RESOLUTION = 128  # of frames, where a model does not say what it was trained on
QUICK_ROWS, QUICK_SAMPLES, QUICK_STEPS = 6, 3, 2
COLUMNS = "{:>11}{:>8}{:>7}{:>8}"  # of the table, for the sample and for the expected frame


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.sampling_options", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--data_dir", type=Path, default=Path("data/demo"), help="prepared data directory (%(default)s)")
    add("--num_samples", type=count, default=60, help="validation pairs, spread over the tasks (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the pairs and their noise (%(default)s)")
    add("--batch_size", type=count, default=16, help="pictures predicted at once (%(default)s)")
    add("--output", type=Path, help="JSON file for all scores of all pairs")
    add("--quick", action="store_true", help="a run under a minute: 3 pairs, 2 steps, 6 of the rows")
    add_sampling_options(parser)
    parser.set_defaults(**dict.fromkeys(vars(DEFAULT_OPTIONS)))  # so that what is left out is known
    args = parser.parse_args(arguments)
    if args.quick:
        args.num_samples = QUICK_SAMPLES
    if args.output and not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent} for --output")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

from accelerate import PartialState

from data.clips import FramePair, choose_samples, load_frame_pairs, verify_frames
from pecn.model import find_model, load_pipeline, read_training_config
from pecn.sampling import predict_pairs
from pecn.scores import PREDICTED, score_prediction, summarize


def alternatives(base: SamplingOptions) -> dict[str, SamplingOptions]:
    """The rows of the table."""
    several = replace(PAPER, residual=True, num_predictions=4)
    rows = {
        "the paper's (diffusers' pipeline)": PAPER,
        "the paper's, residual": replace(PAPER, residual=True),
        "the paper's, residual, 4": several,
        "  the same, guidance: text 1.0": replace(several, guidance_scale=1.0),
        "  the same, text and image 1.0": replace(several, guidance_scale=1.0, image_guidance_scale=1.0),
        BASE_ROW: base,
    }
    for count in (1, 4, 8):
        for name, residual in (("plain", False), ("residual", True)):
            rows[f"{name}, predictions: {count}"] = replace(base, residual=residual, num_predictions=count)
    for text, image in ((1.0, 1.0), (1.0, 1.5), (1.5, 1.0), (2.0, 1.5), (3.0, 1.5), (7.5, 1.5), (7.5, 1.0)):
        rows[f"guidance: text {text}, image {image}"] = replace(base, guidance_scale=text, image_guidance_scale=image)
    for steps in (1, 2, 4, 10, 20, 50):
        rows[f"steps: {steps}"] = replace(base, num_inference_steps=steps)
    rows["from the noised input, strength 0.99"] = replace(base, strength=0.99)
    several_steps = replace(base, num_inference_steps=10)  # a single one is the same with every scheduler
    for name in SCHEDULERS:
        rows[f"10 steps, {name}"] = replace(several_steps, scheduler=name)
    for strength in (0.3, 0.5, 0.7, 0.9):
        rows[f"10 steps, strength {strength}"] = replace(several_steps, strength=strength)
    return rows


def base_options(args: argparse.Namespace, trained: dict[str, Any]) -> SamplingOptions:
    """As the flags say, and what they leave out as the model's training config or the defaults have it."""
    known = {name: trained.get(name, value) for name, value in vars(DEFAULT_OPTIONS).items()}
    return SamplingOptions(**known | {name: value for name in known if (value := getattr(args, name)) is not None})


def find_pairs(args: argparse.Namespace, trained: dict[str, Any]) -> list[FramePair]:
    """Validation pairs that have their target, as the model was trained for (its training config)."""
    resolution = trained.get("resolution", DEFAULT_RESOLUTION)
    choice = DEFAULT_CHOICE
    if "input_frame_idx" in trained:
        choice = choice_of(trained)
    if choice.is_estimated:
        raise UserError(f"{args.model_dir} was trained with estimated progress, which this comparison does not know")
    pairs, _ = load_frame_pairs(args.data_dir, "val", resolution, choice, args.seed)
    if not pairs:
        raise UserError(f"no validation video of {args.data_dir} has both frames of {args.model_dir}'s training")
    pairs = choose_samples(pairs, args.num_samples, args.seed)
    verify_frames(pairs, resolution)
    return pairs


def format_row(name: str, summary: dict[str, Any], seconds: float) -> str:
    """One line: how the sample and the expected frame do where something moves."""
    moving, cells = summary["moving"], ""
    for way in PREDICTED:
        if way not in moving["psnr"]:  # a single prediction has no expected frame
            cells += COLUMNS.format("-", "-", "-", "-")
            continue
        ssim, psnr = (moving[metric][way]["gain"] for metric in ("ssim", "psnr"))
        sharpness, frames = moving["sharpness"][way]["median"], moving["frames"][way]["share"]
        cells += COLUMNS.format(f"{sharpness:.2f}", f"{ssim:+.3f}", f"{psnr:+.2f}", f"{frames:.0%}")
    return f"{name:38}{cells}{seconds:>7.2f}"


def main(args: argparse.Namespace) -> None:
    model = find_model(args.model_dir)  # first: it says which frames to look for
    trained = read_training_config(model)
    rows = alternatives(base_options(args, trained))
    if args.quick:
        rows = {
            name: replace(options, num_inference_steps=QUICK_STEPS) for name, options in list(rows.items())[:QUICK_ROWS]
        }
    pairs = find_pairs(args, trained)
    pipeline = load_pipeline(model).to(PartialState().device)
    print(f"{len(pairs)} pairs of {args.data_dir}, model {args.model_dir}")
    if args.quick:
        print(f"all rows in {QUICK_STEPS} steps")
    flags = " ".join(f"--{name} {value}" for name, value in vars(rows[BASE_ROW]).items())
    print(f"from row 6 on, unless the row says otherwise: {flags}")
    print(f"{'where something moves:':38}" + "".join(f"{f'{way} (SSIM, PSNR: - copy)':>32}" for way in PREDICTED))
    print(f"{'':38}" + 2 * COLUMNS.format("sharpness", "SSIM", "PSNR", "frames") + f"{'s/pair':>7}")
    everything: dict[str, Any] = {}
    rows_of: dict[SamplingOptions, dict[str, Any]] = {}
    for name, options in rows.items():
        if options not in rows_of:  # several rows change nothing
            started = time.perf_counter()
            predictions = list(predict_pairs(pipeline, pairs, args.seed, args.batch_size, options, show_progress=False))
            seconds = (time.perf_counter() - started) / len(pairs)
            scores = [{"video_id": p.video_id, "task": p.task} | score_prediction(p) for p in predictions]
            rows_of[options] = {"seconds_per_pair": seconds, "summary": summarize(scores), "samples": scores}
        everything[name] = rows_of[options]
        summary = everything[name]["summary"]
        print(format_row(name, summary, everything[name]["seconds_per_pair"]), flush=True)
        if args.output:
            write_file(args.output, json.dumps(everything, indent=1) + "\n")
    for way, name in (("copy", "copying"), ("vae_ceiling", "the VAE's ceiling")):
        figures = [f"PSNR {summary['psnr'][way]['mean']:.2f} dB"]
        if summary["moving"]["num_samples"]:
            means = [summary["moving"][metric][way]["mean"] for metric in ("psnr", "ssim")]
            figures.append("where something moves {:.2f} dB, SSIM {:.3f}".format(*means))
        print(f"{name}: {', '.join(figures)}")


if __name__ == "__main__":
    run_command(functools.partial(main, ARGS))
