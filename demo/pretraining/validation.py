"""What held-out clips say of the demo's base model while it is trained: single samples, their scores and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch.utils.tensorboard import SummaryWriter

from data.clips import derive_seed
from data.files import make_folder
from data.prompts import action_progress, build_prompt
from demo.pretraining.clips import StoredClips
from pecn.pictures import save_picture, sheet_of_strips, strip_of_frames
from pecn.sampling import Prediction, predict_frames, reconstruct_frame
from pecn.sampling_options import SamplingOptions
from pecn.scores import score_prediction, summarize_group

INPUT_FRAME, TARGET_FRAME = 20, 25
# No guidance, and the input frame is put back nowhere: what the model itself draws.
OPTIONS = SamplingOptions(20, guidance_scale=1, image_guidance_scale=1, scheduler="euler", residual=False)


@dataclass(frozen=True)
class HeldOutPairs:
    """The same pair of frames of each held-out clip, uint8 RGB (H, W, 3), and their prompts."""

    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    prompts: list[str]


def held_out_pairs(frames: StoredClips) -> HeldOutPairs:
    """Frames INPUT_FRAME and TARGET_FRAME of the held-out clips that have them; prompts tell progress and horizon."""
    clips = [clip for clip in frames.held_out if clip.num_frames > TARGET_FRAME]
    inputs, targets = ([frames.rows[clip.first_row + frame] for clip in clips] for frame in (INPUT_FRAME, TARGET_FRAME))
    horizon = TARGET_FRAME - INPUT_FRAME
    progresses = [action_progress(INPUT_FRAME, clip.num_frames) for clip in clips]
    return HeldOutPairs(inputs, targets, [build_prompt(c.label, p, horizon) for c, p in zip(clips, progresses)])


def compared(pairs: HeldOutPairs, samples: Sequence[np.ndarray]) -> list[Prediction]:
    """The samples beside their pairs' frames."""
    unused = dict.fromkeys(("expected", "uncertainty", "vae_ceiling"))
    return [
        Prediction(video_id="", task="", edit_prompt=prompt, input=image, sample=sample, target=target, **unused)
        for image, target, prompt, sample in zip(pairs.inputs, pairs.targets, pairs.prompts, samples)
    ]


def score(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Where something moves: the samples' sharpness (median), their gains over the copy, and the share of frames."""
    moving = summarize_group([score_prediction(prediction) for prediction in predictions])["moving"]
    return {
        "sharpness": moving["sharpness"]["sample"]["median"],
        "ssim_gain": moving["ssim"]["sample"]["gain"],
        "psnr_gain": moving["psnr"]["sample"]["gain"],
        "psnr": moving["psnr"]["sample"]["mean"],
        "frames": moving["frames"]["sample"]["share"],
    }


def scores_in_words(scores: dict[str, float]) -> str:
    return (
        f"sharpness {scores['sharpness']:.2f}, SSIM - copy {scores['ssim_gain']:+.3f}, PSNR {scores['psnr']:.1f} dB,"
        f" - copy {scores['psnr_gain']:+.2f} dB, frames {scores['frames']:.0%}"
    )


def vae_ceiling(pipeline: StableDiffusionInstructPix2PixPipeline, pairs: HeldOutPairs) -> str:
    """In words what a perfect prediction would score: the targets after one trip through the VAE."""
    reconstructed = [reconstruct_frame(pipeline, target) for target in pairs.targets]
    return scores_in_words(score(compared(pairs, reconstructed)))


def validate(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: HeldOutPairs,
    args: argparse.Namespace,
    logs: SummaryWriter,
    step: int,
) -> None:
    """Draws one sample of each pair, and logs, prints and saves what came of it; the noise is the same each time."""
    seeds = [derive_seed(args.seed, "validation", index) for index in range(len(pairs.inputs))]
    predicted = predict_frames(pipeline, pairs.inputs, pairs.prompts, seeds, OPTIONS)
    predictions = compared(pairs, [frame.sample for frame in predicted])
    scores = score(predictions)
    for name, value in scores.items():
        logs.add_scalar(f"validation/{name}", value, step)
    picture = sheet_of_strips([strip_of_frames(prediction) for prediction in predictions])
    logs.add_image("validation/input_sample_target", picture, step, dataformats="HWC")
    make_folder(args.work_dir / "validation")
    save_picture(args.work_dir / "validation" / f"step-{step:06}.png", picture)
    print(f"UNet, step {step}: {scores_in_words(scores)}", flush=True)
