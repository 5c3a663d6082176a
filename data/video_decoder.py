"""Decode one video and write its frames as square PNGs, or say why that is impossible; read a picture like a frame."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageOps

from data.cli import UserError, one_line
from data.paths import VIDEO_EXTENSIONS, frame_path

# Video containers only: without the list a picture would count as a video of one frame, and a text file could be a
# playlist that makes FFmpeg open other files.
VIDEO_FORMATS = "matroska,webm,mov,mp4,avi"
CODEC_NOISE = 12  # of 255, the most by which a repeated frame differs at 48 x 48 pixels; others of SSv2 differ by more
FULL_CHROMA = 0x2000  # swscale's SWS_FULL_CHR_H_INT: color at full horizontal resolution

av.logging.set_level(None)  # a failure is reported once, by a VideoError
cv2.setNumThreads(1)  # videos are decoded in parallel


class VideoError(Exception):
    """A video that cannot be extracted. Arguments: the kind of failure (for counting) and the details."""


def write_frames(path: Path, folders: dict[int, Path]) -> tuple[int, float]:
    """Decode a video, or a folder of pictures, and write each frame, R x R, as `<index>.png` into the new `folders[R]`.

    Frames are resized by area averaging without keeping the aspect ratio, and stored as 8-bit RGB. Returns their number
    and, if over a third repeat the one before, their rate, else 0. Raises VideoError, or OSError in writing.
    """
    resizers = {resolution: make_resizer(resolution) for resolution in folders}
    for folder in folders.values():
        folder.mkdir()
    num_repeated, before = 0, None
    frames = decode_video(path) if path.suffix in VIDEO_EXTENSIONS else map(picture_frame, sorted(path.glob("[!.]*")))
    for index, frame in enumerate(frames):
        for resolution, folder in folders.items():
            image = resizers[resolution](frame)
            with open(frame_path(folder.parent, folder.name, index), "wb") as file:
                file.write(encode_png(image))
        small = cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA)
        num_repeated += before is not None and cv2.norm(small, before, cv2.NORM_INF) <= CODEC_NOISE
        before = small
    rate = index / frame.time if frame.time else 0  # a picture has no time
    return index + 1, rate if num_repeated > index / 3 else 0  # a video without frames is a VideoError


def decode_video(path: Path) -> Iterator[av.VideoFrame]:
    """Yield a video's frames in the order they are shown, decoded on one thread.

    Raises VideoError, perhaps after frames that are whole, if the file is not a video or not a whole one.
    """
    if not path.is_file():  # a pipe would block when opened
        raise VideoError("missing", f"there is no file {path.resolve()}")
    times = []  # seconds; 8 bytes a frame
    try:
        with av.open(str(path), options={"format_whitelist": VIDEO_FORMATS}) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise VideoError("unreadable", "it has no video stream that can be decoded")
            stream.codec_context.thread_count = 1
            interval = 1 / float(stream.guessed_rate or 1)  # seconds from frame to frame
            start = float((stream.start_time or 0) * stream.time_base)
            for frame in container.decode(stream):
                times.append(len(times) * interval if frame.time is None else frame.time - start)
                yield frame
            if not times:
                raise VideoError("unreadable", "not one of its frames can be decoded; download it again")
            if stream.guessed_rate:
                # A container's duration counts from time 0. With sound, which often ends later, it says nothing.
                duration = 0 if container.streams.audio else (container.duration or 0) / av.time_base - start
                check_duration(times, stream.frames * interval or duration, interval)
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"{error.strerror} after {len(times)} frames; download it again") from None


def check_duration(times: list[float], duration: float, interval: float) -> None:
    """Raise VideoError if the frames end clearly before the container's duration does.

    times: when each decoded frame is shown, in seconds from the first; `interval` is the time between two at the
    container's frame rate. As that may vary, half as much again as the longest gap may be missing at the end, so one
    lost frame may go unnoticed.
    """
    longest_gap = max((later - earlier for earlier, later in itertools.pairwise(times)), default=0)
    end = times[-1] + interval
    if duration - end > 1.5 * max(longest_gap, interval):
        details = f"frames end at {end:.2f} s of {duration:.2f} s ({len(times)} frames); download it again"
        raise VideoError("truncated", details)


def read_picture(path: Path | str, resolution: int) -> np.ndarray:
    """A picture of any size and format as frames are stored: uint8 RGB of shape (R, R, 3), by area averaging.

    It is turned as its EXIF data say. Raises UserError if Pillow cannot read it.
    """
    return make_resizer(resolution)(picture_frame(path))[..., ::-1].copy()


def picture_frame(path: Path | str) -> av.VideoFrame:
    """A picture as `decode_video` yields frames."""
    return av.VideoFrame.from_ndarray(load_picture(path), format="rgb24")


def load_picture(path: Path | str) -> np.ndarray:
    """A picture of any format in its own size, turned as its EXIF data say: uint8 RGB (H, W, 3).

    Raises UserError if Pillow cannot read it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # 16 bits of gray, which Pillow would cut at 255
                image = image.point(lambda level: level / 256)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow has no one kind of error for what a file may hold
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be read as a picture ({reason}); name a JPEG or PNG file") from None


def make_resizer(resolution: int) -> Callable[[av.VideoFrame], np.ndarray]:
    """A function that turns decoded frames of one video into uint8 BGR arrays of shape (R, R, 3), by area averaging.

    Where a frame shrinks, FFmpeg averages its planes of brightness and color before it makes BGR of them: several
    times faster than averaging the BGR picture, and on average closer to the exact result (off by 0.3 to 0.6 of 255,
    where OpenCV's route is 1.1 too dark; but by up to 20, not 3, at a few sharp edges of saturated colors). Where a
    frame grows, OpenCV resizes it, since FFmpeg's area method does not interpolate.
    """
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
    # No search for repeated strings, each pixel predicted from the one above: the fastest settings, 6% smaller files.
    strategy = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
    return cv2.imencode(".png", image, [*strategy, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP])[1]
