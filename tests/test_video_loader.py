"""Frame extraction: the command, the frames and annotations it writes, bad videos, and interruptions."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from data import files, paths, video_decoder, video_loader
from tests.conftest import hear_ctrl_c

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
COMMAND = [sys.executable, "-m", "data.video_loader", "--data_dir"]


def extract(data_dir, *options):
    command = [*COMMAND, str(data_dir), *map(str, options)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    return result


def write_video(path, num_frames=12, size=(64, 48), fourcc="VP90", suffix=".webm", seed=0):
    """A clip of moving noise. The codec's container is chosen by `suffix`; the file is then named `path`."""
    written = path.with_name(f"{path.stem}_new{suffix}")
    writer = cv2.VideoWriter(str(written), cv2.VideoWriter_fourcc(*fourcc), 12, size)
    assert writer.isOpened()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for index in range(num_frames):
        writer.write(np.roll(noise, index, axis=1))
    writer.release()
    os.replace(written, path)


def make_data_dir(folder, ids, val_ids=()):
    (folder / "videos").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, split_ids in (("train", ids), ("val", val_ids)):
        entries = [
            {"id": video_id, "label": "moving a cup up", "template": "Moving [something] up", "task": "move_object"}
            for video_id in split_ids
        ]
        paths.write_annotations(paths.filtered_annotations_path(folder, split), entries)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Six good clips of different lengths; copied by the tests that change them."""
    folder = make_data_dir(tmp_path_factory.mktemp("clips") / "data", ["1", "2", "3", "4"], ["5", "6"])
    for index in range(1, 7):
        write_video(folder / "videos" / f"{index}.webm", num_frames=8 + 3 * index, seed=index)
    return folder


@pytest.fixture
def data_dir(clips, tmp_path):
    return Path(shutil.copytree(clips, tmp_path / "data"))


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    """The clips after one undisturbed extraction."""
    folder = Path(shutil.copytree(clips, tmp_path_factory.mktemp("undisturbed") / "data"))
    result = extract(folder)
    assert result.returncode == 0, result.stderr
    return folder


def tree_hashes(folder):
    """{relative path: hash} of every file, and the empty folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def num_frames_of(data_dir):
    found = {}
    for split in paths.SPLITS:
        for entry in paths.read_annotations(paths.filtered_annotations_path(data_dir, split)):
            found[entry["id"]] = entry.get("num_frames")
    return found


def log_of(data_dir):
    return (data_dir / "frames_extraction.log").read_text()


# What is written.


def test_frames_are_the_resized_video(undisturbed):
    capture = cv2.VideoCapture(str(undisturbed / "videos" / "2.webm"))
    for index in range(14):
        decoded, image = capture.read()
        assert decoded
        for resolution in (96, 128):
            path = paths.frame_path(paths.frames_dir(undisturbed, resolution), "2", index)
            with Image.open(path) as png:
                assert (png.format, png.mode, png.size) == ("PNG", "RGB", (resolution, resolution))
                written = np.asarray(png)
            expected = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
            assert np.array_equal(written, expected[:, :, ::-1])
    assert not capture.read()[0]
    assert len(list(paths.frames_dir(undisturbed, 96).joinpath("2").iterdir())) == 14


def test_num_frames_and_summary(undisturbed):
    assert num_frames_of(undisturbed) == {str(index): 8 + 3 * index for index in range(1, 7)}
    assert log_of(undisturbed) == "6 videos selected: 6 have all their frames, 0 failed\n"
    assert sorted(path.name for path in paths.frames_dir(undisturbed, 128).iterdir()) == list("123456")


def test_second_run_does_nothing(undisturbed):
    before = tree_hashes(undisturbed)
    times = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.png")}
    result = extract(undisturbed)
    assert "0 videos extracted, 6 were there already" in result.stdout
    assert tree_hashes(undisturbed) == before
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.png")} == times


def test_filtering_again_only_restores_num_frames(undisturbed, tmp_path):
    data_dir = Path(shutil.copytree(undisturbed, tmp_path / "data"))
    for split in paths.SPLITS:
        path = paths.filtered_annotations_path(data_dir, split)
        entries = paths.read_annotations(path)
        paths.write_annotations(path, [{k: v for k, v in entry.items() if k != "num_frames"} for entry in entries])
    shutil.rmtree(data_dir / "videos")  # nothing is decoded again
    assert extract(data_dir).returncode == 0
    assert num_frames_of(data_dir) == num_frames_of(undisturbed)


def test_only_what_is_missing_or_inconsistent_is_written(undisturbed, tmp_path):
    data_dir = Path(shutil.copytree(undisturbed, tmp_path / "data"))
    frames_96, frames_128 = (paths.frames_dir(data_dir, resolution) for resolution in (96, 128))
    shutil.rmtree(frames_96 / "1")
    paths.frame_path(frames_96, "2", 3).unlink()  # a hole
    paths.frame_path(frames_128, "3", 16).unlink()  # the last frame
    shutil.copytree(frames_96 / "6", frames_96 / ".6.partial")  # a killed run's
    result = extract(data_dir)
    assert "3 videos extracted, 3 were there already" in result.stdout
    assert tree_hashes(data_dir) == tree_hashes(undisturbed)


def test_one_more_size_from_another_video_rewrites_all_sizes(data_dir):
    extract(data_dir, "--resolutions", 16, "--limit", 1)
    write_video(data_dir / "videos" / "1.webm", num_frames=5)
    extract(data_dir, "--resolutions", 16, 24, "--limit", 1)
    for resolution in (16, 24):
        assert len(list((paths.frames_dir(data_dir, resolution) / "1").iterdir())) == 5
    assert num_frames_of(data_dir)["1"] == 5


def test_limit_resolutions_and_workers(data_dir):
    result = extract(data_dir, "--resolutions", 17, "--limit", 1, "--num_workers", 1)
    assert result.returncode == 0
    assert sorted(path.name for path in data_dir.glob("frames_*x*/*")) == ["1", "5"]
    with Image.open(paths.frame_path(paths.frames_dir(data_dir, 17), "1", 0)) as png:
        assert png.size == (17, 17)
    assert {video_id for video_id, count in num_frames_of(data_dir).items() if count} == {"1", "5"}


@pytest.mark.parametrize("options", [["--resolutions", "0"], ["--resolutions", "9999"], ["--num_workers", "-1"]])
def test_impossible_options(data_dir, options):
    result = extract(data_dir, *options)
    assert result.returncode == 2 and "must be at" in result.stderr
    assert not list(data_dir.glob("frames_*"))


def test_other_codecs_containers_and_odd_sizes(tmp_path):
    kinds = [("VP80", ".webm", (64, 48)), ("MJPG", ".avi", (35, 21)), ("mp4v", ".mp4", (8, 4))]
    kinds += [("mp4v", ".mov", (64, 48)), ("MJPG", ".mkv", (64, 48))]
    data_dir = make_data_dir(tmp_path / "data", [suffix[1:] for _, suffix, _ in kinds])
    for fourcc, suffix, size in kinds:
        write_video(data_dir / "videos" / f"{suffix[1:]}{suffix}", 7, size, fourcc, suffix)
    extract(data_dir, "--resolutions", 32)
    assert num_frames_of(data_dir) == dict.fromkeys(["webm", "avi", "mp4", "mov", "mkv"], 7)


def test_sound_that_ends_after_the_pictures_does_not_make_a_video_truncated(tmp_path):
    data_dir = make_data_dir(tmp_path / "data", ["1"])
    with av.open(str(data_dir / "videos" / "1.mkv"), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        for _ in range(5):
            container.mux(pictures.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(pictures.encode())
    extract(data_dir, "--resolutions", 32)
    assert num_frames_of(data_dir) == {"1": 5}


# Bad videos; more in test_faults_extraction.py.


@pytest.mark.parametrize(
    "times, duration, truncated",
    [
        ([i / 12 for i in range(43)], 43 / 12, False),
        ([i / 12 for i in range(42)], 43 / 12, False),  # a container that claims one frame too many, or one was lost
        ([i / 12 for i in range(41)], 43 / 12, True),
        ([i / 12 for i in range(20)], 43 / 12, True),
        ([0, 0.1, 0.2, 1.2, 2.2], 40 / 12, False),  # varying frame rate, long last frame
        ([0, 0.1, 0.2, 1.2, 2.2], 60 / 12, True),
        ([0], 5, True),  # a single frame
        ([0, 0.1], 0, False),  # no duration stated
        ([0, 0.1], -9e12, False),
    ],
)
def test_what_counts_as_truncated(times, duration, truncated):
    if truncated:
        with pytest.raises(video_decoder.VideoError, match="frames end at"):
            video_decoder.check_duration(times, duration, 1 / 12)
    else:
        video_decoder.check_duration(times, duration, 1 / 12)


@pytest.mark.parametrize("fourcc, suffix", [("VP90", ".webm"), ("MJPG", ".avi")])
def test_a_cut_file_is_reported_once_two_frames_are_lost(tmp_path, fourcc, suffix):
    write_video(tmp_path / "whole.webm", 26, fourcc=fourcc, suffix=suffix)
    content = (tmp_path / "whole.webm").read_bytes()
    decoded = set()
    for length in range(len(content) // 2, len(content), len(content) // 60):
        (tmp_path / "cut.webm").write_bytes(content[:length])
        num_frames, is_reported = 0, False
        try:
            for _ in video_decoder.decode_video(tmp_path / "cut.webm"):
                num_frames += 1
        except video_decoder.VideoError:
            is_reported = True
        assert is_reported or num_frames >= 25
        decoded.add(num_frames)
    assert min(decoded) < 20


# Errors of the whole run.


def test_annotations_must_be_filtered_first(tmp_path):
    result = extract(tmp_path)
    assert result.returncode == 1
    assert f"python -m data.dataset --data_dir {tmp_path}" in result.stderr


def test_no_videos_at_all_is_one_line(data_dir):
    shutil.rmtree(data_dir / "videos")
    result = extract(data_dir)
    assert result.returncode == 1
    assert re.fullmatch(r"error: no videos in .*\n", result.stderr)


def test_a_second_extraction_at_once_is_refused(data_dir):
    with files.only_one(data_dir / "annotations", "extraction"):
        result = extract(data_dir)
    assert result.returncode == 1 and "another extraction is running" in result.stderr


def test_a_file_in_place_of_the_frames_folder(data_dir):
    (data_dir / "frames_96x96").touch()
    result = extract(data_dir)
    assert result.returncode == 1
    assert re.match(r"error: .*frames_96x96'\n", result.stderr)


def test_nothing_but_failures_is_an_error(data_dir):
    for path in (data_dir / "videos").iterdir():
        path.write_bytes(b"not a video")
    result = extract(data_dir, "--resolutions", 16)
    assert result.returncode == 1
    assert result.stderr.endswith(f"error: not one of 6 videos has frames; {data_dir}/frames_extraction.log says why\n")
    assert log_of(data_dir).startswith("6 videos selected: 0 have all their frames, 6 failed (unreadable: 6)\n")


# Interruptions. The moments are spread over the first run's output, so no timing is assumed.


def start_and_wait_for(data_dir, num_entries):
    """Start an extraction and return its process once `num_entries` files and folders of frames exist."""
    process = subprocess.Popen(
        [*COMMAND, str(data_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    while process.poll() is None and count_entries(data_dir) < num_entries:
        pass
    return process


def count_entries(data_dir):
    """The number of files and folders of frames; os.walk does not mind folders that vanish meanwhile."""
    walks = (os.walk(folder) for folder in data_dir.glob("frames_*x*"))
    return sum(len(files) + len(folders) for walk in walks for _, folders, files in walk)


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    command_lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, command_line in command_lines.items() if b"spawn_main" in command_line]


def test_ctrl_c_keeps_what_is_done(data_dir, undisturbed):
    for index in range(10, 60):  # enough work that it cannot end before the signal
        shutil.copy(data_dir / "videos" / "6.webm", data_dir / "videos" / f"{index}.webm")
    path = paths.filtered_annotations_path(data_dir, "train")
    entries = paths.read_annotations(path)
    paths.write_annotations(path, entries + [{**entries[0], "id": str(index)} for index in range(10, 60)])
    process = start_and_wait_for(data_dir, 200)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted: run the same command again" in errors and b"Traceback" not in errors
    counts = num_frames_of(data_dir)
    assert any(counts.values()) and not all(counts.values())
    assert "not done yet" in log_of(data_dir)
    assert not list(data_dir.glob("frames_*/.*"))
    assert extract(data_dir).returncode == 0
    assert all(num_frames_of(data_dir).values())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds worker processes through /proc")
def test_a_killed_worker_costs_nothing(data_dir, undisturbed):
    process = start_and_wait_for(data_dir, 10)
    for worker in workers_of(process)[:1]:
        os.kill(worker, signal.SIGKILL)
    assert process.communicate(timeout=60) and process.returncode == 0
    assert tree_hashes(data_dir) == tree_hashes(undisturbed)


def dies_of_video_3(video_id):
    """In place of `extract_video`."""
    if video_id == "3":
        os._exit(1)
    return video_loader.Result(video_id, num_frames=7)


def test_a_video_that_ends_its_worker_twice_is_reported_and_the_others_go_on():
    results = list(video_loader.run_workers(dies_of_video_3, list("123456789"), 2))
    assert sorted(result.video_id for result in results) == list("123456789")
    assert [(result.video_id, result.failure) for result in results if result.failure] == [("3", "worker died")]


# Real clips.


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="../shared/clips is not here")
def test_shared_clips(tmp_path):
    data_dir = tmp_path / "clips"
    for part in ("annotations", "videos"):
        shutil.copytree(SHARED / "clips" / part, data_dir / part, copy_function=shutil.copyfile)
        (data_dir / part).chmod(0o755)
    filtering = [sys.executable, "-m", "data.dataset", "--data_dir", str(data_dir)]
    subprocess.run(filtering, cwd=ROOT, check=True, capture_output=True)
    result = extract(data_dir, "--resolutions", 32)
    assert "12 videos selected: 12 have all their frames, 0 failed" in result.stdout
    assert num_frames_of(data_dir)["30011"] == 19
    assert sum(num_frames_of(data_dir).values()) == 531
    original = json.loads((SHARED / "clips" / "annotations" / "validation.json").read_text())
    filtered = paths.read_annotations(paths.filtered_annotations_path(data_dir, "val"))
    assert {entry["id"] for entry in filtered} == {entry["id"] for entry in original}
