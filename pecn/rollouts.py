"""Rollouts: how a video goes on from one frame, predicted frame by frame, and how good that is at each horizon.

*Direct* predicts every frame from the start frame, for a model whose prompts tell the horizon; *chained* takes each
prediction as the input of the next one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    """A video's frames at each of `horizons` frames after `start`, uint8 RGB (H, W, 3)."""

    clip: Clip
    horizons: Sequence[int]
    edit_prompts: Sequence[str]  # one for each horizon
    start: np.ndarray
    truths: Sequence[np.ndarray | None]  # None where the video has ended
    predictions: list[PredictedFrame]

    def rows(self) -> list[dict[str, Any]]:
        """For each horizon what `score_prediction` returns; the copy is the start frame."""
        rows = []
        for horizon, prompt, truth, predicted in zip(self.horizons, self.edit_prompts, self.truths, self.predictions):
            prediction = Prediction(self.clip.video_id, self.clip.task, prompt, self.start, predicted, truth)
            rows.append({"horizon": horizon, **score_prediction(prediction)})
        return rows


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
            rollouts = [start_rollout(clip, choice, mode) for clip in clips[first : first + at_once]]
            images = [rollout.start for rollout in rollouts]
            for place, horizon in enumerate(choice.horizons):
                prompts = [rollout.edit_prompts[place] for rollout in rollouts]
                seeds = [derive_seed(seed, rollout.clip.video_id, "rollout", horizon) for rollout in rollouts]
                predicted = predict_frames(pipeline, images, prompts, seeds, options)
                if None in predicted:
                    raise UserError(f"a prediction {horizon} frames after the start is not finite")
                for rollout, frame in zip(rollouts, predicted):
                    rollout.predictions.append(frame)
                if mode == "chained":
                    images = [frame.sample for frame in predicted]
                progress_bar.update(len(rollouts))
            yield from rollouts


def start_rollout(clip: Clip, choice: FrameChoice, mode: str) -> Rollout:
    """A rollout that has its prompts and true frames, but as yet no prediction.

    Chained, prompts tell the step, and the progress of the frame that is the input; that of the last true frame once
    the video has ended, as training knows none beyond.
    """
    start, last = clip.frames[0], clip.frames[-1]
    prompts = []
    for horizon in choice.horizons:
        ahead = choice.horizons[0] if mode == "chained" else horizon
        prompts.append(clip.prompt(min(start + horizon - ahead, last), ahead if choice.tell_horizon else None))
    indices = [start + horizon for horizon in choice.horizons]
    truths = [load_picture(clip.path(index)) if index in clip.frame_set else None for index in indices]
    return Rollout(clip, choice.horizons, prompts, load_picture(clip.path(start)), truths, predictions=[])


# Films and filmstrips.


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
    for horizon, frame, truth in zip(rollout.horizons, rollout.predictions, rollout.truths):
        predictions.append((f"prediction +{horizon}", frame.sample))
        truths.append((f"truth +{horizon}", truth) if truth is not None else (f"+{horizon}, ended", truths[-1][1]))
    return [predictions, truths] if any(truth is not None for truth in rollout.truths) else [predictions]
