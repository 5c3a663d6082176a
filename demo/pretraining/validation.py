"""How good the demo's base model is while it is trained: one draw of each held-out pair, its scores and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from data.clips import derive_seed
from data.files import make_folder
from data.prompts import action_progress, build_prompt
from demo.pretraining.clips import StoredClips
from pecn.model import Pipeline
from pecn.pictures import frame_panels, panel_row, save_picture, sheet
from pecn.sampling import PredictedFrame, Prediction, predict_frames, reconstruct_frame
from pecn.sampling_options import SamplingOptions
from pecn.scores import score_prediction, summarize

INPUT_FRAME, TARGET_FRAME = 20, 25
OPTIONS = SamplingOptions(20, guidance_scale=1, image_guidance_scale=1, scheduler="euler")  # no guidance


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


def with_predicted(pairs: HeldOutPairs, predicted: Sequence[PredictedFrame]) -> list[Prediction]:
    """The predicted frames together with their pairs."""
    return [
        Prediction(video_id="", task="", edit_prompt=prompt, input=image, predicted=frame, target=target)
        for image, target, prompt, frame in zip(pairs.inputs, pairs.targets, pairs.prompts, predicted)
    ]


def score(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Where something moves: the samples' sharpness (median), PSNR, gains over the copy, and share of good frames."""
    rows = [score_prediction(prediction) for prediction in predictions]
    sample = summarize(rows)["all"]["sample"]
    return {
        "sharpness": sample["sharpness"]["value"],
        "ssim_gain": sample["ssim"]["gain"],
        "psnr_gain": sample["psnr"]["gain"],
        "psnr": sample["psnr"]["value"],
        "good_frames": sample["good_frame"]["value"],
    }


def scores_in_words(scores: dict[str, float]) -> str:
    return (
        f"sharpness {scores['sharpness']:.2f}, SSIM - copy {scores['ssim_gain']:+.3f}, PSNR {scores['psnr']:.1f} dB,"
        f" - copy {scores['psnr_gain']:+.2f} dB, good frames {scores['good_frames']:.0%}"
    )


def vae_ceiling(pipeline: Pipeline, pairs: HeldOutPairs) -> str:
    """The scores, in words, of the targets after one trip through the VAE: no prediction can be better."""
    reconstructed = [PredictedFrame(reconstruct_frame(pipeline, target), None, None) for target in pairs.targets]
    return scores_in_words(score(with_predicted(pairs, reconstructed)))


def validate(pipeline: Pipeline, pairs: HeldOutPairs, args: argparse.Namespace, logs: SummaryWriter, step: int) -> None:
    """Predicts each pair with noise that is the same at every step; logs, prints and saves scores and pictures."""
    seeds = [derive_seed(args.seed, "validation", index) for index in range(len(pairs.inputs))]
    predictions = with_predicted(pairs, predict_frames(pipeline, pairs.inputs, pairs.prompts, seeds, OPTIONS))
    scores = score(predictions)
    for name, value in scores.items():
        logs.add_scalar(f"validation/{name}", value, step)
    rows = [panel_row(frame_panels(prediction), [prediction.edit_prompt]) for prediction in predictions]
    picture = sheet(rows, columns=2)
    logs.add_image("validation/input_sample_target", picture, step, dataformats="HWC")
    make_folder(args.work_dir / "validation")
    save_picture(args.work_dir / "validation" / f"step-{step:06}.png", picture)
    print(f"UNet, step {step}: {scores_in_words(scores)}", flush=True)
