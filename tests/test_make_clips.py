"""Rendered clips: the command, its files, and whether the pictures show what the sentences say."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.dataset import TASK_TEMPLATES, plain_template
from data.files import only_one
from demo.renderer.actions import falling_height, minimum_jerk
from demo.renderer.clip import TASKS, plan_clip, render_clip
from demo.renderer.templates import ACTIONS

PROJECT = Path(__file__).parents[1]
LABELS = PROJECT.parent / "shared" / "sthv2" / "labels.json"


def run_make_clips(output_dir: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "demo.make_clips", "--output_dir", str(output_dir), *options]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def clips_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 3 validation clips, made by the command; not to be changed."""
    folder = tmp_path_factory.mktemp("clips") / "demo"
    result = run_make_clips(folder, "--num_train_clips", "20", "--num_val_clips", "3", "--num_workers", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Traceback") == 0
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
        decoded = 0
        while capture.read()[0]:
            decoded += 1
        assert 24 <= decoded <= 72
        split = "train" if entry in read_entries(clips_dir, "train.json") else "val"
        assert decoded == plan_clip(42, split, int(entry["id"][1:])).num_frames


def test_compression_keeps_the_rendered_picture(clips_dir: Path) -> None:
    capture = cv2.VideoCapture(str(clips_dir / "videos" / "1000004.webm"), cv2.CAP_FFMPEG)
    for frame in render_clip(42, "train", 4)[1]:
        decoded = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        assert cv2.PSNR(frame, decoded) > 30


def test_the_filter_takes_all_tasks_and_leaves_out_the_rest(clips_dir: Path) -> None:
    before = file_bytes(clips_dir / "annotations")
    command = [sys.executable, "-m", "data.dataset", "--data_dir", str(clips_dir)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    filtered = read_entries(clips_dir, "train_filtered.json")
    assert {entry["task"] for entry in filtered} == set(TASKS)
    left_out = {e["id"] for e in read_entries(clips_dir, "train.json")} - {e["id"] for e in filtered}
    assert left_out == {"1000019"}
    for path in (clips_dir / "annotations").iterdir():
        if path.name not in before:
            path.unlink()


def test_more_clips_and_another_order_give_the_same_bytes(clips_dir: Path, tmp_path: Path) -> None:
    result = run_make_clips(tmp_path / "few", "--num_train_clips", "4", "--num_val_clips", "2", "--num_workers", "1")
    assert result.returncode == 0, result.stderr
    few, many = file_bytes(tmp_path / "few" / "videos"), file_bytes(clips_dir / "videos")
    assert len(few) == 6
    assert all(many[name] == data for name, data in few.items())
    assert read_entries(tmp_path / "few", "train.json") == read_entries(clips_dir, "train.json")[:4]


def test_a_second_run_renders_only_what_is_missing(tmp_path: Path) -> None:
    options = ("--num_train_clips", "3", "--num_val_clips", "1", "--num_workers", "1")
    run_make_clips(tmp_path / "demo", *options)
    complete = file_bytes(tmp_path / "demo")
    videos = tmp_path / "demo" / "videos"
    (videos / "1000001.webm").unlink()
    (videos / ".1000001.webm.partial").write_bytes(b"left by a killed run")
    kept = {path.name: path.stat().st_mtime_ns for path in videos.glob("*.webm")}
    result = run_make_clips(tmp_path / "demo", *options)
    assert "1 clips rendered, 3 were there already" in result.stdout
    assert file_bytes(tmp_path / "demo") == complete
    assert all((videos / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_a_folder_of_another_seed_or_of_someone_else_is_refused(clips_dir: Path, tmp_path: Path) -> None:
    before = file_bytes(clips_dir)
    foreign = tmp_path / "foreign"
    (foreign / "annotations").mkdir(parents=True)
    (foreign / "annotations" / "train.json").write_text("[]")
    for folder, options in ((clips_dir, ("--seed", "7")), (foreign, ())):
        result = run_make_clips(folder, "--num_train_clips", "1", "--num_val_clips", "0", *options)
        assert result.returncode == 1
        assert str(folder) in result.stderr and "--output_dir" in result.stderr
        assert result.stderr.count("\n") == 1
    assert file_bytes(clips_dir) == before
    assert file_bytes(foreign) == {"annotations/train.json": b"[]"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    result = run_make_clips(tmp_path / "file" / "clips", "--num_train_clips", "1", "--num_val_clips", "0")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "file/clips" in result.stderr and "cannot be made" in result.stderr


def test_a_second_command_beside_the_first_is_one_line(tmp_path: Path) -> None:
    options = ("--num_train_clips", "1", "--num_val_clips", "0")
    run_make_clips(tmp_path / "demo", *options)
    before = file_bytes(tmp_path / "demo")
    with only_one(tmp_path / "demo", "rendering"):
        result = run_make_clips(tmp_path / "demo", *options)
    assert result.returncode == 1
    assert "another rendering is running" in result.stderr and result.stderr.count("\n") == 1
    assert file_bytes(tmp_path / "demo") == before


@pytest.mark.parametrize("options", [("--num_workers", "0"), ("--num_train_clips", "-1"), ("--seed", "-3")])
def test_impossible_options_are_refused(options: tuple[str, str], tmp_path: Path) -> None:
    result = run_make_clips(tmp_path / "demo", *options)
    assert result.returncode == 2 and options[0] in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "demo").exists()


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


def test_every_action_belongs_to_the_task_it_is_listed_under() -> None:
    for task, actions in ACTIONS.items():
        for action in actions:
            names = [name for name, templates in TASK_TEMPLATES.items() if plain_template(action.template) in templates]
            assert names == ([] if task == "other" else [task]), action.template


@pytest.mark.skipif(not LABELS.exists(), reason="needs ../shared/sthv2/labels.json")
def test_every_template_is_one_of_sthv2s() -> None:
    official = json.loads(LABELS.read_text(encoding="utf-8"))
    assert all(plain_template(a.template) in official for actions in ACTIONS.values() for a in actions)


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


@pytest.mark.parametrize(
    "template",
    [
        "[Something] falling like a rock",
        "[Something] falling like a feather or paper",
        "Pushing [something] so that it falls off the table",
        "Dropping [something] next to [something]",
    ],
)
def test_what_falls_ends_lower_than_it_began(template: str) -> None:
    frames = frames_of(template, 3)
    background = np.median(frames, axis=0)

    def lowest_foreground(share: float) -> float:
        frame = frames[min(int(share * len(frames)), len(frames) - 1)]
        rows = np.flatnonzero((np.abs(frame - background).max(axis=2) > 40).sum(axis=1) > 8)
        return float(rows.max()) if len(rows) else -1.0

    assert lowest_foreground(0.99) > lowest_foreground(0.2) + 25


def test_a_cover_hides_what_it_covers() -> None:
    index = next(
        i
        for i in range(400)
        if (plan := plan_clip(4, "val", i)).action.template.startswith("Covering")
        and min(plan.objects[0].color) < 60
        and max(plan.objects[0].color) > 150
        and max(plan.objects[1].color) - min(plan.objects[1].color) < 40
    )
    color = np.array(plan_clip(4, "val", index).objects[0].color, float)
    frames = list(render_clip(4, "val", index)[1])

    def pixels_of_the_object(frame: np.ndarray) -> int:
        region = frame[125:, 60:260].reshape(-1, 3).astype(float)  # where the action takes place
        norms = np.linalg.norm(region, axis=1) * np.linalg.norm(color)
        return int(((region @ color) / np.maximum(norms, 1) > 0.99).sum())

    assert pixels_of_the_object(frames[0]) > 300
    assert pixels_of_the_object(frames[-1]) < 0.1 * pixels_of_the_object(frames[0])


def test_most_clips_move_between_frames_20_and_25() -> None:
    still = 0
    for index in range(18):
        frames = [
            cv2.resize(frame, (96, 96), interpolation=cv2.INTER_AREA)
            for _, frame in zip(range(26), render_clip(9, "train", index)[1], strict=False)
        ]
        still += len(frames) == 26 and cv2.PSNR(frames[20], frames[25]) > 34
    assert still <= 4


@given(st.floats(-1, 2), st.floats(0, 1))
def test_minimum_jerk_rises_from_rest_to_rest(share: float, step: float) -> None:
    assert 0 <= minimum_jerk(share) <= minimum_jerk(share + step) + 1e-12 <= 1 + 1e-9
    assert minimum_jerk(0.01) < 2e-5 and minimum_jerk(0.99) > 1 - 2e-5 and minimum_jerk(0.5) == 0.5


@given(st.floats(10, 150), st.floats(3600, 4800), st.floats(0, 0.6), st.floats(0, 1))
def test_a_fall_accelerates_bounces_lower_and_rests(
    drop: float, gravity: float, restitution: float, elapsed: float
) -> None:
    impact = (2 * drop / gravity) ** 0.5
    height = falling_height(elapsed, drop, gravity, restitution)
    assert -1e-9 <= height <= drop
    if elapsed < impact:
        assert height == pytest.approx(drop - gravity * elapsed**2 / 2, abs=1e-6)
    else:
        assert height <= restitution**2 * drop + 1e-6
    assert falling_height(impact * 6, drop, gravity, restitution) == 0
