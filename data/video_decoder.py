"""Turn one video into folders of square PNG frames, or say why that is impossible.

`extract_video` is what the worker processes of `data.video_loader` run.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.layout import UserError, frame_path, frames_dir, video_path

if TYPE_CHECKING:
    import av
    import numpy as np

PARTIAL_SUFFIX = ".partial"  # `.<id>.partial`: being written
OUTDATED_SUFFIX = ".outdated"  # `.<id>.outdated`: replaced, about to be deleted
# Video containers only: without the list a picture would count as a video of one frame, and a text file
# could be a playlist that makes FFmpeg open other files.
VIDEO_FORMATS = "matroska,webm,mov,mp4,avi"
FULL_CHROMA = 0x2000  # swscale's SWS_FULL_CHR_H_INT: colour at full horizontal resolution


@dataclass(frozen=True)
class Job:
    """One video to decode: the sizes (pixels) to write, out of all the sizes asked for.

    `kept_frames` is the number of frames in the folders of the other sizes, or None if there are none.
    """

    video_id: str
    data_dir: Path
    resolutions: tuple[int, ...]
    all_resolutions: tuple[int, ...]
    kept_frames: int | None


@dataclass(frozen=True)
class Result:
    """What became of a video: its number of frames, or the kind of failure and its details."""

    video_id: str
    num_frames: int | None = None
    failure: str | None = None
    details: str = ""


class VideoError(Exception):
    """A video that cannot be extracted. Arguments: the kind of failure (for counting) and the details."""


@functools.cache
def import_cv2():
    """Import OpenCV on one thread: the workers are the parallelism."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"OpenCV cannot be loaded ({error}); pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


@functools.cache
def import_av():
    """Import PyAV, silent: the reasons given for a failure are ours."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"PyAV cannot be loaded ({error}); pip install av") from None
    av.logging.set_level(None)
    return av


def extract_video(job: Job) -> Result:
    """Decode one video and publish its folders of frames. Failures of the video are returned, not raised."""
    folders = {resolution: frames_dir(job.data_dir, resolution) for resolution in job.resolutions}
    partials = {resolution: folder / f".{job.video_id}{PARTIAL_SUFFIX}" for resolution, folder in folders.items()}
    try:
        for partial in partials.values():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        num_frames = write_frames(video_path(job.data_dir, job.video_id), partials)
        if job.kept_frames in (None, num_frames):
            for resolution, folder in folders.items():
                publish(partials[resolution], folder / job.video_id)
            return Result(job.video_id, num_frames)
    except VideoError as error:
        failure, details = error.args
        return Result(job.video_id, failure=failure, details=details)
    finally:
        for partial in partials.values():
            shutil.rmtree(partial, ignore_errors=True)
    # The folders that were kept come from another version of this video: all sizes must come from this one.
    return extract_video(Job(job.video_id, job.data_dir, job.all_resolutions, job.all_resolutions, None))


def write_frames(path: Path, folders: dict[int, Path]) -> int:
    """Decode a video and write each frame, resized to R x R, as `<index>.png` into `folders[R]`.

    Frames are resized by area averaging without keeping the aspect ratio, and stored as 8-bit RGB. Returns
    the number of frames. Raises VideoError if the file is not a whole video, OSError if a frame cannot be
    written.
    """
    resizers = {resolution: make_resizer(resolution) for resolution in folders}
    num_frames = 0
    for frame in decode_video(path):
        for resolution, folder in folders.items():
            png = encode_png(resizers[resolution](frame))
            with open(frame_path(folder.parent, folder.name, num_frames), "wb") as file:
                file.write(png)
        num_frames += 1
    return num_frames


def decode_video(path: Path) -> Iterator[av.VideoFrame]:
    """Yield a video's frames in the order they are shown, decoded on one thread.

    Raises VideoError, perhaps after frames that are whole, if the file is not a video or not a whole one.
    """
    av = import_av()
    cut_short = check_file(path)
    try:
        container = av.open(str(path), options={"format_whitelist": VIDEO_FORMATS})
    except av.FFmpegError:
        raise VideoError("not a video", "the file is no video container; download it again") from None
    with container:
        if not container.streams.video:
            raise VideoError("not a video", "there is no video stream in the file; download it again")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError("not decodable", "there is no decoder for its codec; convert it to VP9")
        stream.codec_context.thread_count = 1
        frames_per_second = float(stream.guessed_rate or 0)
        start = float((stream.start_time or 0) * stream.time_base)
        times = []  # seconds; 8 bytes a frame
        failure = ""
        try:
            for frame in container.decode(stream):
                unstated = len(times) / (frames_per_second or 1)
                times.append(unstated if frame.time is None else frame.time - start)
                yield frame
        except av.FFmpegError as error:
            failure = error.strerror
        if not times:
            raise VideoError("no frames", "the file opens as a video, but not one frame decodes; download it again")
        length = (container.duration or 0) / av.time_base - start  # a container's duration counts from time 0
        claimed_frames = stream.frames or round(length * frames_per_second)
        check_duration(times, claimed_frames, frames_per_second, cut_short)
        if failure:
            raise VideoError("not decodable", f"{failure} after {len(times)} frames; download it again")


def make_resizer(resolution: int) -> Callable[[av.VideoFrame], np.ndarray]:
    """A function that turns decoded frames of one video into uint8 BGR arrays of shape (R, R, 3), by area averaging.

    Where a frame shrinks, FFmpeg averages its planes of brightness and colour before it makes BGR of them. That
    is several times faster than averaging the full-size BGR picture, and on average closer to the exact result: off
    by 0.3 to 0.6 of 255 and unbiased, where OpenCV's route is 1.1 too dark. A few pixels at sharp edges of saturated
    colours are off by up to 20, OpenCV's by up to 3. Where a frame grows, OpenCV resizes the full-size picture,
    since FFmpeg's area method does not interpolate.
    """
    cv2, av = import_cv2(), import_av()
    area = int(av.video.reformatter.Interpolation.AREA) | FULL_CHROMA
    shrinking, converting = av.video.reformatter.VideoReformatter(), av.video.reformatter.VideoReformatter()

    def resize(frame: av.VideoFrame) -> np.ndarray:
        if min(frame.width, frame.height) >= resolution:
            small = shrinking.reformat(frame, resolution, resolution, "bgr24", interpolation=area, threads=1)
            image = small.to_ndarray()
        else:
            large = converting.reformat(frame, format="bgr24", interpolation="BICUBIC", threads=1).to_ndarray()
            image = cv2.resize(large, (resolution, resolution), interpolation=cv2.INTER_AREA)
        for _ in range(frame.rotation // 90 % 4):  # the container says how the camera was held
            image = cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)
        return image

    return resize


def encode_png(image: np.ndarray) -> np.ndarray:
    """A uint8 BGR picture as the bytes of an RGB PNG."""
    cv2 = import_cv2()
    # The fastest of OpenCV's PNG settings here and 6% smaller than the default: no search for repeated
    # strings, and each pixel predicted from the one above.
    options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    return cv2.imencode(".png", image, [*options, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP])[1]


def check_file(path: Path) -> bool:
    """Raise VideoError if a file cannot be a video at all. Returns whether a WebM file was cut short."""
    try:
        if not path.is_file():  # checked before opening: a pipe would block
            if path.is_symlink() and not path.exists():
                raise VideoError("missing", f"a link to {os.readlink(path)}, which does not exist")
            raise VideoError("not a file", "a folder or a special file has the video's name")
        size = path.stat().st_size
        if size == 0:
            raise VideoError("empty", "the file has 0 bytes; download it again")
        with open(path, "rb") as file:
            return webm_length(file.read(64)) > size
    except OSError as error:
        raise VideoError("unreadable", f"the file cannot be read: {error.strerror}") from None


def webm_length(head: bytes) -> int:
    """The length in bytes that a WebM (Matroska) file states for itself, or 0 if it states none.

    `head` is the beginning of the file: an EBML header and a Segment, each an id followed by a size (RFC
    8794, section 4: the leading zeros of a size's first byte give its length in bytes; all ones mean
    "unknown").
    """

    def element_end(offset: int, element_id: bytes) -> int:
        start = offset + len(element_id)
        if head[offset:start] != element_id or start >= len(head) or head[start] == 0:
            return 0
        length = 9 - head[start].bit_length()
        unknown = (1 << 7 * length) - 1
        size = int.from_bytes(head[start : start + length], "big") & unknown
        return 0 if size == unknown else start + length + size

    header_end = element_end(0, b"\x1a\x45\xdf\xa3")
    return element_end(header_end, b"\x18\x53\x80\x67") if header_end else 0


def check_duration(times: list[float], claimed_frames: float, frames_per_second: float, cut_short: bool) -> None:
    """Raise VideoError if the frames end clearly before the container's duration does.

    times: when each decoded frame is shown, in seconds. The container's duration is `claimed_frames /
    frames_per_second`. Counting frames would not do, since the claim is too
    high where the frame rate varies. The last frame may end earlier than the duration by one and a half
    times the longest gap between frames (half a frame if the file is shorter than it states itself, so that
    a single lost frame shows). A container that states no duration, as a live recording, cannot be checked.
    A sound track that goes on long after the pictures makes a video look truncated; SSv2 has no sound.
    """
    if not (claimed_frames > 0 and frames_per_second > 0):
        return
    interval = 1 / frames_per_second
    gaps = (later - earlier for earlier, later in zip(times[:-1], times[1:], strict=True))
    longest_gap = max(gaps, default=interval)
    tolerance = 0.5 * interval if cut_short else 1.5 * max(longest_gap, interval)
    end, duration = times[-1] + interval, claimed_frames * interval
    if duration - end > tolerance:
        raise VideoError(
            "truncated", f"frames end at {end:.2f} s of {duration:.2f} s ({len(times)} frames); download it again"
        )


def publish(partial: Path, final: Path) -> None:
    """Rename a whole folder of frames to its final name, in place of an inconsistent one if there is one."""
    outdated = final.with_name(f".{final.name}{OUTDATED_SUFFIX}")
    if final.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        os.rename(final, outdated)
    os.rename(partial, final)
    shutil.rmtree(outdated, ignore_errors=True)
