"""Unpacking SSv2's download: labels, parts that are whole, missing, cut or in a zip, and what an archive may hold."""

import io
import json
import random
import shlex
import tarfile
import zipfile

import pytest

from data import dataset, unpack
from tests.commands import call, error_line

IDS = [str(number) for number in range(1, 13)]
CONTENT = {video_id: random.Random(int(video_id)).randbytes(3000) for video_id in IDS}
ENTRIES = [{"id": video_id, "label": "moving a cup up", "template": "Moving [something] up"} for video_id in IDS]


def add(tar, name, content, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path):
    """The labels' zip and three parts of an archive of twelve videos, in a folder whose name needs quotes."""
    folder = tmp_path / "my downloads"
    folder.mkdir()
    with zipfile.ZipFile(folder / "labels.zip", "w") as labels:
        labels.writestr("labels/train.json", json.dumps(ENTRIES[:8]))
        labels.writestr("labels/validation.json", json.dumps(ENTRIES[8:10]))
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        add(tar, "20bn-something-something-v2", b"", tarfile.DIRTYPE)
        for video_id, content in CONTENT.items():
            add(tar, f"20bn-something-something-v2/{video_id}.webm", content)
    size = len(whole.getvalue()) // 3
    for number, end in enumerate((size, 2 * size, None)):
        (folder / unpack.PARTS[number]).write_bytes(whole.getvalue()[number * size : end])
    return folder


@pytest.fixture
def data_dir(tmp_path, archives):
    """A data directory whose labels are unpacked and of which ten videos are chosen."""
    folder = tmp_path / "data dir"
    assert not unpack_from(archives, folder).returncode
    assert not call(dataset, "--data_dir", folder).returncode
    return folder


def unpack_from(archives, data_dir, *options):
    return call(unpack, "--archives", archives, "--data_dir", data_dir, *options)


def failure(done):
    assert done.returncode == 1
    return done.stderr.replace("\r", "\n").splitlines()[-1]


def videos(data_dir):
    found = {path.stem: path.read_bytes() for path in (data_dir / "videos").iterdir()}
    assert found == {video_id: CONTENT[video_id] for video_id in found}
    return sorted(found, key=int)


def test_printed_commands_lead_from_the_labels_to_the_videos(archives, tmp_path):
    data_dir = tmp_path / "data dir"
    printed = unpack_from(archives, data_dir).stdout
    first, then = printed.partition("Next: ")[2].strip().split(" && ")
    assert not videos(data_dir)
    words = shlex.split(first)
    assert words[:3] == ["python", "-m", "data.dataset"] and not call(dataset, *words[3:]).returncode
    words = shlex.split(then)
    assert words[:3] == ["python", "-m", "data.unpack"]
    done = call(unpack, *words[3:])
    assert videos(data_dir) == IDS[:10] and "10 videos were unpacked" in done.stdout
    assert "Next: python -m data.video_loader --data_dir" in done.stdout


def test_a_missing_and_a_cut_part_are_named_and_what_was_unpacked_stays(archives, data_dir):
    _, middle, last = (archives / name for name in unpack.PARTS[:3])
    contents = middle.read_bytes(), last.read_bytes()
    middle.unlink()
    line = failure(unpack_from(archives, data_dir))
    first_ones = videos(data_dir)
    assert line.startswith(f"error: {middle.name} is missing; {len(first_ones)} videos") and 0 < len(first_ones) < 5

    middle.write_bytes(contents[0][:-2000])
    line = failure(unpack_from(archives, data_dir))
    assert line.startswith(f"error: {middle.name} is cut; ") and set(first_ones) <= set(videos(data_dir))

    middle.write_bytes(contents[0])
    last.write_bytes(contents[1][:2000])
    line = failure(unpack_from(archives, data_dir))
    assert line.startswith(f"error: {last.name} is cut, or {unpack.PARTS[3]} is missing; ")
    before = {path: path.stat().st_mtime_ns for path in (data_dir / "videos").iterdir()}
    assert 4 < len(before) < 10

    last.write_bytes(contents[1])
    assert f"{10 - len(before)} videos were unpacked" in unpack_from(archives, data_dir).stdout
    assert videos(data_dir) == IDS[:10]
    assert before == {path: path.stat().st_mtime_ns for path in before}

    for path in archives.iterdir():  # nothing is read once all are there
        path.write_bytes(b"")
    assert "0 chosen videos are still missing" in unpack_from(archives, data_dir).stdout


def test_a_changed_byte_is_noticed(archives, data_dir):
    part = archives / unpack.PARTS[1]
    content = bytearray(part.read_bytes())
    content[100:140] = bytes(40)
    part.write_bytes(content)
    unpack_from(archives, data_dir, "--all")
    line = failure(unpack_from(archives, data_dir, "--all"))
    assert "damaged" in line and unpack.PARTS[1][:-1] in line


@pytest.mark.parametrize("damage", ["", "cut"])
def test_parts_in_zips_and_all_videos(archives, tmp_path, damage):
    for name in unpack.PARTS[:3]:
        with zipfile.ZipFile(archives / f"{name}.zip", "w") as zipped:
            zipped.write(archives / name, name)
        (archives / name).unlink()
    if damage:
        path = archives / f"{unpack.PARTS[2]}.zip"
        path.write_bytes(path.read_bytes()[:-100])
        assert f"{unpack.PARTS[2]} is missing; " in failure(unpack_from(archives, tmp_path / "new", "--all"))
        return
    assert "12 videos were unpacked" in unpack_from(archives, tmp_path / "new", "--all").stdout
    assert videos(tmp_path / "new") == IDS
    assert "0 videos were unpacked" in unpack_from(archives, tmp_path / "new", "--all").stdout


def test_nothing_is_written_outside_videos(archives, data_dir, tmp_path):
    before = set(tmp_path.rglob("*"))
    with tarfile.open(archives / unpack.PARTS[0], mode="w:gz") as tar:
        for name in ("../../1.webm", f"{tmp_path}/2.webm", "x/../3.webm"):
            add(tar, name, CONTENT[name[-6]])
        add(tar, "4.webm", b"", tarfile.SYMTYPE, "/etc/hostname")
        for name in ("..webm", ".hidden.webm", "a b.webm", "5.txt"):
            add(tar, name, b"x")
    for name in unpack.PARTS[1:3]:
        (archives / name).unlink()
    unpack_from(archives, data_dir, "--all")
    assert videos(data_dir) == ["1", "2", "3"]
    assert set(tmp_path.rglob("*")) - before == {data_dir / "videos" / f"{number}.webm" for number in (1, 2, 3)}
    assert "7 chosen videos are still missing" in unpack_from(archives, data_dir).stdout


def test_no_part_and_annotations_that_are_there_already(archives, data_dir):
    for name in unpack.PARTS[:3]:
        (archives / name).unlink()
    train = data_dir / "annotations" / "train.json"
    train.write_text("[]")
    assert f"{unpack.PARTS[0]} is not in the folder" in error_line(unpack_from(archives, data_dir))
    assert train.read_text() == "[]"
