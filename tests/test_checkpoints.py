"""Checkpoints as folders: which are kept and which are found. (Saving while training: test_faults_training.py.)"""

from pathlib import Path

import pytest

from data.cli import UserError
from pecn.checkpoints import CheckpointTimes, checkpoint_steps, find_checkpoint, find_damage, save_checkpoint


def test_interrupted_checkpoint_outlives_a_damaged_newer_one(tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    for step in (10, 11):
        save_checkpoint(FilesOnly(), tmp_path, step, {}, total_limit=1)
    assert checkpoint_steps(tmp_path) == [11, 20]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-11"
    save_checkpoint(FilesOnly(), tmp_path, 20, {}, total_limit=1)
    assert checkpoint_steps(tmp_path) == [20] and find_damage(tmp_path / "checkpoint-20") is None


def test_a_run_that_goes_on_elsewhere_is_checked_like_a_fresh_one(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    checkpoint = save_checkpoint(FilesOnly(), tmp_path / "one", 10, {})
    assert find_checkpoint(tmp_path / "other", str(checkpoint)) == checkpoint
    (tmp_path / "other" / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match="other holds checkpoints of an earlier run"):
        find_checkpoint(tmp_path / "other", str(checkpoint))


def test_saving_takes_less_than_a_fiftieth_of_the_time():
    """A step takes 10 seconds; saving 100 million weights is estimated to take 3, and takes 2, then 40."""
    now = 0.0
    times = CheckpointTimes(None, 100_000_000, clock=lambda: now)
    saved_after = []
    for step in range(1, 60):
        now += 10
        if times.is_due(step):
            with times.saving():
                now += 40 if saved_after else 2
            saved_after.append(step)
    assert saved_after == [15, 25]  # 150 s = 50 x 3 s; 100 s = 50 x 2 s; the next one 2,000 s later
    every_seven = CheckpointTimes(7, 100_000_000, clock=lambda: 0.0)
    assert [step for step in range(1, 22) if every_seven.is_due(step)] == [7, 14, 21]


class FilesOnly:
    """In an Accelerator's place: its state is one file."""

    is_main_process = True

    def wait_for_everyone(self) -> None:
        pass

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "state").write_bytes(b"state")
