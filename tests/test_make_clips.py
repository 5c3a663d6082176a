"""Rendered clips: the command, its files, and whether the pictures show what the sentences say."""

import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import dataset
from data.dataset import TASK_TEMPLATES, plain_template
from data.files import only_one
from demo import make_clips
from demo.renderer.clip import TASKS, plan_clip, render_clip
from tests.commands import call, error_line

FEW = ("--num_train_clips", 3, "--num_val_clips", 1, "--num_workers", 1)


def run_make_clips(output_dir: Path, *options: object) -> subprocess.CompletedProcess:
    return call(make_clips, "--output_dir", output_dir, *options)


def file_bytes(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def clips_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 3 validation clips, made by the command; not to be changed."""
    folder = tmp_path_factory.mktemp("clips") / "demo"
    done = run_make_clips(folder, "--num_train_clips", 20, "--num_val_clips", 3, "--num_workers", 2)
    assert done.returncode == 0, done.stderr
    return folder


def read_entries(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / "annotations" / name).read_text(encoding="utf-8"))


def test_videos_are_vp9_of_sthv2s_size_and_rate(clips_dir: Path) -> None:
    entries = read_entries(clips_dir, "train.json") + read_entries(clips_dir, "validation.json")
    assert {path.stem for path in (clips_dir / "videos").iterdir()} == {entry["id"] for entry in entries}
    for entry in entries:
        path = clips_dir / "videos" / f"{entry['id']}.webm"
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        fourcc = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")
        assert fourcc == b"VP90"
        assert (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) == (320, 240)
        assert capture.get(cv2.CAP_PROP_FPS) == 12
        frames = list(render_clip(42, "train" if entry["id"][0] == "1" else "val", int(entry["id"][1:]))[1])
        assert 24 <= len(frames) <= 72
        for frame in frames:
            assert cv2.PSNR(frame, cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)) > 29  # compressed
        assert not capture.read()[0]


def test_the_filter_takes_all_tasks_and_leaves_out_the_rest(clips_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for path in (clips_dir / "annotations").iterdir():
        (tmp_path / "annotations" / path.name).write_bytes(path.read_bytes())
    assert call(dataset, "--data_dir", tmp_path).returncode == 0
    filtered = read_entries(tmp_path, "train_filtered.json")
    assert {entry["task"] for entry in filtered} == set(TASKS)
    left_out = {e["id"] for e in read_entries(tmp_path, "train.json")} - {e["id"] for e in filtered}
    assert left_out == {"1000019"}


def test_more_clips_other_processes_and_another_order_give_the_same_bytes(clips_dir: Path, tmp_path: Path) -> None:
    run_make_clips(tmp_path / "few", *FEW)
    few, many = file_bytes(tmp_path / "few" / "videos"), file_bytes(clips_dir / "videos")
    assert len(few) == 4
    assert all(many[name] == data for name, data in few.items())
    assert read_entries(tmp_path / "few", "train.json") == read_entries(clips_dir, "train.json")[:3]


def test_a_second_run_renders_only_what_is_missing(tmp_path: Path) -> None:
    run_make_clips(tmp_path / "demo", *FEW)
    complete = file_bytes(tmp_path / "demo")
    videos = tmp_path / "demo" / "videos"
    (videos / "1000001.webm").unlink()
    (videos / ".1000001.webm.partial").write_bytes(b"left by a killed run")
    kept = {path: path.stat().st_mtime_ns for path in videos.glob("*.webm")}
    assert "1 clips rendered, 3 were there already" in run_make_clips(tmp_path / "demo", *FEW).stdout
    assert file_bytes(tmp_path / "demo") == complete
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_what_would_be_mixed_or_overwritten_is_refused_in_one_line(clips_dir: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "annotations").mkdir(parents=True)
    (foreign / "annotations" / "train.json").write_text("[]")
    (tmp_path / "file").write_text("kept")
    before = file_bytes(clips_dir) | file_bytes(tmp_path)
    for folder, options in ((clips_dir, ("--seed", 7)), (foreign, ()), (tmp_path / "file", ())):
        line = error_line(run_make_clips(folder, *FEW, *options))
        assert str(folder) in line and "choose another --output_dir" in line
    assert "cannot be made" in error_line(run_make_clips(tmp_path / "file" / "clips", *FEW))
    with only_one(clips_dir, "rendering"):
        assert "another rendering is running" in error_line(run_make_clips(clips_dir, *FEW))
    assert file_bytes(clips_dir) | file_bytes(tmp_path) == before


def test_plans_are_balanced_unique_and_worded_as_in_sthv2() -> None:
    plans = [plan_clip(42, split, index) for split in ("train", "val") for index in range(480)]
    assert len({plan.annotation["id"] for plan in plans}) == len(plans)
    task_of = {template: task for task, templates in TASK_TEMPLATES.items() for template in templates}
    counts = {task: 0 for task in TASKS}
    for plan in plans:
        entry = plan.annotation
        assert entry["id"].isdigit()
        parts = entry["template"].lower().split("[something]")
        expected = "".join(part + phrase for part, phrase in zip(parts, entry["placeholders"] + [""], strict=True))
        assert entry["label"] == expected and "[" not in expected
        assert len({spec.kind_name for spec in plan.objects}) == len(plan.objects)
        task = task_of.get(plain_template(entry["template"]))
        if task:
            counts[task] += 1
    assert max(counts.values()) - min(counts.values()) <= 2
    assert sum(counts.values()) == 0.95 * len(plans)
    lengths = [plan.num_frames for plan in plans]
    assert min(lengths) >= 24 and max(lengths) <= 72 and 41 <= np.median(lengths) <= 49


def test_a_clip_depends_on_seed_split_and_index_alone() -> None:
    def first_frame(*clip: object) -> np.ndarray:
        return next(render_clip(*clip)[1])

    frame = first_frame(5, "train", 2)
    assert frame.shape == (240, 320, 3) and frame.dtype == np.uint8
    assert np.array_equal(frame, first_frame(5, "train", 2))
    for other in ((6, "train", 2), (5, "val", 2), (5, "pretrain", 2), (5, "train", 26)):
        assert not np.array_equal(frame, first_frame(*other))
    with pytest.raises(ValueError, match="split"):
        render_clip(5, "test", 0)


def frames_of(template: str, seed: int) -> np.ndarray:
    """All frames, (number, 240, 320, 3), of the first clip of this seed with the given template."""
    index = next(i for i in range(200) if plan_clip(seed, "val", i).annotation["template"] == template)
    return np.stack(list(render_clip(seed, "val", index)[1]))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "template, axis, sign",
    [
        ("Pushing [something] from left to right", 0, 1),
        ("Pulling [something] from left to right", 0, 1),
        ("Pushing [something] from right to left", 0, -1),
        ("Pulling [something] from right to left", 0, -1),
        ("Moving [something] up", 1, -1),
        ("Moving [something] down", 1, 1),
    ],
)
def test_things_move_the_way_the_sentence_says(template: str, axis: int, sign: int, seed: int) -> None:
    frames = frames_of(template, seed)
    start = int(0.45 * len(frames))
    before, after = (cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY) for i in (start, start + 2))
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 4, 21, 5, 7, 1.5, 0)
    speed = np.linalg.norm(flow, axis=2)
    moving = speed > 0.5 * speed.max()
    assert np.median(sign * flow[moving][:, axis]) > 1.0
