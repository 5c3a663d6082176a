"""The frames that the demo's base model is pre-trained on: every frame of many clips, in files of the work folder.

The clips are of `demo.make_clips`' "pretrain" split and of a seed of their own, so none of them is ever in a
rendered data directory. They are used as rendered, without a video's compression: at 96 and 128 pixels,
averaged down from 320 x 240, little of it is left, and a codec would take longer than the renderer.
This module imports no torch, so that worker processes start at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.cli import UserError, available_cores
from data.stored_array import stored_array
from demo.renderer.clip import plan_clip, render_clip
from demo.renderer.video import prepare_worker

CLIP_SEED = 20_221_109  # far from make_clips' default, 42
NUM_HELD_OUT_CLIPS = 24  # the split's first clips; training uses those that follow
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
    """The clips of one size, and in `rows` all their frames, clip by clip, held-out ones first; read from a file.

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
    """Which clips of the split are rendered with `side` pixels: held-out ones (few for a short trial), training's."""
    held_out = range(min(NUM_HELD_OUT_CLIPS, max(2, num_clips // 10)))
    cycle = len(RESOLUTION_CYCLE)
    return list(held_out), [
        NUM_HELD_OUT_CLIPS + place for place in range(num_clips) if RESOLUTION_CYCLE[place % cycle] == side
    ]


def rendered_clips(work_dir: Path, num_clips: int, side: int) -> StoredClips:
    """The clips of one size, rendered where the work folder does not hold them yet."""
    held_out, training = clip_indices(side, num_clips)
    clips, first_row = [], 0
    for index in held_out + training:
        plan = plan_clip(CLIP_SEED, "pretrain", index)
        clips.append(Clip(plan.annotation["label"], plan.action.template, plan.num_frames, first_row))
        first_row += plan.num_frames
    path = work_dir / f"frames-{side}-of-{num_clips}-clips.npy"

    def rows_from(done: int) -> Iterator[np.ndarray]:
        missing = [place for place, clip in enumerate(clips) if clip.first_row + clip.num_frames > done]
        for place, frames in zip(missing, render_all([(held_out + training)[place] for place in missing], side)):
            yield frames[max(0, done - clips[place].first_row) :]

    rows = stored_array(path, np.uint8, (first_row, side, side, 3), rows_from)
    return StoredClips(clips[: len(held_out)], clips[len(held_out) :], rows)


def render_all(indices: Sequence[int], side: int) -> Iterator[np.ndarray]:
    """`render_frames` of each clip in turn, from worker processes on all cores."""
    pool = ProcessPoolExecutor(available_cores(), get_context("spawn"), prepare_worker)
    try:
        rendered = pool.map(render_frames, indices, repeat(side), chunksize=4)
        yield from tqdm(rendered, total=len(indices), desc=f"rendering at {side} pixels", unit="clip")
    except BrokenProcessPool as error:
        raise UserError("a rendering process was killed (out of memory?); run the same command again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def render_frames(index: int, side: int) -> np.ndarray:
    """All frames of one clip, uint8 RGB (F, side, side, 3): averaged down to a square, as `data.video_loader` does."""
    _, frames = render_clip(CLIP_SEED, "pretrain", index)
    return np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames])


def pick_size(sizes: Sequence[StoredClips], rng: np.random.Generator) -> StoredClips:
    """The clips of one size, since a batch holds one; each as often as training clips have it."""
    counts = np.array([len(stored.training) for stored in sizes], float)
    return sizes[rng.choice(len(sizes), p=counts / counts.sum())]
