"""Rollouts: how a video goes on from one frame, predicted frame by frame, and how good that is at each horizon.

*Direct* predicts every frame from the start frame, for a model whose prompts tell the horizon; *chained* takes each
prediction as the input of the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

from data.cli import UserError
from data.clips import DEFAULT_INPUT_FRAME_IDX, Clip, FrameChoice, derive_seed
from data.video_decoder import load_picture
from pecn.model import Pipeline
from pecn.pictures import Panel, panel_row, save_gif, save_picture, sheet
from pecn.sampling import PredictedFrame, Prediction, predict_frames
from pecn.sampling_options import DEFAULT_OPTIONS, SamplingOptions
from pecn.scores import score_prediction

FRAMES_PER_SECOND, PAUSE = 4, 1.5  # of films, slow enough to be looked at; seconds, on a gif's last frame


@dataclass(frozen=True)
class Rollout:
    """How a video goes on from `start`, uint8 RGB (H, W, 3): predictions by how many frames after it they lie."""

    clip: Clip
    start: np.ndarray
    predictions: dict[int, Prediction] = field(default_factory=dict)

    def add(self, horizon: int, edit_prompt: str, predicted: PredictedFrame) -> None:
        """Puts the next frame beside the true one, where the video has it. Copying means the start frame."""
        clip, index = self.clip, self.clip.frames[0] + horizon
        truth = load_picture(clip.path(index)) if index in clip.frame_set else None
        self.predictions[horizon] = Prediction(clip.video_id, clip.task, edit_prompt, self.start, predicted, truth)

    def rows(self) -> list[dict[str, Any]]:
        """For each horizon what `score_prediction` returns."""
        return [{"horizon": horizon, **score_prediction(one)} for horizon, one in self.predictions.items()]


def rollout_choice(choice: FrameChoice, num_frames: int, mode: str) -> FrameChoice:
    """What a rollout of `num_frames` frames predicts with a model that offers the horizons of `choice`.

    "chained" steps by the shortest of them, "direct" goes on from it frame by frame. Any start becomes
    DEFAULT_INPUT_FRAME_IDX. Raises UserError where the prompts of a direct rollout would not differ, and where not even
    the shortest horizon lies within the rollout.
    """
    if mode == "direct" and not choice.tell_horizon:
        raise UserError("the model's prompts tell no horizon: only ROLLOUT_MODE=chained is possible")
    shortest = choice.horizons[0]
    horizons = range(shortest, num_frames + 1, shortest if mode == "chained" else 1)
    if not horizons:
        raise UserError(f"the model predicts {shortest} frames ahead: set ROLLOUT to {shortest} or more")
    return replace(choice, start=DEFAULT_INPUT_FRAME_IDX if choice.start is None else choice.start, horizons=horizons)


def roll_out(
    pipeline: Pipeline,
    clips: Sequence[Clip],
    choice: FrameChoice,
    mode: str,
    seed: int,
    batch_size: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> Iterator[Rollout]:
    """Predicts `choice.horizons` from the first of each clip's frames, `batch_size` pictures at once.

    Where a video ends before the rollout does, the rest is predicted but not scored. Each video and horizon has its own
    noise seed, so that the batch size changes nothing.
    """
    at_once = max(1, batch_size // options.num_predictions)
    with tqdm(total=len(clips) * len(choice.horizons), desc="Predicting", unit="frame") as progress_bar:
        for first in range(0, len(clips), at_once):
            some = clips[first : first + at_once]
            rollouts = [Rollout(clip, load_picture(clip.path(clip.frames[0]))) for clip in some]
            images = [rollout.start for rollout in rollouts]
            for horizon in choice.horizons:
                ahead = choice.horizons[0] if mode == "chained" else horizon
                # The input's progress; the last true frame's once a video has ended, as training knows none beyond.
                inputs = [min(clip.frames[0] + horizon - ahead, clip.frames[-1]) for clip in some]
                told = ahead if choice.tell_horizon else None
                prompts = [clip.prompt(frame, told) for clip, frame in zip(some, inputs)]
                seeds = [derive_seed(seed, clip.video_id, "rollout", horizon) for clip in some]
                predicted = predict_frames(pipeline, images, prompts, seeds, options)
                if None in predicted:
                    raise UserError(f"a prediction {horizon} frames after the start is not finite")
                for rollout, prompt, frame in zip(rollouts, prompts, predicted):
                    rollout.add(horizon, prompt, frame)
                if mode == "chained":
                    images = [frame.sample for frame in predicted]
                progress_bar.update(len(rollouts))
            yield from rollouts


def save_rollout(folder: Path, rollout: Rollout) -> None:
    """Writes rollout.mp4 and rollout.gif, truth to the left and prediction to the right, and filmstrip.png."""
    folder.mkdir(parents=True)
    frames = film(rollout)
    height, width = (side // 2 * 2 for side in frames.shape[1:3])  # what H.264 needs
    even = frames[:, :height, :width]
    iio.imwrite(folder / "rollout.mp4", even, plugin="pyav", codec="libx264", fps=FRAMES_PER_SECOND)
    save_film(folder / "rollout.gif", frames)
    save_picture(folder / "filmstrip.png", filmstrip(rollout))


def save_film(path: Path, frames: np.ndarray) -> None:
    """Writes a film as a GIF."""
    save_gif(path, frames, [1 / FRAMES_PER_SECOND] * (len(frames) - 1) + [PAUSE])


def film(rollout: Rollout) -> np.ndarray:
    """Its frames from the start on, the truth to the left where there is one: uint8 RGB (N, H, W, 3)."""
    return np.stack([panel_row(row) for row in zip(*reversed(strips(rollout)))])


def filmstrip(rollout: Rollout) -> np.ndarray:
    """All frames side by side, the truth below the prediction where there is one: uint8 RGB."""
    predictions, *truths = strips(rollout)
    return sheet([panel_row(predictions, [rollout.clip.label]), *map(panel_row, truths)])


def strips(rollout: Rollout) -> list[list[Panel]]:
    """The predicted frames and, where any is known, the true ones; a video that has ended shows its last frame."""
    predictions, truths = [("start", rollout.start)], [("start", rollout.start)]
    for horizon, one in rollout.predictions.items():
        predictions.append((f"prediction +{horizon}", one.predicted.sample))
        ended = (f"+{horizon}, ended", truths[-1][1])
        truths.append(ended if one.target is None else (f"truth +{horizon}", one.target))
    is_known = any(one.target is not None for one in rollout.predictions.values())
    return [predictions, truths] if is_known else [predictions]
