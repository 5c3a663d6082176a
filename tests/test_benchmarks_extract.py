"""The extraction benchmark: its command works, and it notices an alternative that does other work."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import extract_frames
from data.cli import UserError
from data.paths import frame_path, frames_dir
from data.video_decoder import decode_video, make_resizer
from tests.conftest import run

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four rendered clips, filtered."""
    return extract_frames.prepare_clips(tmp_path_factory.mktemp("clips"), 4, 1)


def test_quick_run_prints_every_alternative_and_stage(clips):
    done = run("python", "-m", "benchmarks.extract_frames", "--quick", "--num_clips", 4, "--rounds", 1,
               "--num_workers", 1, "--clips_dir", clips.folder)  # fmt: skip
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert {extract_frames.PLAIN, extract_frames.OURS, "decode (the floor)", "resize", "PNG", "write"} <= set(rows)
    assert rows[extract_frames.OURS].split("|")[5].strip() == "1.00"
    if shutil.which("ffmpeg"):
        assert {extract_frames.FFMPEG, extract_frames.FFMPEG_FAST} <= set(rows)
    else:
        assert "ffmpeg program is not installed" in done.stdout
    assert f"- {extract_frames.PLAIN}: " in done.stdout  # the pictures were compared


def test_a_missing_frame_is_noticed(clips, tmp_path):
    def one_frame_less(clips, output_dir, num_workers):
        copy(clips, output_dir, num_workers)
        frame_path(frames_dir(output_dir, 96), clips.ids[0], 0).unlink()

    def copy(clips, output_dir, num_workers):
        for size in extract_frames.RESOLUTIONS:
            for video_id in clips.ids:
                folder = frames_dir(output_dir, size) / video_id
                folder.mkdir(parents=True)
                for index in range(3):
                    (folder / f"{index:05d}.png").touch()

    alternatives = {"a": copy, "b": one_frame_less}
    with pytest.raises(UserError, match=f"b wrote 2 frames of clip {clips.ids[0]} at 96 pixels"):
        list(extract_frames.run_rounds(clips, alternatives, tmp_path, 1, 1))


def overlaps(source: int, target: int) -> np.ndarray:
    """How much of each source pixel lies in each target pixel, of shape (target, source); rows add up to 1."""
    edges = np.arange(target + 1) * source / target
    starts, ends = edges[:-1, None], edges[1:, None]
    pixels = np.arange(source)
    return np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None) * target / source


def exact_average(frame, resolution: int) -> np.ndarray:
    """The area average of a 4:2:0 frame as BGR (BT.601, limited range), float: each color sample covers 2 x 2."""
    planes = [
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    ]
    luma = (planes[0].astype(float) - 16) * 255 / 219
    blue, red = ((cv2.resize(plane, luma.shape[::-1], interpolation=cv2.INTER_NEAREST) - 128.0) * 255 / 224
                 for plane in planes[1:])  # fmt: skip
    picture = np.stack([luma + 1.772 * blue, luma - 0.344136 * blue - 0.714136 * red, luma + 1.402 * red], axis=2)
    vertical, horizontal = overlaps(frame.height, resolution), overlaps(frame.width, resolution)
    return np.einsum("ij,jkc,lk->ilc", vertical, picture.clip(0, 255), horizontal, optimize=True)


def check_pictures(video: Path, resolution: int) -> None:
    frames = list(decode_video(video))
    resize = make_resizer(resolution)
    errors = np.stack([resize(frame) - exact_average(frame, resolution) for frame in frames[::10]])
    assert abs(errors.mean()) < 0.2  # neither darker nor brighter
    assert np.abs(errors).mean() < 0.8
    assert np.percentile(np.abs(errors), 99) < 6


@pytest.mark.parametrize("resolution", [96, 128])
def test_shrunk_frames_are_area_averages(clips, resolution):
    check_pictures(clips.video(clips.ids[0]), resolution)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg program is not here")
def test_a_camera_held_sideways(tmp_path):
    """The picture is turned as the container says, for shrunk and enlarged frames."""
    upright, sideways = tmp_path / "upright.mp4", tmp_path / "sideways.mp4"
    writer = cv2.VideoWriter(str(upright), cv2.VideoWriter_fourcc(*"mp4v"), 12, (64, 48))
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 255
    writer.write(picture)
    writer.release()
    turning = ["-metadata:s:v", "rotate=90", "-c", "copy", sideways]
    run("ffmpeg", "-v", "error", "-i", upright, *turning)
    _, expected = cv2.VideoCapture(str(sideways), cv2.CAP_FFMPEG).read()  # OpenCV turns it, too
    assert expected.shape == (64, 48, 3)
    for resolution in (16, 96):
        (frame,) = decode_video(sideways)
        image = make_resizer(resolution)(frame)
        assert (
            np.abs(image - cv2.resize(expected, (resolution,) * 2, interpolation=cv2.INTER_AREA).astype(int)).mean() < 3
        )


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="../shared/clips is not here")
@pytest.mark.parametrize("video_id", ["30001", "30005", "30010"])
def test_shrunk_camera_frames_are_area_averages(video_id):
    check_pictures(SHARED / "clips" / "videos" / f"{video_id}.webm", 128)
