"""Files and folders that are whole or absent, and the lock of a folder."""

import os
import subprocess
import sys

import pytest

from data import files
from tests.conftest import PROJECT


def contents(folder):
    """{relative path: text} of all files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def test_a_folder_and_a_file_replace_the_former_ones(tmp_path):
    write(tmp_path / "folder", old="1")
    write(tmp_path, file="1")
    with files.whole_or_absent(tmp_path / "folder") as partial:
        write(partial, new="2")
        assert contents(tmp_path / "folder") == {"old": "1"}
    with files.whole_or_absent(tmp_path / "file") as partial:
        partial.write_text("2")
    assert contents(tmp_path) == {"folder/new": "2", "file": "2"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_former_folder_and_removes_the_partial_one(tmp_path, failure):
    write(tmp_path / "folder", old="1")
    write(files.partial_path(tmp_path / "folder"), left_by_a_killed_run="0")
    with pytest.raises(failure), files.whole_or_absent(tmp_path / "folder") as partial:
        assert not partial.exists()
        write(partial, new="2")
        raise failure
    assert contents(tmp_path) == {"folder/old": "1"}
    assert os.listdir(tmp_path) == ["folder"]


def test_leftovers_go_and_nothing_else(tmp_path):
    write(tmp_path / ".1.partial", frame="1")
    write(tmp_path, **{".2.partial": "", "3.partial": "", ".4": ""})
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".4", "3.partial"]


@pytest.fixture
def parts(tmp_path):
    """A folder with three parts, to be replaced by three others, and a part that stays."""
    write(tmp_path / "unet", weights="old")
    write(tmp_path, config="old", index="old", notes="old")
    return tmp_path


def replace_parts(folder):
    with files.parts_replaced(folder, last="index") as new:
        write(new / "unet", weights="new")
        write(new, config="new", index="new")


@pytest.mark.parametrize("killed_at", range(4))
def test_parts_are_a_mixture_only_while_the_last_one_is_absent(parts, monkeypatch, killed_at):
    """Ends at each of the renames; the fourth run is not disturbed."""
    calls, rename = iter(range(9)), os.rename

    def rename_or_die(source, target):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_or_die)
    if killed_at < 3:
        with pytest.raises(KeyboardInterrupt):
            replace_parts(parts)
        assert not (parts / "index").exists()
    monkeypatch.setattr(os, "rename", rename)
    replace_parts(parts)
    assert contents(parts) == {"unet/weights": "new", "config": "new", "index": "new", "notes": "old"}
    assert sorted(os.listdir(parts)) == ["config", "index", "notes", "unet"]


def test_json_is_text_in_utf8_that_is_the_same_for_the_same_content(tmp_path):
    content = {"label": "把杯子往上移", "num_frames": [20, 21]}
    for name in ("one", "two"):
        files.write_json(tmp_path / name, content)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "把杯子往上移" in (tmp_path / "one").read_text(encoding="utf-8")


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path):
    code = "import sys; from data.files import only_one, Path\nwith only_one(Path(sys.argv[1]), 'training'): pass"
    second = [sys.executable, "-c", code, str(tmp_path)]
    with files.only_one(tmp_path, "training"):
        refused = subprocess.run(second, cwd=PROJECT, capture_output=True, text=True)
        assert refused.returncode == 1 and f"another training is running in {tmp_path}" in refused.stderr
    with pytest.raises(ValueError), files.only_one(tmp_path, "training"):
        raise ValueError
    assert subprocess.run(second, cwd=PROJECT).returncode == 0
