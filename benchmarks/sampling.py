"""Times 16 predictions of 20 steps: diffusers' own pipeline, one sample after the other, against ours in batches.

    python -m benchmarks.sampling

Both draw the same pictures, to within rounding, from the same seeds, with the guidance of the paper: that is checked.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import signal
import statistics
import time
from collections.abc import Sequence

from data.cli import CommandParser, UserError, number, run_command

CLIP_SEED = 7
INPUT_FRAME_IDX = 20
MAX_DIFFERENCE = {"no": 1, "fp16": 16, "bf16": 64}  # gray levels between pictures of batches of other sizes
QUICK = {"num_samples": 4, "num_inference_steps": 4, "rounds": 1, "batch_sizes": [4]}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--model", default="demo", help="'demo', 'sd15' (its size, random weights), or a model's directory")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
    add("--num_samples", type=count, default=16, help="predictions to make (%(default)s)")
    add("--num_inference_steps", type=count, default=20, help="denoising steps (%(default)s)")
    add("--batch_sizes", type=count, nargs="+", default=[4, 8, 16], help="of ours (%(default)s)")
    add("--rounds", type=count, default=3, help="how often everything is timed, in turn (%(default)s)")
    add("--mixed_precision", choices=list(MAX_DIFFERENCE), help="(fp16 on a GPU, else no)")
    add("--quick", action="store_true", help="a run under a minute: 4 samples, 4 steps, one round")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import cv2
import numpy as np
import torch
from accelerate import PartialState
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from benchmarks.models import build_model
from data.prompts import build_prompt
from demo.renderer.clip import render_clip
from pecn.model import DTYPES, find_model, load_pipeline
from pecn.sampling import predict_frames
from pecn.sampling_options import SamplingOptions


def render_inputs(count: int, resolution: int) -> tuple[list[np.ndarray], list[str]]:
    """The input frames of rendered clips, uint8 RGB, and their prompts."""
    frames, prompts = [], []
    for index in range(count):
        annotation, rendered = render_clip(CLIP_SEED, "val", index)
        frame = next(itertools.islice(rendered, INPUT_FRAME_IDX, None))
        frames.append(cv2.resize(frame, (resolution, resolution), interpolation=cv2.INTER_AREA))
        prompts.append(build_prompt(annotation["label"]))
    return frames, prompts


def load_model(name: str, mixed_precision: str | None) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline to time, on the device and in the precision that sampling would choose."""
    device = PartialState().device
    precision = mixed_precision or ("fp16" if device.type == "cuda" else "no")
    pipeline = build_model(name) if name in ("demo", "sd15") else load_pipeline(find_model(name))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, DTYPES[precision])


def predict_one_by_one(
    pipeline: StableDiffusionInstructPix2PixPipeline, frames: list[np.ndarray], prompts: list[str], num_steps: int
) -> list[np.ndarray]:
    """What most scripts do: a call of the pipeline for each frame."""
    pictures = []
    for seed, (frame, prompt) in enumerate(zip(frames, prompts)):
        generator = torch.Generator().manual_seed(seed)
        predicted = pipeline(
            prompt=prompt,
            image=Image.fromarray(frame),
            num_inference_steps=num_steps,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            generator=generator,
        )
        pictures.append(np.asarray(predicted.images[0]))
    return pictures


def predict_in_batches(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    frames: list[np.ndarray],
    prompts: list[str],
    num_steps: int,
    batch_size: int,
) -> list[np.ndarray]:
    """Ours, as `sample_from_pix2pix.py` calls it, with the plain pipeline's way of decoding."""
    options = SamplingOptions(
        num_inference_steps=num_steps,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        scheduler="euler_ancestral",
        num_predictions=1,
        residual=False,
    )
    pictures = []
    for start in range(0, len(frames), batch_size):
        batch = slice(start, start + batch_size)
        seeds = range(len(frames))[batch]
        pictures += [p.sample for p in predict_frames(pipeline, frames[batch], prompts[batch], seeds, options)]
    return pictures


def main(args: argparse.Namespace) -> None:
    frames, prompts = render_inputs(args.num_samples, args.resolution)
    pipeline = load_model(args.model, args.mixed_precision)
    alternatives = {
        "diffusers, one by one": lambda: predict_one_by_one(pipeline, frames, prompts, args.num_inference_steps)
    }
    for size in args.batch_sizes:
        alternatives[f"ours, batch {size}"] = lambda size=size: predict_in_batches(
            pipeline, frames, prompts, args.num_inference_steps, size
        )
    device = pipeline.device
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    pictures = {}
    for predict in alternatives.values():  # the first call of each shape is slower
        predict()
    for _ in range(args.rounds):
        for name, predict in alternatives.items():
            started = time.perf_counter()
            pictures[name] = np.stack(predict()).astype(int)
            seconds[name].append(time.perf_counter() - started)
    reference, *others = pictures.values()
    largest = max(int(np.abs(picture - reference).max()) for picture in others)
    [precision] = [name for name, dtype in DTYPES.items() if dtype == pipeline.unet.dtype]
    print(
        f"{args.num_samples} predictions at {args.resolution} pixels, {args.num_inference_steps} steps, model"
        f" {args.model}, {device.type}, {torch.get_num_threads()} threads, mixed precision {precision},"
        f" median of {args.rounds}"
    )
    print(f"{'':24}{'seconds':>10}{'a second':>10}{'ratio':>8}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slowest = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:24}{median:>10.2f}{args.num_samples / median:>10.2f}{slowest / median:>8.2f}")
    print(f"largest difference between their pictures: {largest} of 255 gray levels")
    if largest > MAX_DIFFERENCE[precision]:
        raise UserError(f"the alternatives drew different pictures ({largest} gray levels apart)")


if __name__ == "__main__":
    run_command(functools.partial(main, ARGS))
