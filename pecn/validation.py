"""Predictions of a few validation pairs while training goes on, and how TensorBoard or wandb shows them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.training_utils import EMAModel

from data.cli import one_line, warn
from data.clips import Clip, FrameChoice, draw_pairs
from data.prompts import TASK_OF_ALL_PROMPTS
from pecn.optimization import current_unet
from pecn.pictures import comparison_picture, save_picture, strip_of_frames
from pecn.rollout_pictures import filmstrip
from pecn.rollouts import Rollout, roll_out
from pecn.sampling import Prediction, predict_pairs
from pecn.sampling_options import sampling_options
from pecn.scores import METRICS, MOVING_METRICS, score_prediction, summarize_group, verdict

SHARE_OF_FRAMES = "share_of_frames"
ROLLOUT_HORIZONS = 5  # in a filmstrip, spread over those that are trained


def where_something_moves(metric: str) -> str:
    return f"{metric}_where_something_moves"


def start_trackers(accelerator: Accelerator, project: str, arguments: dict[str, Any]) -> None:
    """Starts the trackers and records the arguments; in TensorBoard all of a training is one run.

    Its custom scalars show each metric's lines (the sample's, the copy's, …) in one chart.
    """
    arguments = {name: str(value) for name, value in arguments.items()}
    accelerator.init_trackers(project)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(arguments)
        elif accelerator.is_main_process:
            from torch.utils.tensorboard.summary import hparams  # only where it is asked for

            for summary in hparams(arguments, {}):  # accelerate's own way makes two more runs
                tracker.writer.file_writer.add_summary(summary)
            metrics = [SHARE_OF_FRAMES, *map(where_something_moves, MOVING_METRICS), *METRICS]
            charts = {metric: ["Multiline", [f"^validation_{metric}/"]] for metric in metrics}
            tracker.writer.add_custom_scalars({"validation": charts})


def validate_or_warn(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    unet: torch.nn.Module,
    ema: EMAModel | None,
    clips: Sequence[Clip],
    choice: FrameChoice,
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Validates with the UNet as trained so far; a failure is a warning, training goes on. Call it on every process."""
    try:
        with current_unet(pipeline, accelerator, unet, ema):
            if accelerator.is_main_process:
                validate(pipeline, clips, choice, args, accelerator, step)
    except Exception as error:  # out of memory, a full disk, pictures that are not finite: no reason to lose the steps
        warn(f"the validation of step {step} failed ({one_line(error)}); training is not affected")
    accelerator.wait_for_everyone()


def validate(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    choice: FrameChoice,
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Predicts a pair of each validation clip, saves the pictures and logs them with their scores."""
    pairs, options = draw_pairs(clips, choice, args.seed), sampling_options(args)
    pipeline.unet.eval()
    try:
        pipeline.to(accelerator.device)
        with accelerator.autocast():
            predictions = list(
                predict_pairs(pipeline, pairs, args.seed, args.train_batch_size, options, show_progress=False)
            )
            with_rollouts = choice.tell_horizon and accelerator.trackers  # which alone show them
            rollouts = roll_out_clips(pipeline, clips, choice, args) if with_rollouts else []
    finally:
        for frozen in (pipeline.vae, pipeline.text_encoder):
            frozen.to("cpu")
        pipeline.unet.train()

    folder = args.output_dir / "validation"
    folder.mkdir(exist_ok=True)
    scores = [score_prediction(prediction) for prediction in predictions]
    for prediction, its_scores in zip(predictions, scores):
        picture = comparison_picture(prediction, its_scores, f"step {step}")
        save_picture(folder / f"step-{step:06}_{prediction.video_id}.png", picture)
    summary = summarize_group(scores)
    accelerator.log(scalars_of(summary), step)
    pictures = pictures_by_sentence(predictions)
    pictures |= {f"validation_rollout/{rollout.clip.video_id}": filmstrip(rollout)[None] for rollout in rollouts}
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **layout)
    accelerator.print(f"step {step}, {verdict(summary)}; pictures in {folder}")


def roll_out_clips(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    choice: FrameChoice,
    args: argparse.Namespace,
) -> list[Rollout]:
    """Direct rollouts, each from its clip's drawn input frame, at ROLLOUT_HORIZONS horizons at most."""
    starts = [clip.drawn_pair(choice, args.seed)[0] for clip in clips]
    clips = [
        replace(clip, frames=tuple(frame for frame in clip.frames if frame >= start))
        for clip, start in zip(clips, starts)
    ]
    places = np.linspace(0, len(choice.horizons) - 1, min(ROLLOUT_HORIZONS, len(choice.horizons)))
    spread = replace(choice, horizons=[choice.horizons[round(place)] for place in places])
    how = (args.seed, args.train_batch_size, sampling_options(args))
    return list(roll_out(pipeline, clips, spread, "direct", *how, show_progress=False))


def scalars_of(summary: dict[str, Any]) -> dict[str, float]:
    """What `summarize_group` returned as {"validation_<metric>/<way>": mean over the pairs}."""
    moving = summary["moving"]
    means = {metric: summary[metric] for metric in METRICS}
    means |= {where_something_moves(metric): moving[metric] for metric in MOVING_METRICS}
    scalars = {f"validation_{name}/{way}": figures["mean"] for name, of in means.items() for way, figures in of.items()}
    shares = {way: figures["share"] for way, figures in moving["frames"].items()}
    return scalars | {f"validation_{SHARE_OF_FRAMES}/{way}": share for way, share in shares.items()}


def pictures_by_sentence(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    """Each prediction's strip of frames (1, H, W, 3) by task and sentence, and by id where these repeat."""
    pictures = {}
    for prediction in predictions:
        tag = f"validation_{prediction.task}/{prediction.edit_prompt.removeprefix(TASK_OF_ALL_PROMPTS)}"
        if tag in pictures:
            tag = f"{tag} ({prediction.video_id})"
        strip = strip_of_frames(prediction)
        if prediction.expected is not None:  # four frames: on a card they are larger in two rows
            strip = np.concatenate(np.split(strip, 2, axis=1))
        pictures[tag] = strip[None]
    return pictures
