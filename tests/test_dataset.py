"""Filtering and sampling: the command, the files it writes, and its messages about bad input."""

import json
import re
import shutil
import subprocess

import pytest

from data import dataset, paths
from tests.commands import call, error_line
from tests.conftest import SHARED

GOOD = {"id": "1", "label": "moving a cup up", "template": "Moving [something] up"}
ALL_TEMPLATES = [template for templates in dataset.TASK_TEMPLATES.values() for template in templates]


def run_filter(data_dir, *options):
    return call(dataset, "--data_dir", data_dir, *options)


def make_entries(first_id, per_template):
    """`per_template` entries of each template of the tasks, and of two others that contain one of them."""
    others = [
        "Putting something onto something else that cannot support it so it falls down",
        "Pretending to put something onto something",
    ]
    bracketed = [re.sub(r"\b([Ss]omething)\b", r"[\1]", template) for template in ALL_TEMPLATES + others]
    return [
        {"id": str(first_id + index), "label": f"label {index}", "template": template, "placeholders": []}
        for index, template in enumerate(bracketed * per_template)
    ]


def write_sources(data_dir, train, val):
    (data_dir / "annotations").mkdir(exist_ok=True)
    (data_dir / "annotations" / "train.json").write_text(json.dumps(train))
    (data_dir / "annotations" / "validation.json").write_text(json.dumps(val))


@pytest.fixture
def data_dir(tmp_path):
    write_sources(tmp_path, make_entries(0, 3), make_entries(100_000, 2))
    return tmp_path


def outputs(data_dir):
    return {split: paths.filtered_annotations_path(data_dir, split) for split in paths.SPLITS}


def read_outputs(data_dir):
    return {split: json.loads(path.read_text(encoding="utf-8")) for split, path in outputs(data_dir).items()}


def contents(folder):
    """Every file's bytes; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# The templates of the tasks.


def test_a_template_that_sthv2_does_not_have_is_refused_by_name(data_dir, monkeypatch):
    monkeypatch.setitem(dataset.TASK_TEMPLATES, "move_object", ("Moving something up", "Moving something upwards"))
    line = error_line(run_filter(data_dir))
    assert "move_object: SSv2 has no template 'Moving something upwards', but 'Moving something up'" in line
    assert not outputs(data_dir)["train"].exists()
    monkeypatch.setitem(dataset.TASK_TEMPLATES, "move_object", ("Putting something onto something",))
    assert "is in move_object and in cover_object" in error_line(run_filter(data_dir))
    monkeypatch.setitem(dataset.TASK_TEMPLATES, "move_object", "Moving something up")
    assert "a single template needs a comma after it: ('Moving something up',)" in error_line(run_filter(data_dir))


@pytest.mark.skipif(not (SHARED / "sthv2").is_dir(), reason="../shared/sthv2 is not here")
def test_official_templates_and_annotations(tmp_path):
    official = json.loads((SHARED / "sthv2" / "labels.json").read_text())
    assert sorted(official) == sorted(dataset.SSV2_TEMPLATES.read_text(encoding="utf-8").splitlines())
    assert len(ALL_TEMPLATES) == len(set(ALL_TEMPLATES))
    sample = json.loads((SHARED / "sthv2" / "annotations_sample.json").read_text())
    write_sources(tmp_path, sample[::2], sample[1::2])
    assert run_filter(tmp_path).returncode == 0
    found, originals = read_outputs(tmp_path), {entry["id"]: entry for entry in sample}
    assert found["train"] and found["val"]
    for entry in found["train"] + found["val"]:
        assert {key: value for key, value in entry.items() if key != "task"} == originals[entry["id"]]


def test_templates_match_whole_and_without_brackets():
    matched = dataset.match_tasks(make_entries(0, 1), list(dataset.TASK_TEMPLATES))
    for task, templates in dataset.TASK_TEMPLATES.items():
        found = [dataset.plain_template(entry["template"]) for entry in matched if entry["task"] == task]
        assert found == list(templates)


# Sampling.


def test_same_seed_same_bytes_whatever_the_order_of_the_file(data_dir):
    assert run_filter(data_dir, "--train_samples_per_task", 20).returncode == 0
    first = {split: path.read_bytes() for split, path in outputs(data_dir).items()}
    write_sources(data_dir, make_entries(0, 3)[::-1], make_entries(100_000, 2))
    assert run_filter(data_dir, "--train_samples_per_task", 20).returncode == 0
    assert {split: path.read_bytes() for split, path in outputs(data_dir).items()} == first
    assert run_filter(data_dir, "--train_samples_per_task", 20, "--seed", 7).returncode == 0
    assert outputs(data_dir)["train"].read_bytes() != first["train"]


def test_each_task_has_as_many_as_asked_or_all_and_the_table_says_so(data_dir):
    printed = run_filter(data_dir, "--train_samples_per_task", 42, "--val_samples_per_task", 1).stdout
    found = read_outputs(data_dir)
    for task, templates in dataset.TASK_TEMPLATES.items():
        matched = 3 * len(templates)
        sampled = {split: sum(entry["task"] == task for entry in entries) for split, entries in found.items()}
        assert sampled == {"train": min(42, matched), "val": 1}
        assert re.search(rf"^{task} +train +{matched} +{matched} +{min(42, matched)}$", printed, re.MULTILINE)


def test_samples_only_videos_that_exist(data_dir):
    (data_dir / "videos").mkdir()
    assert "No videos in" in run_filter(data_dir).stdout
    for name in ("0.webm", "1.mp4", "2.txt", "100000.webm"):
        (data_dir / "videos" / name).touch()
    printed, found = run_filter(data_dir).stdout, read_outputs(data_dir)
    assert {entry["id"] for entry in found["train"]} == {"0", "1"}
    assert [entry["id"] for entry in found["val"]] == ["100000"]
    matched = 3 * len(dataset.TASK_TEMPLATES["move_object"])
    assert re.search(rf"^move_object +train +{matched} +2 +2$", printed, re.MULTILINE)
    shutil.rmtree(data_dir / "videos")
    (data_dir / "videos").mkdir()
    (data_dir / "videos" / "other.webm").touch()
    assert "no matching video is in" in error_line(run_filter(data_dir))


@pytest.mark.parametrize("place", ["20bn-something-something-v2", "videos/20bn-something-something-v2", "."])
def test_videos_beside_or_below_their_folder_are_noticed(data_dir, place):
    (data_dir / place).mkdir(parents=True, exist_ok=True)
    (data_dir / place / "0.webm").touch()
    line = run_filter(data_dir).stderr.splitlines()[0]
    assert line.startswith(f"warning: videos lie outside {data_dir}/videos; move them: ")
    subprocess.run(line.partition("move them: ")[2], shell=True, check=True)
    done = run_filter(data_dir)
    assert [entry["id"] for entry in read_outputs(data_dir)["train"]] == ["0"]
    assert done.stderr.startswith("warning: no validation video is chosen")


def test_integer_ids_are_taken_as_strings(data_dir):
    write_sources(data_dir, [{**GOOD, "id": 7}], make_entries(100_000, 1))
    assert not run_filter(data_dir).returncode
    assert [entry["id"] for entry in read_outputs(data_dir)["train"]] == ["7"]


def test_what_is_in_both_files_is_used_for_training_only(data_dir):
    write_sources(data_dir, make_entries(0, 1), make_entries(20, 1))
    num_shared = len(make_entries(0, 1)) - 20
    assert f"{num_shared} ids are in both annotation files" in run_filter(data_dir).stdout
    train, val = ({entry["id"] for entry in entries} for entries in read_outputs(data_dir).values())
    assert "20" in train and val and not train & val


def test_published_file_names(data_dir):
    for name in ("train", "validation"):
        path = data_dir / "annotations" / f"{name}.json"
        path.rename(path.with_name(f"something-something-v2-{name}.json"))
    assert run_filter(data_dir).returncode == 0
    assert read_outputs(data_dir)["val"]


# Bad input: one line with the file and the entry, and nothing is written.

BLANK = "is missing, blank or not a string"
NO_NAME = "the id cannot name a file"
BAD = [
    (["x"], "must be an object"),
    ({"label": "a"}, f"id {BLANK}"),
    ({**GOOD, "id": 2.5}, f"id {BLANK}"),
    ({**GOOD, "id": ""}, f"id {BLANK}"),
    (GOOD, "the id occurs twice"),
    *(({**GOOD, "id": video_id}, NO_NAME) for video_id in ("../../x", "a/b", "2\n", ".2", "..", "2\0", "2" * 300)),
    ({"id": "2", "template": "b"}, f"label {BLANK}"),
    ({**GOOD, "id": "2", "label": []}, f"label {BLANK}"),
    ({**GOOD, "id": "2", "label": "  "}, f"label {BLANK}"),
    ({**GOOD, "id": "2", "template": ""}, f"template {BLANK}"),
]
CONTENTS = [(json.dumps([GOOD, entry]).encode(), message) for entry, message in BAD]
CONTENTS += [(content, "is not valid JSON") for content in (b"", b'[{"id": "1", "lab', b"\xff\xfe\x00\x01")]
CONTENTS += [(b'{"id": "1"}', "the file must be a list of entries")]


@pytest.mark.parametrize(("content", "message"), CONTENTS)
def test_bad_annotations_are_one_line_and_nothing_is_written(data_dir, content, message):
    path = data_dir / "annotations" / "validation.json"
    path.write_bytes(content)
    before = contents(data_dir)
    line = error_line(run_filter(data_dir))
    assert line.startswith(f"error: {path}") and message in line and len(line) < 1000
    assert contents(data_dir) == before


def test_missing_annotations_say_where_to_get_them(tmp_path):
    line = error_line(run_filter(tmp_path / "nothing"))
    assert "developer.qualcomm.com" in line and "train.json" in line
