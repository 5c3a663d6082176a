"""Clips as video files, rendered and encoded by several processes. PyAV is loaded in the processes that encode."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from data.cli import UserError
from data.files import whole_or_absent
from data.paths import video_path
from data.video_loader import start_worker
from demo.renderer.clip import plan_clip, render_clip
from demo.renderer.scene import FPS, FRAME_HEIGHT, FRAME_WIDTH


def render_to_files(data_dir: Path, seed: int, clips: list[tuple[str, int]], num_workers: int) -> Iterator[int]:
    """Render clips, each a (split, index), in worker processes; yield each one's number of frames once it is done."""
    if num_workers == 1 or len(clips) <= 1:
        for split, index in clips:
            yield _render_to_file(data_dir, seed, split, index)
        return
    pool = ProcessPoolExecutor(min(num_workers, len(clips)), get_context("spawn"), prepare_worker)
    try:
        jobs = [pool.submit(_render_to_file, data_dir, seed, split, index) for split, index in clips]
        for job in as_completed(jobs):
            yield job.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a rendering process was killed (out of memory?); run the same command again, perhaps with "
            "--num_workers 1: finished clips are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """A worker uses one core, leaves Ctrl-C to its parent, and ends when the parent is gone."""
    cv2.setNumThreads(1)
    start_worker()


def _render_to_file(data_dir: Path, seed: int, split: str, index: int) -> int:
    """Render one clip to its place and return its number of frames."""
    annotation, frames = render_clip(seed, split, index)
    with whole_or_absent(video_path(data_dir, annotation["id"])) as partial:
        _encode(partial, frames)
    return plan_clip(seed, split, index).num_frames


def _encode(path: Path, frames: Iterator[np.ndarray]) -> None:
    """Write uint8 RGB frames as VP9 in WebM.

    PyAV is used because OpenCV's VideoWriter cannot set the encoder's speed (it takes 100 ms a frame).
    """
    import av

    options = {"deadline": "realtime", "cpu-used": "8", "crf": "26", "lag-in-frames": "0", "flags": "+bitexact"}
    with av.open(str(path), "w", format="webm", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = FRAME_WIDTH, FRAME_HEIGHT, "yuv420p"
        stream.codec_context.bit_rate, stream.codec_context.thread_count = 0, 1
        for frame in frames:
            planes = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)  # quicker than the encoder's own conversion
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
