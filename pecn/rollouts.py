"""Rollouts: how a video goes on from one frame, predicted frame by frame, and how good that is at each horizon.

*Direct* predicts every frame from the start frame, for a model whose prompts tell the horizon; *chained* takes each
prediction as the input of the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from diffusers import StableDiffusionInstructPix2PixPipeline
from tqdm import tqdm

from data.cli import UserError
from data.clips import DEFAULT_INPUT_FRAME_IDX, Clip, FrameChoice, derive_seed
from data.video_decoder import load_picture
from pecn.sampling import Prediction, predict_frames
from pecn.sampling_options import DEFAULT_OPTIONS, SamplingOptions
from pecn.scores import PREDICTED, score_prediction, share_cell, summarize_group, with_spread


@dataclass(frozen=True)
class Rollout:
    """A video's frames at 0 (the start frame, as given) and at each of `horizons`, uint8 RGB (H, W, 3)."""

    clip: Clip
    horizons: Sequence[int]  # how many frames after the start
    edit_prompts: Sequence[str]  # one for each horizon
    truths: Sequence[np.ndarray | None]  # None where the video has ended
    predictions: list[np.ndarray]
    expected: list[np.ndarray | None]  # the mean of several predictions, where more than one was made; None at 0

    @property
    def step(self) -> int:
        """How many frames lie from one picture to the next."""
        return self.horizons[-1] - [0, *self.horizons][-2]


def rollout_choice(choice: FrameChoice, num_frames: int, mode: str) -> FrameChoice:
    """What a rollout of `num_frames` frames predicts with a model that offers the horizons of `choice`.

    "chained" steps by the shortest of them, "direct" goes on from it frame by frame. Any start becomes
    DEFAULT_INPUT_FRAME_IDX. Raises UserError where the prompts of a direct rollout would not differ, where a chained
    one would need estimates of progress, and where not even the shortest horizon lies within the rollout.
    """
    if mode == "direct" and not choice.tell_horizon:
        raise UserError(
            "the model has learned one horizon, and its prompts do not tell any: only ROLLOUT_MODE=chained is possible"
        )
    if mode == "chained" and choice.is_estimated:
        raise UserError("chained, there are no frames to estimate progress from: set PROGRESS_SOURCE to none or oracle")
    shortest = choice.horizons[0]
    horizons = range(shortest, num_frames + 1, shortest if mode == "chained" else 1)
    if not horizons:
        raise UserError(
            f"the model predicts {shortest} frames ahead, which a rollout of {num_frames} does not reach: set ROLLOUT"
            f" to {shortest} or more"
        )
    return replace(choice, start=DEFAULT_INPUT_FRAME_IDX if choice.start is None else choice.start, horizons=horizons)


def roll_out(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    choice: FrameChoice,
    mode: str,
    seed: int,
    batch_size: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    show_progress: bool = True,
) -> Iterator[Rollout]:
    """Predicts `choice.horizons` from the first of each clip's frames, `batch_size` pictures at once.

    Where a video ends before the rollout does, the rest is predicted but not scored, and pictures show its last frame
    as the truth. Each video and horizon has its own noise seed, so that the batch size changes nothing.
    """
    videos_at_once = max(1, batch_size // options.num_predictions)
    total = len(clips) * len(choice.horizons)
    with tqdm(total=total, desc="Predicting", unit="frame", disable=not show_progress) as progress_bar:
        for first in range(0, len(clips), videos_at_once):
            rollouts = [start_rollout(clip, choice, mode) for clip in clips[first : first + videos_at_once]]
            for place, horizon in enumerate(choice.horizons):
                images = [rollout.predictions[-1 if mode == "chained" else 0] for rollout in rollouts]
                edit_prompts = [rollout.edit_prompts[place] for rollout in rollouts]
                seeds = [derive_seed(seed, rollout.clip.video_id, "rollout", horizon) for rollout in rollouts]
                predicted = predict_frames(pipeline, images, edit_prompts, seeds, options)
                for rollout, frame in zip(rollouts, predicted):
                    rollout.predictions.append(frame.sample)
                    rollout.expected.append(frame.expected)
                progress_bar.update(len(rollouts))
            yield from rollouts


def start_rollout(clip: Clip, choice: FrameChoice, mode: str) -> Rollout:
    """A rollout that has its prompts and true frames, but as yet no prediction beside the start frame.

    Chained, prompts tell the step, and the progress of the frame that is the input; that of the last true frame once
    the video has ended, as training knows none beyond.
    """
    start, last = clip.frames[0], clip.frames[-1]
    edit_prompts = []
    for horizon in choice.horizons:
        ahead = choice.horizons[0] if mode == "chained" else horizon
        edit_prompts.append(clip.prompt(choice, min(start + horizon - ahead, last), ahead))
    paths = dict(zip(clip.frames, clip.paths))
    indices = [start + horizon for horizon in (0, *choice.horizons)]
    truths = [load_picture(paths[index]) if index in paths else None for index in indices]
    return Rollout(clip, choice.horizons, edit_prompts, truths, predictions=[truths[0]], expected=[None])


# Scores.


def score_rollout(rollout: Rollout) -> list[dict[str, Any]]:
    """For each horizon what `score_prediction` returns, copying being the start frame, and whose prediction it is."""
    rows = []
    frames = zip(rollout.truths[1:], rollout.predictions[1:], rollout.expected[1:])
    for horizon, edit_prompt, (truth, sample, expected) in zip(rollout.horizons, rollout.edit_prompts, frames):
        names = {"video_id": rollout.clip.video_id, "task": rollout.clip.task, "edit_prompt": edit_prompt}
        prediction = Prediction(
            **names,
            input=rollout.predictions[0],
            sample=sample,
            expected=expected,
            uncertainty=None,
            target=truth,
            vae_ceiling=None,
        )
        rows.append({**names, "horizon": horizon, **score_prediction(prediction)})
    return rows


def summarize_by_horizon(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each horizon in turn what `summarize_group` returns for its rows of `score_rollout`.

    `horizon` and `num_without_target` are added.
    """
    summary = []
    for horizon in sorted({row["horizon"] for row in rows}):
        group = [row for row in rows if row["horizon"] == horizon]
        of_group = summarize_group(group)
        num_without = len(group) - of_group["num_samples"]
        summary.append({"horizon": horizon, "num_without_target": num_without, **of_group})
    return summary


ROW = "{:>7}{:>7}  {:10}{:>11}{:>15}{:>17}{:>14}{:>16}{:>20}"


def describe_rollouts(summary: Sequence[dict[str, Any]]) -> str:
    """`summarize_by_horizon`'s summary as text: lines for each horizon, and in the end how far the model is good."""
    figures = ("sharpness", "SSIM", "SSIM - copy", "PSNR, dB", "PSNR - copy", "frames")
    lines = [ROW.format("horizon", "videos", "", *figures)]
    for group in summary:
        moving, names = group["moving"], [group["horizon"], group["moving"]["num_samples"]]
        if not moving["num_samples"]:
            lines.append(ROW.format(*names, "", *["-"] * 6))
        for way in (way for way in PREDICTED if way in moving["frames"]):
            cells = [f"{moving['sharpness'][way]['median']:.2f}"]
            for metric, form in (("ssim", ".3f"), ("psnr", ".2f")):
                of_way = moving[metric][way]
                cells += [with_spread(of_way, "mean", form), with_spread(of_way, "gain", f"+{form}")]
            lines.append(ROW.format(*names, way, *cells, share_cell(moving["frames"][way], "share")))
            names = ["", ""]
    lines.append("where something moves, in so many videos; sharpness: the median; ±: the 95% interval's wider half")
    if num_beyond := sum(group["num_without_target"] for group in summary):
        lines.append(f"{num_beyond} of the predicted frames lie beyond the end of their video: not scored")
    of_several = any("expected" in group["moving"]["frames"] for group in summary)
    return "\n".join([*lines, *(rollout_verdict(summary, way) for way in PREDICTED[: 1 + of_several])])


def rollout_verdict(summary: Sequence[dict[str, Any]], way: str) -> str:
    """One sentence on the horizons up to which a way of predicting has a PSNR clearly above copying's."""
    horizons = [group["horizon"] for group in summary]
    better = [group["horizon"] for group in summary if is_clearly_better(group, way)]
    name = {"sample": "prediction", "expected": "expected frame"}[way]
    what = f"where something moves the {name}'s PSNR is above copying's, with an interval clear of zero,"
    if not better:
        return f"{what} at none of the {len(horizons)} horizons"
    if better == horizons[: len(better)]:
        return f"{what} up to horizon {better[-1]} of {horizons[-1]}"
    return f"{what} at these horizons alone: {', '.join(map(str, better))}"


def is_clearly_better(group: dict[str, Any], way: str) -> bool:
    """Whether the interval of the PSNR that a way gains over copying, where something moves, is above zero."""
    figures = group["moving"]["psnr"].get(way)  # nothing where nothing moves
    return bool(figures and figures["gain_interval"]) and figures["gain_interval"][0] > 0
