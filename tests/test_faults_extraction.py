"""Extraction that is killed or interrupted at any moment loses nothing. In processes of their own."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from data import files, paths
from tests.conftest import PROJECT, hear_ctrl_c
from tests.test_video_loader import extract, log_of, make_data_dir, num_frames_of, tree_hashes, write_video

NUM_KILLS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Ten clips after one extraction without interruption."""
    folder = make_data_dir(tmp_path_factory.mktemp("undisturbed") / "data", list("0123456"), list("789"))
    for index in range(10):
        write_video(folder / "videos" / f"{index}.webm", num_frames=20 + 2 * index, seed=index)
    assert extract(folder).returncode == 0
    return folder


@pytest.fixture
def data_dir(undisturbed, tmp_path):
    """The same clips before any extraction."""
    folder = make_data_dir(tmp_path / "data", list("0123456"), list("789"))
    shutil.copytree(undisturbed / "videos", folder / "videos", dirs_exist_ok=True)
    return folder


def count_entries(data_dir):
    """The number of files and folders of frames; os.walk does not mind folders that vanish meanwhile."""
    walks = (os.walk(folder) for folder in data_dir.glob("frames_*x*"))
    return sum(len(names) + len(folders) for walk in walks for _, folders, names in walk)


def start_and_wait_for(data_dir, num_entries):
    """Start an extraction; return its process once there are `num_entries` files and folders of frames."""
    process = subprocess.Popen(
        [sys.executable, "-m", "data.video_loader", "--data_dir", data_dir],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    while process.poll() is None and count_entries(data_dir) < num_entries:
        os.sched_yield()
    return process


def test_killed_at_any_moment_then_completed_to_the_same_bytes(undisturbed, data_dir):
    total = count_entries(undisturbed)
    killed_at_work = 0
    for moment in sorted(random.Random(3).sample(range(1, total), NUM_KILLS)):
        process = start_and_wait_for(data_dir, moment)
        killed_at_work += process.poll() is None
        process.kill()
        process.communicate()
        for split in paths.SPLITS:  # readable at any time, with nothing lost
            path = paths.filtered_annotations_path(data_dir, split)
            assert len(paths.read_annotations(path)) == (7 if split == "train" else 3)
        for folder in data_dir.glob("frames_*/[!.]*"):
            assert tree_hashes(folder) == tree_hashes(undisturbed / folder.relative_to(data_dir))
    assert killed_at_work >= NUM_KILLS // 2
    assert extract(data_dir).returncode == 0
    assert tree_hashes(data_dir) == tree_hashes(undisturbed)


def test_ctrl_c_keeps_what_is_done(data_dir):
    path = paths.filtered_annotations_path(data_dir, "train")
    entries = paths.read_annotations(path)
    copies = [str(index) for index in range(10, 60)]  # so much work that it cannot end before the signal
    for video_id in copies:
        shutil.copy(data_dir / "videos" / "6.webm", data_dir / "videos" / f"{video_id}.webm")
    files.write_json(path, entries + [{**entries[0], "id": video_id} for video_id in copies])
    process = start_and_wait_for(data_dir, 300)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert b"interrupted: run the same command again" in errors and b"Traceback" not in errors
    counts = num_frames_of(data_dir)
    assert any(counts.values()) and not all(counts.values())
    assert "not done yet" in log_of(data_dir)
    assert not list(data_dir.glob("frames_*/.*"))
    assert extract(data_dir).returncode == 0
    assert all(num_frames_of(data_dir).values())
