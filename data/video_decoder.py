"""Turn one video into folders of square PNG frames, or say why that is impossible.

`extract_video` is what the worker processes of `data.video_loader` run.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from data.dataset import UserError, frame_path, frames_dir, video_path

PARTIAL_SUFFIX = ".partial"  # `.<id>.partial`: being written
OUTDATED_SUFFIX = ".outdated"  # `.<id>.outdated`: replaced, about to be deleted
# Video containers only: without the list a picture would count as a video of one frame, and a text file
# could be a playlist that makes FFmpeg open other files.
FFMPEG_OPTIONS = "format_whitelist;matroska,webm,mov,mp4,avi"


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


def import_cv2():
    """Import OpenCV, silent and on one thread: the workers are the parallelism, the reasons are ours."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = FFMPEG_OPTIONS
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"OpenCV cannot be loaded ({error}); pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    return cv2


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
    cv2 = import_cv2()
    # The fastest of OpenCV's PNG settings here and 6% smaller than the default: no search for repeated
    # strings, and each pixel predicted from the one above.
    png_options = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    png_options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    cut_short = check_file(path)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise VideoError("not a video", "OpenCV finds no video stream in the file; download it again")
        image = None
        times = []  # seconds; 8 bytes a frame
        while True:
            decoded, image = capture.read(image)
            if not decoded:
                break
            for resolution, folder in folders.items():
                resized = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
                _, png = cv2.imencode(".png", resized, png_options)
                with open(frame_path(folder.parent, folder.name, len(times)), "wb") as file:
                    file.write(png)
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        if not times:
            raise VideoError("no frames", "the file opens as a video, but not one frame decodes; download it again")
        check_duration(times, capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS), cut_short)
        return len(times)
    except cv2.error as error:
        raise VideoError("not decodable", f"OpenCV fails on it: {' '.join(str(error).split())}") from None
    finally:
        capture.release()


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
    frames_per_second`: OpenCV computes its claim so. Counting frames would not do, since the claim is too
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
