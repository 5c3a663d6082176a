"""Decode one video and write its frames as square PNGs, or say why that is impossible; read a picture like a frame."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.cli import UserError, one_line
from data.paths import VIDEO_EXTENSIONS, frame_path

# Video containers only: without the list a picture would count as a video of one frame, and a text file could be a
# playlist that makes FFmpeg open other files.
VIDEO_FORMATS = "matroska,webm,mov,mp4,avi,mpegts,mpeg,flv"
CODEC_NOISE = 12  # of 255, the most by which a repeated frame differs at 48 x 48 pixels; others of SSv2 differ by more
FULL_CHROMA = 0x2000  # swscale's SWS_FULL_CHR_H_INT: color at full horizontal resolution
# No search for repeated strings, each pixel predicted from the one above: the fastest settings, 6% smaller files.
STRATEGY = (cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY)
PNG_OPTIONS = [*STRATEGY, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]

av.logging.set_level(None)  # a failure is reported once, by a VideoError
cv2.setNumThreads(1)  # videos are decoded in parallel
Image.MAX_IMAGE_PIXELS = None  # no warning about large pictures: they are the user's own


class VideoError(Exception):
    """A video that cannot be extracted. Arguments: the kind of failure (for counting) and the details."""


def write_frames(path: Path, folders: dict[int, Path]) -> tuple[int, set[str]]:
    """Decode a video, or a folder of pictures, and write each frame, R x R, as `<index>.png` into the new `folders[R]`.

    Frames are resized by area averaging without keeping the aspect ratio, and stored as 8-bit RGB. Returns the number
    of frames and remarks on them. Raises VideoError if the file is not a whole video, OSError if a file is not written.
    """
    resizers = {resolution: make_resizer(resolution) for resolution in folders}
    graph, remarks = av.filter.Graph(), set()
    for folder in folders.values():
        folder.mkdir()
    num_repeated, before = 0, None
    if path.suffix in VIDEO_EXTENSIONS:
        frames = decode_video(path)
    else:
        pictures = map(load_picture, sorted(path.glob("[!.]*")))
        frames = (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures)
    for index, frame in enumerate(frames):
        if frame.interlaced_frame:
            remarks.add("interlaced (what moves looks combed; convert first, as with: ffmpeg -i OLD -vf bwdif NEW)")
        if frame.color_trc in (16, 18):  # the numbers of PQ and HLG in ITU-T H.273
            remarks.add("HDR (colors are mapped to the standard range)")
            frame = to_standard_range(frame, graph)
        for resolution, folder in folders.items():
            image = resizers[resolution](frame)
            encoded = cv2.imencode(".png", image, PNG_OPTIONS)[1]
            frame_path(folder.parent, folder.name, index).write_bytes(encoded)
        small = cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA)
        num_repeated += before is not None and cv2.norm(small, before, cv2.NORM_INF) <= CODEC_NOISE
        before = small
    rate = index / frame.time if frame.time else 0  # a picture has no time
    if num_repeated > index / 3 and rate > 13:  # a still scene at SSv2's own 12 is no mistake
        remarks.add(f"over a third of the frames repeat the one before, at {rate:.0f} frames/s (SSv2's own have 12)")
    return index + 1, remarks  # a video without frames is a VideoError


def decode_video(path: Path) -> Iterator[av.VideoFrame]:
    """Yield a video's frames in the order they are shown, decoded on one thread.

    Raises VideoError, perhaps after frames that are whole, if the file is not a video or not a whole one.
    """
    if not path.is_file():  # a pipe would block when opened
        raise VideoError("missing", f"there is no file {path.resolve()}")
    times = []  # seconds; 8 bytes a frame
    sound_end = 0.0  # seconds; or the end of whatever else is in the file
    try:
        with av.open(str(path), options={"format_whitelist": VIDEO_FORMATS}) as container:
            stream = container.streams.best("video")
            if not stream or not stream.codec_context or stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoError("unreadable", "it has no video that can be decoded (the cover of a song is none)")
            stream.codec_context.thread_count = 1
            interval = 1 / float(stream.guessed_rate or 1)  # seconds from frame to frame
            start = float((stream.start_time or 0) * stream.time_base)
            for packet in container.demux():
                if packet.is_corrupt and container.format.name != "mpegts":  # it is cut; MPEG-TS may be joined there
                    raise VideoError("truncated", f"a part is cut off after {len(times)} frames; download it again")
                if packet.stream is not stream:
                    end = (packet.pts or 0) + (packet.duration or 0)
                    sound_end = max(sound_end, float(end * packet.time_base))
                    continue
                for frame in packet.decode():
                    times.append(len(times) * interval if frame.time is None else frame.time - start)
                    yield frame
            if not times:
                raise VideoError("unreadable", "not one of its frames can be decoded; download it again")
            if "mp4" in container.format.name:  # its tracks say how long they last without what an edit list hides
                duration = float((stream.duration or 0) * stream.time_base)
            else:  # the whole file's counts from time 0, and says nothing where the sound lasts as long
                whole = (container.duration or 0) / av.time_base
                duration = stream.frames * interval or (whole - start if sound_end < whole - 0.1 else 0)
            check_duration(times, duration, interval)
    except av.FFmpegError as error:
        if isinstance(error, av.ArgumentError) and not times:
            raise VideoError("unreadable", f"it is none of {VIDEO_FORMATS}; convert it") from None
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


def read_picture(path: Path | str, resolution: int, crop: bool = False) -> np.ndarray:
    """A picture of any size and format as frames are stored: uint8 RGB of shape (R, R, 3), by area averaging.

    It is squashed to a square, which is said, or `crop` takes its middle square. Otherwise as `load_picture`.
    """
    picture = Image.fromarray(load_picture(path))
    if crop:
        picture = ImageOps.fit(picture, (min(picture.size), min(picture.size)))
    elif picture.width != picture.height:
        print(f"{path} is squashed to a square, as training frames are; crop takes its middle square")
    return make_resizer(resolution)(av.VideoFrame.from_image(picture))[..., ::-1].copy()


def load_picture(path: Path | str) -> np.ndarray:
    """A picture of any format in its own size, turned as its EXIF data say: uint8 RGB (H, W, 3).

    16 bits become 8, and what is transparent white. Raises UserError if Pillow cannot read it, or pixels are floats.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are floats, and nothing says which is white")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow has no one kind of error for what a file may hold
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, UnidentifiedImageError) and Path(path).read_bytes()[4:8] == b"ftyp":
            reason = "it is HEIC, as phones write it, or a video"
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


def to_standard_range(frame: av.VideoFrame, graph: av.filter.Graph) -> av.VideoFrame:
    """An HDR frame in BT.709, where white (203 nits) is 255. `graph` serves one video, and is empty at first."""
    if not graph.configured:
        source = graph.add_buffer(None, frame.width, frame.height, frame.format, time_base=frame.time_base)
        standard = graph.add("scale", "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709")
        graph.link_nodes(source, standard, graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()
