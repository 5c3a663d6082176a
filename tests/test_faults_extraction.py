"""Faults while frames are extracted: killed runs, and a folder of bad and unusual videos. All through the command."""

import os
import random
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from data import paths
from tests.test_video_loader import (
    COMMAND,
    ROOT,
    extract,
    log_of,
    make_data_dir,
    num_frames_of,
    start_and_wait_for,
    tree_hashes,
    write_video,
)

NUM_KILLS = 20
MEMORY_LIMIT = 500_000_000  # bytes a worker
# Runs the command behind it and prints the most memory (kB) that it or one of its workers ever had.
MEASURE = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
    " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


# Killed runs.


@pytest.fixture(scope="module")
def twin_dirs(tmp_path_factory):
    """Two equal data directories of ten clips; the frames of the first one are extracted without disturbance."""
    folder = tmp_path_factory.mktemp("kills")
    undisturbed = make_data_dir(folder / "undisturbed", [str(index) for index in range(7)], ["7", "8", "9"])
    for index in range(10):
        write_video(undisturbed / "videos" / f"{index}.webm", num_frames=20 + 2 * index, seed=index)
    other = Path(shutil.copytree(undisturbed, folder / "killed"))
    assert extract(undisturbed).returncode == 0
    return undisturbed, other


def test_killed_at_twenty_moments_then_completed_to_the_same_bytes(twin_dirs):
    """Half of the moments are states of the frames' folders, half are any time after the start, to the end and after.

    The whole process group is killed in half of the cases, so that the workers cannot end by themselves.
    """
    undisturbed, data_dir = twin_dirs
    moments = random.Random(3)
    total = sum(1 for _ in undisturbed.glob("frames_*/**/*"))
    sizes = iter(sorted(moments.randrange(1, total) for _ in range(NUM_KILLS // 2)))
    killed_at_work = 0
    for kill in range(NUM_KILLS):
        process = start_and_wait_for(data_dir, next(sizes) if kill % 2 else 0)
        if kill % 2 == 0:
            try:
                process.wait(timeout=moments.uniform(0, 1.5))
            except subprocess.TimeoutExpired:
                pass
        killed_at_work += process.poll() is None
        if kill % 4 < 2:
            process.kill()
        elif process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()
        for split in paths.SPLITS:  # readable at any time, with nothing lost
            path = paths.filtered_annotations_path(data_dir, split)
            assert len(paths.read_annotations(path)) == (7 if split == "train" else 3)
        for folder in data_dir.glob("frames_*/[!.]*"):
            assert tree_hashes(folder) == tree_hashes(undisturbed / folder.relative_to(data_dir))
    assert killed_at_work >= NUM_KILLS // 2
    assert extract(data_dir).returncode == 0
    assert tree_hashes(data_dir) == tree_hashes(undisturbed)


# Bad and unusual videos.


def write_odd_video(path, size, times):
    """A clip of noise with PyAV: any size (pixels), each frame shown at the time (ms) given for it; none, if empty."""
    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if not len(times):
            container.start_encoding()
        noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, number, axis=1), format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if len(times):
            container.mux(stream.encode())


def test_bad_videos_are_named_and_stop_nobody(tmp_path):
    write_video(tmp_path / "good.webm", num_frames=26)
    good = (tmp_path / "good.webm").read_bytes()
    bad = {
        "empty": (b"", "unreadable"),
        "cut": (good[: len(good) // 2], "truncated"),
        "lastframes": (good[: int(len(good) * 0.9)], "truncated"),
        "zeros": (good[: len(good) // 2] + bytes(len(good) // 2), "truncated"),
        "header": (good[:200], "unreadable"),
        "random": (random.Random(0).randbytes(20_000), "unreadable"),
        "text": (b"hello\n" * 1000, "unreadable"),
        "playlist": (b"ffconcat version 1.0\nfile '1.webm'\n", "unreadable"),
        "picture": (cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes(), "unreadable"),
    }
    others = dict.fromkeys(("folder", "pipe", "link", "absent"), "missing")
    others |= dict.fromkeys(("nostream", "noframes"), "unreadable")
    data_dir = make_data_dir(tmp_path / "data", ["1", *bad, *others, "2"])
    videos = data_dir / "videos"
    write_video(videos / "1.webm", num_frames=11)
    write_video(videos / "2.webm", num_frames=14)
    for video_id, (content, _) in bad.items():
        (videos / f"{video_id}.webm").write_bytes(content)
    (videos / "folder.webm").mkdir()
    os.mkfifo(videos / "pipe.webm")
    (videos / "link.webm").symlink_to("nowhere.webm")
    cv2.VideoWriter(str(videos / "nostream.webm"), cv2.VideoWriter_fourcc(*"VP90"), 12, (64, 48)).release()
    write_odd_video(videos / "noframes.webm", (64, 48), [])

    result = extract(data_dir, "--resolutions", 16)
    assert result.returncode == 0
    assert "frames_extraction.log" in result.stdout
    expected = {video_id: kind for video_id, (_, kind) in bad.items()} | others
    reported = dict(re.findall(r"^(\w+): ([a-z ]+): .+$", log_of(data_dir), re.MULTILINE))
    assert reported == expected
    assert f"link: missing: there is no file {videos}/nowhere.webm\n" in log_of(data_dir)
    assert f"2 have all their frames, {len(expected)} failed" in result.stdout
    assert {video_id: count for video_id, count in num_frames_of(data_dir).items() if count} == {"1": 11, "2": 14}
    assert sorted(path.name for path in paths.frames_dir(data_dir, 16).iterdir()) == ["1", "2"]

    # Repaired files are picked up, and a failure's stale num_frames goes.
    (videos / "cut.webm").write_bytes(good)
    shutil.rmtree(paths.frames_dir(data_dir, 16) / "1")
    (videos / "1.webm").write_bytes(b"")
    extract(data_dir, "--resolutions", 16)
    counts = {video_id: count for video_id, count in num_frames_of(data_dir).items() if count}
    assert counts == {"2": 14, "cut": 26}


def test_unusual_videos_are_extracted_whole_in_little_memory(tmp_path):
    """Tiny, odd, of varying frame rate, and very long: every frame, whatever the container's claim of their number."""
    times = np.random.default_rng(1).integers(10, 400, 40).cumsum()  # ms
    clips = {
        "pixel": ((1, 1), range(0, 360, 40)),
        "column": ((1, 33), range(0, 280, 40)),
        "row": ((33, 1), range(0, 280, 40)),
        "odd": ((37, 21), range(0, 520, 40)),
        "varying": ((64, 48), times),
        "one": ((64, 48), [0]),
        "late": ((64, 48), range(5000, 5400, 40)),
        "long": ((16, 16), range(10_000)),
        "wide": ((1920, 1080), range(0, 120, 40)),
    }
    data_dir = make_data_dir(tmp_path / "data", list(clips))
    for video_id, (size, shown_at) in clips.items():
        path = data_dir / "videos" / f"{video_id}.webm"
        if video_id == "long":
            write_video(path, len(shown_at), size, "MJPG", ".avi")  # ten times as fast to write
        else:
            write_odd_video(path, size, shown_at)
    command = [sys.executable, "-c", MEASURE, *COMMAND, str(data_dir), "--resolutions", "16"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert num_frames_of(data_dir) == {video_id: len(shown_at) for video_id, (_, shown_at) in clips.items()}
    for video_id, (_, shown_at) in clips.items():
        names = sorted(os.listdir(paths.frames_dir(data_dir, 16) / video_id))
        assert names == [f"{index:05d}.png" for index in range(len(shown_at))]
    assert int(result.stdout) * 1024 < MEMORY_LIMIT


def test_a_video_that_may_not_be_read_stops_nobody(tmp_path):
    data_dir = make_data_dir(tmp_path / "data", ["1", "2"])
    for video_id in ("1", "2"):
        write_video(data_dir / "videos" / f"{video_id}.webm")
    (data_dir / "videos" / "1.webm").chmod(0)
    if os.access(data_dir / "videos" / "1.webm", os.R_OK):
        pytest.skip("permissions do not bind this user, root perhaps")
    assert extract(data_dir, "--resolutions", 16).returncode == 0
    assert "1: unreadable: Permission denied" in log_of(data_dir)
    assert num_frames_of(data_dir) == {"1": None, "2": 12}
