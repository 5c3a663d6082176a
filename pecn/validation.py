"""Predictions of a few validation pairs while training goes on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.training_utils import EMAModel

from data.layout import one_line, warn
from data.sthv2_dataset_hf import FramePair
from pecn.optimization import current_unet
from pecn.pictures import comparison_picture, save_picture
from pecn.sampling import predict_pairs
from pecn.sampling_options import sampling_options
from pecn.scores import MOVING_METRICS, score_prediction, summarize_group, verdict


def validate_or_warn(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    unet: torch.nn.Module,
    ema: EMAModel | None,
    pairs: Sequence[FramePair],
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Validates with the UNet as trained so far; a failure is a warning, training goes on. Call it on every process."""
    try:
        with current_unet(pipeline, accelerator, unet, ema):
            if accelerator.is_main_process:
                validate(pipeline, pairs, args, accelerator, step)
    except Exception as error:  # out of memory, a full disk, pictures that are not finite: no reason to lose the steps
        warn(f"the validation of step {step} failed ({one_line(error)}); training is not affected")
    accelerator.wait_for_everyone()


def validate(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: Sequence[FramePair],
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Predicts the validation pairs, saves the pictures and logs them with their scores."""
    options = sampling_options(args)
    pipeline.unet.eval()
    try:
        pipeline.to(accelerator.device)
        with accelerator.autocast():
            predictions = list(
                predict_pairs(pipeline, pairs, args.seed, args.train_batch_size, options, show_progress=False)
            )
    finally:
        for frozen in (pipeline.vae, pipeline.text_encoder):
            frozen.to("cpu")
        pipeline.unet.train()

    folder = args.output_dir / "validation"
    folder.mkdir(exist_ok=True)
    pictures, scores = {}, [score_prediction(prediction) for prediction in predictions]
    for prediction, its_scores in zip(predictions, scores):
        picture = comparison_picture(prediction, its_scores, f"step {step}")
        save_picture(folder / f"step-{step:06}_{prediction.video_id}.png", picture)
        pictures[f"validation/{prediction.video_id}"] = picture[None]
    summary = summarize_group(scores)
    moving = summary["moving"]
    # A dictionary becomes several lines in one chart, so that the sample is seen to pass the copy.
    means = {"psnr": summary["psnr"], "ssim": summary["ssim"]}
    means |= {f"{metric}_where_something_moves": moving[metric] for metric in MOVING_METRICS}
    charts = {name: {way: figures["mean"] for way, figures in of.items()} for name, of in means.items()}
    charts["share_of_frames"] = {way: figures["share"] for way, figures in moving["frames"].items()}
    for name, lines in charts.items():
        accelerator.log({f"validation/{name}": lines}, step)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **layout)
    accelerator.print(f"step {step}, {verdict(summary)}; pictures in {folder}")
