"""Your own videos: from files and captions to a data directory that extraction, training and sampling take."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import own_videos, video_loader
from data.files import write_json
from data.paths import (
    SPLITS,
    filtered_annotations_path,
    find_video,
    frame_path,
    frames_dir,
    read_filtered_annotations,
)
from data.video_decoder import load_picture
from tests.commands import call, error_line
from tests.conftest import SIDE, run
from tests.test_video_loader import write_video

CLIPS = {  # each container, and names that make no id
    "pour_milk.mp4": "mp4v",
    "open drawer.MOV": "mp4v",
    "shut.avi": "MJPG",
    "kitchen/shut.mkv": "MJPG",
    "把杯子.webm": "VP80",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips of 23 frames; read-only by agreement."""
    folder = tmp_path_factory.mktemp("my clips")
    (folder / "kitchen").mkdir()
    (folder / "notes.txt").touch()
    for seed, (name, fourcc) in enumerate(CLIPS.items()):
        path = folder / name
        write_video(path, num_frames=23, size=(40, 24), fourcc=fourcc, suffix=path.suffix.lower(), seed=seed)
    return folder


@pytest.fixture
def prepare(videos, tmp_path):
    """A function that makes a data directory of captions, given as text."""

    def prepare(captions, *options, encoding="utf-8", fails=False):
        (tmp_path / "captions").write_text(captions, encoding)
        where = ("--videos", videos, "--captions", tmp_path / "captions", "--data_dir", tmp_path / "mine")
        done = call(own_videos, *where, *options)
        assert fails or not done.returncode, done.stderr
        return done

    return prepare


def csv_of(names, caption="moving a cup"):
    return "file,caption\n" + "".join(f"{name},{caption}\n" for name in names)


def entries_of(data_dir):
    return {entry["file"]: entry for split in SPLITS for entry in read_filtered_annotations(data_dir, split)}


def test_csv_becomes_a_data_directory_to_train_on_and_sample_from(prepare, videos, tmp_path, tiny_model):
    rows = [
        "\ufefffile, caption, task, split",
        'pour_milk.mp4, "pouring milk, slowly", pour, ',
        "open drawer.MOV, opening a drawer, open, train",
        "shut.avi, shutting a drawer, open, val",
        "kitchen/shut.mkv, shutting a door, , val",
        "把杯子.webm, moving a cup up, move_object, train",
    ]
    printed = prepare("\r\n".join(rows)).stdout
    assert "train: 3 videos in " in printed and "val: 2 videos in " in printed
    data_dir = tmp_path / "mine"
    entries = entries_of(data_dir)
    assert entries.keys() == CLIPS.keys()
    for file, entry in entries.items():
        link = find_video(data_dir, entry["id"])
        assert link.is_symlink() and link.samefile(videos / file)
    assert len({entry["id"] for entry in entries.values()}) == len(CLIPS)
    assert entries["pour_milk.mp4"]["id"] == "pour_milk"
    assert (entries["pour_milk.mp4"]["label"], entries["pour_milk.mp4"]["task"]) == ("pouring milk, slowly", "pour")
    assert {entry["file"] for entry in read_filtered_annotations(data_dir, "val")} == {"shut.avi", "kitchen/shut.mkv"}

    call(video_loader, "--data_dir", data_dir, "--resolutions", SIDE)
    assert {entry["num_frames"] for entry in entries_of(data_dir).values()} == {23}
    options = ["--resolution", SIDE, "--max_train_steps", 1, "--num_validation_images", 1, "--num_inference_steps", 1]
    command = ["python", "train_instruct_pix2pix.py", "--pretrained_model_name_or_path", tiny_model]
    run(*command, "--train_data_dir", data_dir, "--output_dir", tmp_path / "model", "--add_progress", *options)
    command = ["python", "sample_from_pix2pix.py", "--model_dir", tmp_path / "model"]
    done = run(*command, "--output_dir", tmp_path / "samples")
    assert "all, 2 pairs" in done.stdout
    samples = json.loads((tmp_path / "samples" / "metrics.json").read_text())["samples"]
    assert sorted(row["task"] for row in samples) == ["open", "unknown"]
    [prompt] = [row["edit_prompt"] for row in samples if row["video_id"] == entries["shut.avi"]["id"]]
    assert prompt.endswith("this action: shutting a drawer. And 80% of the action has been completed.")


@pytest.mark.filterwarnings("error")  # which a user would see
def test_json_lines_make_the_same_as_csv_and_again_the_same(prepare, tmp_path):
    prepare(csv_of(CLIPS))
    data_dir = tmp_path / "mine"
    first = {split: read_filtered_annotations(data_dir, split) for split in SPLITS}
    assert len(first["val"]) == 1  # a tenth of five is none: at least one
    prepare("\n".join(json.dumps({"file": name, "caption": "moving a cup"}) for name in reversed(CLIPS)))
    for split in SPLITS:
        assert sorted(read_filtered_annotations(data_dir, split), key=str) == sorted(first[split], key=str)
    prepare(csv_of(CLIPS), "--val_fraction", 0.6)
    assert len(read_filtered_annotations(data_dir, "val")) == 3


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("video,text\na.mp4,moving\n", "the columns are video,text; name them file,caption,task,split"),
        ("file,caption,spilt\nshut.avi,moving,val\n", "the columns are file,caption,spilt; name them"),
        ('{"file": "shut.avi", "text": "moving"}', "the columns are file,text; name them"),
        ("", "cannot be read as CSV or JSON Lines (No columns to parse from file)"),
        ("file,caption\n", "names no video"),
        ("file,caption\nshut.avi,pulling, then pushing\n", 'put a caption with commas in "double quotes"'),
        ('file,caption\nshut.avi,"pulling\n', "cannot be read as CSV or JSON Lines"),
        (csv_of(["shut.avi", "nothing.mp4"]), "row 2: there is no file "),
        (csv_of(["shut.avi"], caption="  "), "row 1: the caption is empty; write what is done in shut.avi"),
        (csv_of(["shut.avi", "pour_milk.mp4", "./shut.avi"]), "row 3: ./shut.avi is named in "),
        (csv_of(["shut.avi", "notes.txt"]), "notes.txt is none of .webm, .mp4, "),
        ("file,caption,split\nshut.avi,moving,test\n", "row 1: the split is 'test'; write train or val"),
        ("file,caption,split\nshut.avi,a,train\npour_milk.mp4,b,train\n", "no video is left for val"),
        ("file,Caption,caption\nshut.avi,pulling,pushing\n", "the columns are file,caption,caption.1; name them"),
        ("file,caption,\nshut.avi,pulling, then pushing\n", "the columns are file,caption,Unnamed: 2; name them"),
        ("input,caption\nshut.avi,pulling\n", "the columns are input,caption; name them"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_is_written(prepare, tmp_path, captions, message):
    assert message in error_line(prepare(captions, fails=True))
    assert not (tmp_path / "mine").exists()


def test_a_spreadsheet_that_is_not_utf8_is_one_line(prepare):
    line = error_line(prepare(csv_of(["shut.avi"], caption="Schublade öffnen"), encoding="latin-1", fails=True))
    assert ', line 2: this is not UTF-8 text; save it again as "CSV UTF-8"' in line


@pytest.mark.parametrize(
    "captions",
    [
        "sep=;\nFile;Caption;\nshut.avi;pulling, then pushing;\n;;\n",
        "file\tcaption\nshut.avi\tpulling, then pushing\n",
        'file,caption,,\nshut.avi,"pulling, then pushing",,\n,,,\n,,,\n',
        "\n;;\n Caption ;FILE\npulling, then pushing;shut.avi\n",
        'file,caption\rshut.avi,"pulling, then pushing"\r',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_spreadsheets_write_is_read(prepare, tmp_path, captions, encoding):
    prepare(captions, encoding=encoding)
    assert entries_of(tmp_path / "mine")["shut.avi"]["label"] == "pulling, then pushing"


def test_names_are_those_on_disk_whatever_their_spaces_and_however_letters_are_written(tmp_path):
    names = {"two  spaces.mp4": "two spaces.mp4", "at 9.41\u202fAM.mp4": "at 9.41 AM.mp4"}
    names[unicodedata.normalize("NFD", "übung.mp4")] = "übung.mp4"
    (tmp_path / "clips").mkdir()
    for name in names:
        (tmp_path / "clips" / name).touch()
    (tmp_path / "captions.csv").write_text(csv_of(names.values()), "utf-8")
    where = ("--videos", tmp_path / "clips", "--captions", tmp_path / "captions.csv", "--data_dir", tmp_path / "mine")
    call(own_videos, *where)
    entries = entries_of(tmp_path / "mine")
    for name, written in names.items():
        assert find_video(tmp_path / "mine", entries[written]["id"]).samefile(tmp_path / "clips" / name)
    assert entries["übung.mp4"]["id"] == "übung"


def test_videos_are_copied_where_links_cannot_be_made(prepare, videos, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert "copied, as links cannot be made there" in prepare(csv_of(["shut.avi", "pour_milk.mp4"])).stdout
    copy = tmp_path / "mine" / "videos" / "shut.avi"
    assert not copy.is_symlink() and copy.read_bytes() == (videos / "shut.avi").read_bytes()
    assert ", copied" not in prepare(csv_of(["shut.avi", "pour_milk.mp4"])).stdout  # they are there


def test_pairs_of_pictures_become_clips_of_two_frames(tmp_path):
    folder, data_dir = tmp_path / "pictures", tmp_path / "mine"
    folder.mkdir()
    lines = ["input,target,caption"]
    for number, colors in enumerate((("red", "blue"), ("lime", "black"), ("white", "red"))):
        for name, color, size in zip(("before.png", "after it.jpg"), colors, ((40, 24), (300, 200))):
            Image.new("RGB", size, color).save(folder / f"{number} {name}", quality=95)
        lines.append(f"{number} before.png,{number} after it.jpg,painting it")
    (folder / "2 after it.jpg").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    where = ("--videos", folder, "--captions", tmp_path / "pairs.csv", "--data_dir", data_dir)
    last_line = call(own_videos, *where).stdout.splitlines()[-1]
    assert last_line.endswith(" INPUT_FRAME_IDX=0 TARGET_FRAME_IDX=1 bash train_instruct_pix2pix.sh")
    assert not call(video_loader, "--data_dir", data_dir, "--resolutions", SIDE).returncode
    entries = entries_of(data_dir)
    for file, colors in (
        ("0 before.png, 0 after it.jpg", ((255, 0, 0), (0, 0, 255))),
        ("1 before.png, 1 after it.jpg", ((0, 255, 0), (0, 0, 0))),
    ):
        assert entries[file]["num_frames"] == 2
        for index, color in enumerate(colors):
            frame = load_picture(frame_path(frames_dir(data_dir, SIDE), entries[file]["id"], index))
            assert frame.shape == (SIDE, SIDE, 3) and np.abs(frame.astype(int) - color).max() <= 3
    broken = entries["2 before.png, 2 after it.jpg"]
    assert "num_frames" not in broken
    log = (data_dir / "frames_extraction.log").read_text("utf-8")
    assert f"{broken['id']}: unreadable: " in log and "cannot be read as a picture" in log


def test_frames_of_another_video_are_never_taken_for_those_of_this_one(prepare, tmp_path):
    prepare(csv_of(["shut.avi", "pour_milk.mp4"]))
    assert entries_of(tmp_path / "mine")["shut.avi"]["id"] == "shut"
    prepare(csv_of(["kitchen/shut.mkv", "pour_milk.mp4"]))
    assert entries_of(tmp_path / "mine")["kitchen/shut.mkv"]["id"] != "shut"
    (tmp_path / "mine" / "videos" / "shut.avi").unlink()
    (tmp_path / "mine" / "videos" / "shut.mp4").write_bytes(b"another")
    done = prepare(csv_of(["shut.avi", "pour_milk.mp4"]), fails=True)
    assert "shut.mp4 is another file than" in error_line(done)


def test_the_lists_of_other_videos_are_not_replaced(prepare, tmp_path):
    path = filtered_annotations_path(tmp_path / "mine", "val")
    path.parent.mkdir(parents=True)
    write_json(path, [{"id": "74225", "label": "moving a cup up", "task": "move_object"}])
    before = path.read_bytes()
    done = prepare(csv_of(["shut.avi", "pour_milk.mp4"]), fails=True)
    assert f"{path} lists other videos than your own" in error_line(done)
    assert path.read_bytes() == before
