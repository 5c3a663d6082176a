"""The frames that the demo's base model is pre-trained on: every frame of many clips, in files of the work folder.

The clips have a split and a seed of their own, so none of them is in a data directory of `demo.make_clips`. They are
not compressed as videos: little of that is visible at 96 and 128 pixels, and a codec takes longer than the renderer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from demo.renderer.clip import plan_clip, render_clip
from pecn.encoded_frames import stored_array

CLIP_SEED = 20_221_109  # far from make_clips' default, 42
NUM_HELD_OUT_CLIPS = 24  # the split's first clips; the following ones are trained on
RESOLUTIONS = (96, 128)
RESOLUTION_CYCLE = (96,) * 7 + (128,)  # the training clips' sizes in turn: mostly the quick test's


@dataclass(frozen=True)
class Clip:
    """One clip and where it lies: its frames are the rows from `first_row` on."""

    label: str
    template: str
    num_frames: int
    first_row: int


@dataclass(frozen=True)
class StoredClips:
    """The clips of one size, and in `rows` all their frames, held-out clips first; `rows` is read from a file.

    Frames are uint8 RGB (N, R, R, 3), or float16 latents (N, 2 C, R / f, R / f) for a VAE that divides by f: the
    posterior's means and log variances, not scaled.
    """

    held_out: list[Clip]
    training: list[Clip]
    rows: np.ndarray

    @property
    def training_rows(self) -> range:
        return range(sum(clip.num_frames for clip in self.held_out), len(self.rows))


def clip_indices(side: int, num_clips: int) -> tuple[list[int], list[int]]:
    """Which clips of the split are rendered with `side` pixels: the held-out ones, and those to train on."""
    held_out = range(min(NUM_HELD_OUT_CLIPS, max(2, num_clips // 10)))
    cycle = len(RESOLUTION_CYCLE)
    return list(held_out), [
        NUM_HELD_OUT_CLIPS + place for place in range(num_clips) if RESOLUTION_CYCLE[place % cycle] == side
    ]


def rendered_clips(work_dir: Path, num_clips: int, side: int) -> StoredClips:
    """The clips of one size; rendered if the work folder does not have them."""
    held_out, training = clip_indices(side, num_clips)
    clips, first_row = [], 0
    for index in held_out + training:
        plan = plan_clip(CLIP_SEED, "pretrain", index)
        clips.append(Clip(plan.annotation["label"], plan.action.template, plan.num_frames, first_row))
        first_row += plan.num_frames
    path = work_dir / f"frames-{side}-of-{num_clips}-clips.npy"
    progress = tqdm(held_out + training, desc=f"rendering at {side} pixels", unit="clip", disable=path.is_file())
    blocks = (render_frames(index, side) for index in progress)
    rows = stored_array(path, np.uint8, (first_row, side, side, 3), blocks)
    return StoredClips(clips[: len(held_out)], clips[len(held_out) :], rows)


def render_frames(index: int, side: int) -> np.ndarray:
    """All frames of one clip, uint8 RGB (F, side, side, 3): resized by area averaging, as `data.video_loader` does."""
    _, frames = render_clip(CLIP_SEED, "pretrain", index)
    return np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames])


def pick_size(sizes: Sequence[StoredClips], rng: np.random.Generator) -> StoredClips:
    """The clips of a random size, in proportion to the number of training clips; a batch has one size."""
    counts = np.array([len(stored.training) for stored in sizes], float)
    return sizes[rng.choice(len(sizes), p=counts / counts.sum())]
