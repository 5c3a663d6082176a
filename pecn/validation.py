"""Predictions of a few validation pairs while training goes on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

from data.sthv2_dataset_hf import FramePair
from pecn.pictures import comparison_picture, save_picture
from pecn.sampling import predict_pairs
from pecn.sampling_options import sampling_options
from pecn.scores import MOVING_METRICS, score_prediction, summarize_group, verdict


def validate(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    unet: UNet2DConditionModel,
    pairs: Sequence[FramePair],
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Predicts the validation pairs with the UNet as it is, saves the pictures and logs them with their scores."""
    pipeline.unet = unet.eval()
    pipeline.to(accelerator.device)
    with accelerator.autocast():
        options = sampling_options(args)
        predictions = list(
            predict_pairs(pipeline, pairs, args.seed, args.train_batch_size, options, show_progress=False)
        )
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.to("cpu")
    unet.train()

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
