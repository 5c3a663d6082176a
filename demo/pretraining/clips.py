"""The frames that the demo's base model is pre-trained on, rendered in memory.

The clips are of `demo.make_clips`' "pretrain" split and of a seed of their own, so none of them is ever in a
rendered data directory. They are used as rendered, without a video's compression: at 96 and 128 pixels,
averaged down from 320 x 240, little of it is left, and a codec would take longer than the renderer.
This module imports no torch, so that worker processes start at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import cv2
import numpy as np
from tqdm import tqdm

from demo.renderer.clip import plan_clip, render_clip

CLIP_SEED = 20_221_109  # far from make_clips' default, 42
NUM_HELD_OUT_CLIPS = 24  # the split's first clips; training uses those that follow
RESOLUTIONS = (96, 128)
RESOLUTION_CYCLE = (96,) * 7 + (128,)  # the training clips' sizes in turn: mostly the quick test's
# A Golomb ruler: the marks are 1, 2, 3, 4, 5, 7, 8, 9, 10 and 11 frames apart, so few frames make many pairs.
FRAME_RULER = (0, 1, 4, 9, 11)
RULERS_PER_CLIP = 2


@dataclass
class ClipFrames:
    """Some frames of one clip: `frames` is uint8 RGB (len(indices), R, R, 3), in the order of `indices`."""

    label: str
    num_frames: int
    indices: list[int]
    frames: np.ndarray

    @property
    def resolution(self) -> int:
        return self.frames.shape[1]


def choose_frames(index: int, num_frames: int) -> list[int]:
    """The frames of clip `index` to train on: the ruler's marks from `RULERS_PER_CLIP` random starts."""
    rng = np.random.default_rng([CLIP_SEED, index])
    starts = rng.integers(0, num_frames - FRAME_RULER[-1], RULERS_PER_CLIP)
    return sorted({int(start) + mark for start in starts for mark in FRAME_RULER})


def render_frames(index: int, resolutions: Sequence[int]) -> list[ClipFrames]:
    """The frames of `choose_frames` of clip `index`, at each size, resized as `data.video_loader` does."""
    cv2.setNumThreads(1)
    num_frames = plan_clip(CLIP_SEED, "pretrain", index).num_frames
    wanted = choose_frames(index, num_frames)
    annotation, rendered = render_clip(CLIP_SEED, "pretrain", index)
    frames = [frame for position, frame in enumerate(islice(rendered, wanted[-1] + 1)) if position in wanted]
    resized = [np.stack([resize(frame, side) for frame in frames]) for side in resolutions]
    return [ClipFrames(annotation["label"], num_frames, wanted, pictures) for pictures in resized]


def resize(frame: np.ndarray, side: int) -> np.ndarray:
    """`frame` averaged down to a square of `side` pixels; its aspect ratio is not kept."""
    return cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA)


def render_held_out_clips(count: int) -> list[ClipFrames]:
    """The first `count` clips at every size; at most NUM_HELD_OUT_CLIPS, which no training clip is among."""
    indices = range(min(count, NUM_HELD_OUT_CLIPS))
    return _render_all(indices, [RESOLUTIONS] * len(indices), "rendering held-out clips")


def render_training_clips(count: int) -> list[ClipFrames]:
    """`count` clips, each at one size, by RESOLUTION_CYCLE."""
    indices = range(NUM_HELD_OUT_CLIPS, NUM_HELD_OUT_CLIPS + count)
    sizes = [(RESOLUTION_CYCLE[index % len(RESOLUTION_CYCLE)],) for index in range(count)]
    return _render_all(indices, sizes, "rendering training clips")


def _render_all(indices: Sequence[int], resolutions: Sequence[tuple[int, ...]], description: str) -> list[ClipFrames]:
    """`render_frames` of each index at its sizes, in worker processes, one per core."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rendered = pool.map(render_frames, indices, resolutions, chunksize=4)
        progress = tqdm(rendered, total=len(indices), desc=description, unit="clip")
        return [clip for clips in progress for clip in clips]
