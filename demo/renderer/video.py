"""Clips as video files, rendered and encoded by several processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import av
import cv2
import numpy as np

from data.cli import UserError
from data.files import whole_or_absent
from data.paths import video_path
from demo.renderer.clip import render_clip
from demo.renderer.scene import FPS, FRAME_HEIGHT, FRAME_WIDTH


def render_to_files(data_dir: Path, seed: int, clips: list[tuple[str, int]], num_workers: int) -> Iterator[None]:
    """Render clips, each a (split, index), in worker processes; yield once for each finished clip."""
    arguments = (repeat(data_dir), repeat(seed), clips)
    if num_workers == 1 or len(clips) <= 1:
        yield from map(render_to_file, *arguments)
        return
    # Processes, as most of the work holds Python's lock.
    pool = ProcessPoolExecutor(min(num_workers, len(clips)), get_context("spawn"), prepare_worker)
    try:
        yield from pool.map(render_to_file, *arguments)
    except BrokenProcessPool as error:
        raise UserError(f"{error} Run the same command again; finished clips are kept") from error
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_worker() -> None:
    """A worker uses one core, ignores Ctrl-C, which the main process handles, and ends with the main process."""

    def exit_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def render_to_file(data_dir: Path, seed: int, clip: tuple[str, int]) -> None:
    """Render one clip (split, index) to `videos/<id>.webm`."""
    annotation, frames = render_clip(seed, *clip)
    with whole_or_absent(video_path(data_dir, annotation["id"])) as partial:
        encode_video(partial, frames)


def encode_video(path: Path, frames: Iterator[np.ndarray]) -> None:
    """Write uint8 RGB frames as VP9 in WebM. OpenCV's VideoWriter cannot set the encoder's speed (100 ms a frame).

    One thread, and neither a date nor a random identifier: the same frames make the same bytes.
    """
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "26", "lag-in-frames": "0", "flags": "+bitexact"}
    with av.open(str(path), "w", format="webm", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = FRAME_WIDTH, FRAME_HEIGHT, "yuv420p"
        stream.codec_context.bit_rate, stream.codec_context.thread_count = 0, 1
        for frame in frames:
            planes = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)  # quicker than the encoder's own conversion
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
