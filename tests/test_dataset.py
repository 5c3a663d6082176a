"""Filtering and sampling: the command, the files it writes, and what it says about bad input.

The fuzz tests make 300 cases each; FUZZ_CASES sets another number:

    FUZZ_CASES=20000 python -m pytest tests/test_dataset.py -k fuzz
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cli, dataset, paths

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", 300))
needs_shared = pytest.mark.skipif(not (SHARED / "sthv2").is_dir(), reason="../shared/sthv2 is not here")


def run_filter(data_dir, *options):
    command = [sys.executable, "-m", "data.dataset", "--data_dir", str(data_dir), *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def bracketed(template):
    """A template as annotations spell it."""
    return re.sub(r"\b([Ss]omething)\b", r"[\1]", template)


def make_entries(first_id, per_template):
    """`per_template` entries of every listed template, and of two that are listed nowhere."""
    templates = [template for templates in dataset.TASK_TEMPLATES.values() for template in templates]
    templates += [
        "Putting something onto something else that cannot support it so it falls down",
        "Pretending to put something onto something",
    ]
    return [
        {"id": str(first_id + index), "label": f"label {index}", "template": bracketed(template), "placeholders": []}
        for index, template in enumerate(templates * per_template)
    ]


@pytest.fixture
def data_dir(tmp_path):
    write_sources(tmp_path, make_entries(0, 3), make_entries(100_000, 2))
    return tmp_path


def write_sources(data_dir, train, val):
    (data_dir / "annotations").mkdir(exist_ok=True)
    (data_dir / "annotations" / "train.json").write_text(json.dumps(train), encoding="utf-8")
    (data_dir / "annotations" / "validation.json").write_text(json.dumps(val), encoding="utf-8")


def outputs(data_dir):
    return {split: paths.filtered_annotations_path(data_dir, split) for split in paths.SPLITS}


def read_outputs(data_dir):
    return {split: json.loads(path.read_text(encoding="utf-8")) for split, path in outputs(data_dir).items()}


def ids_of_task(entries, task):
    return [entry["id"] for entry in entries if entry["task"] == task]


# The task lists.


@needs_shared
def test_every_listed_template_is_official():
    official = json.loads((SHARED / "sthv2" / "labels.json").read_text())
    for templates in dataset.TASK_TEMPLATES.values():
        assert set(templates) <= set(official)


def test_no_template_is_listed_twice():
    listed = [template for templates in dataset.TASK_TEMPLATES.values() for template in templates]
    assert len(listed) == len(set(listed))


def test_no_pretended_failed_or_falling_placement():
    for task, templates in dataset.TASK_TEMPLATES.items():
        for template in templates:
            assert not re.search(r"pretend|fail|almost|camera|collid|spin|part of|one end", template, re.IGNORECASE)
            assert task == "drop_object" or not re.search(r"so it (falls|slides)|falls (down|off)", template)


def test_templates_match_whole_and_without_brackets():
    entries = make_entries(0, 1)
    matched = dataset.match_tasks(entries, list(dataset.TASK_TEMPLATES))
    for task, templates in dataset.TASK_TEMPLATES.items():
        found = [dataset.plain_template(entry["template"]) for entry in matched if entry["task"] == task]
        assert found == list(templates)


@needs_shared
def test_official_sample_as_both_files(tmp_path):
    sample = json.loads((SHARED / "sthv2" / "annotations_sample.json").read_text())
    write_sources(tmp_path, sample, sample)
    result = run_filter(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "400 ids are in both annotation files" in result.stdout
    found = read_outputs(tmp_path)
    assert found["train"] and found["val"]
    assert not {entry["id"] for entry in found["train"]} & {entry["id"] for entry in found["val"]}
    originals = {entry["id"]: entry for entry in sample}
    for entry in found["train"] + found["val"]:
        assert dataset.plain_template(entry["template"]) in dataset.TASK_TEMPLATES[entry["task"]]
        assert {key: value for key, value in entry.items() if key != "task"} == originals[entry["id"]]


# Sampling.


def test_same_seed_same_bytes_whatever_the_order_of_the_file(data_dir):
    assert run_filter(data_dir, "--train_samples_per_task", 20).returncode == 0
    first = {split: path.read_bytes() for split, path in outputs(data_dir).items()}
    train = json.loads((data_dir / "annotations" / "train.json").read_text())
    write_sources(data_dir, train[::-1], make_entries(100_000, 2))
    assert run_filter(data_dir, "--train_samples_per_task", 20).returncode == 0
    assert {split: path.read_bytes() for split, path in outputs(data_dir).items()} == first
    assert run_filter(data_dir, "--train_samples_per_task", 20, "--seed", 7).returncode == 0
    assert outputs(data_dir)["train"].read_bytes() != first["train"]


def test_counts_and_tasks(data_dir):
    result = run_filter(data_dir, "--train_samples_per_task", 20, "--val_samples_per_task", 5)
    found = read_outputs(data_dir)
    for task, templates in dataset.TASK_TEMPLATES.items():
        assert len(ids_of_task(found["train"], task)) == 20
        assert len(ids_of_task(found["val"], task)) == 5
        assert re.search(
            rf"^{task} +train +{3 * len(templates)} +{3 * len(templates)} +20$", result.stdout, re.MULTILINE
        )


def test_a_task_is_sampled_the_same_alone_and_with_others(data_dir):
    run_filter(data_dir, "--train_samples_per_task", 10)
    together = read_outputs(data_dir)
    run_filter(data_dir, "--train_samples_per_task", 10, "--tasks", "drop_object")
    alone = read_outputs(data_dir)
    assert {entry["task"] for entry in alone["train"]} == {"drop_object"}
    for split in paths.SPLITS:
        assert ids_of_task(alone[split], "drop_object") == ids_of_task(together[split], "drop_object")


def test_fewer_than_asked_takes_all_and_says_so(data_dir):
    result = run_filter(data_dir)
    assert len(read_outputs(data_dir)["train"]) == 3 * sum(map(len, dataset.TASK_TEMPLATES.values()))
    assert re.search(r"^drop_object +train +39 +39 +39$", result.stdout, re.MULTILINE)
    assert "Asked for 1000 training" in result.stdout


def test_samples_only_videos_that_exist(data_dir):
    (data_dir / "videos").mkdir()
    assert "No videos in" in run_filter(data_dir).stdout
    for name in ("0.webm", "1.mp4", "2.txt", "100000.webm"):
        (data_dir / "videos" / name).touch()
    result = run_filter(data_dir)
    found = read_outputs(data_dir)
    assert {entry["id"] for entry in found["train"]} == {"0", "1"}
    assert [entry["id"] for entry in found["val"]] == ["100000"]
    assert re.search(r"^move_object +train +48 +2 +2$", result.stdout, re.MULTILINE)
    shutil.rmtree(data_dir / "videos")
    (data_dir / "videos").mkdir()
    (data_dir / "videos" / "other.webm").touch()
    assert "no matching video is in" in run_filter(data_dir).stderr


def test_published_file_names(data_dir):
    folder = data_dir / "annotations"
    (folder / "train.json").rename(folder / "something-something-v2-train.json")
    (folder / "validation.json").rename(folder / "something-something-v2-validation.json")
    assert run_filter(data_dir).returncode == 0
    assert read_outputs(data_dir)["val"]


def test_unusual_labels_survive(data_dir):
    labels = ["把杯子往上移", "moving a 🧸 up", "x" * 10_000_000, 'quote " and \\ and\nnewline']
    train = [
        {"id": f"v-{i}_a.b", "label": label, "template": "Moving [something] up"} for i, label in enumerate(labels)
    ]
    write_sources(data_dir, train, [])
    assert run_filter(data_dir).returncode == 0
    text = outputs(data_dir)["train"].read_text(encoding="utf-8")
    assert sorted(entry["label"] for entry in json.loads(text)) == sorted(labels)
    assert "把杯子往上移" in text


# Bad input: one line, naming file and entry, and no output touched.

GOOD = {"id": "1", "label": "moving a cup up", "template": "Moving [something] up"}
BAD_ENTRIES = {
    "not an object": (["x"], "entry 2, ['x']: must be an object"),
    "no id": ({"label": "a", "template": "b"}, "id is missing, blank or not a string"),
    "number": ({**GOOD, "id": 2}, "id is missing, blank or not a string"),
    "null": ({**GOOD, "id": None}, "id is missing, blank or not a string"),
    "duplicate": ({**GOOD, "id": "1"}, "the id occurs twice"),
    "parent": ({**GOOD, "id": "../../x"}, "entry 2, {'id': '../../x', 'label': 'moving a cup up'"),
    "slash": ({**GOOD, "id": "a/b"}, "the id cannot name a file"),
    "newline": ({**GOOD, "id": "2\n"}, "the id cannot name a file"),
    "hidden": ({**GOOD, "id": ".2"}, "the id cannot name a file"),
    "parent itself": ({**GOOD, "id": ".."}, "the id cannot name a file"),
    "NUL": ({**GOOD, "id": "2\0"}, "the id cannot name a file"),
    "long": ({**GOOD, "id": "2" * 300}, "the id cannot name a file"),
    "empty id": ({**GOOD, "id": ""}, "id is missing, blank or not a string"),
    "no label": ({"id": "2", "template": "b"}, "label is missing, blank or not a string"),
    "list label": ({**GOOD, "id": "2", "label": []}, "label is missing, blank or not a string"),
    "blank label": ({**GOOD, "id": "2", "label": "  "}, "label is missing, blank or not a string"),
    "blank template": ({**GOOD, "id": "2", "template": ""}, "template is missing, blank or not a string"),
}


BAD_FILES = {
    "empty": (b"", "is not valid JSON"),
    "truncated": (b'[{"id": "1", "lab', "is not valid JSON"),
    "object": (b'{"id": "1"}', "the file must be a list of entries"),
    "binary": (b"\xff\xfe\x00\x01", "is not valid JSON"),
}


CONTENTS = {name: (json.dumps([GOOD, entry]).encode(), message) for name, (entry, message) in BAD_ENTRIES.items()}
CONTENTS |= BAD_FILES


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """A data directory that was filtered, with a video; the tests leave it as it is."""
    folder = tmp_path_factory.mktemp("filtered")
    write_sources(folder, make_entries(0, 3), make_entries(100_000, 2))
    assert run_filter(folder).returncode == 0
    (folder / "videos").mkdir()
    (folder / "videos" / "1.webm").touch()
    return folder


def contents(folder):
    """Every file's bytes; None stands for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_annotations_get_one_line_and_no_output_is_touched(filtered, name):
    """By the filter, which reads the sources, and (for some, as it reads with the same function) the extraction."""
    content, message = CONTENTS[name]
    commands = {"validation.json": "data.dataset", "train_filtered.json": "data.video_loader"}
    for file_name, module in list(commands.items())[: 2 if name in ("truncated", "slash", "duplicate") else 1]:
        path = filtered / "annotations" / file_name
        good = path.read_bytes()
        path.write_bytes(content)
        before = contents(filtered)
        command = [sys.executable, "-m", module, "--data_dir", str(filtered)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        after = contents(filtered)
        path.write_bytes(good)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(f"error: {re.escape(str(path))}.*{re.escape(message)}.*\n", result.stderr)
        assert len(result.stderr) < 1000
        assert after == before


def test_missing_annotations_say_where_to_get_them(tmp_path):
    result = run_filter(tmp_path / "nothing")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "developer.qualcomm.com" in result.stderr and "train.json" in result.stderr


def test_no_matching_template_is_an_error(data_dir):
    write_sources(data_dir, [{**GOOD, "template": "Moving [something] upwards"}], [])
    result = run_filter(data_dir)
    assert result.returncode == 1 and "no entry has a template of" in result.stderr
    assert not outputs(data_dir)["train"].exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_unwritable_folder_is_an_error(data_dir):
    (data_dir / "annotations").chmod(0o500)
    result = run_filter(data_dir)
    (data_dir / "annotations").chmod(0o700)
    assert result.returncode == 1 and re.fullmatch("error: .*Permission denied.*\n", result.stderr)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
ids = st.text(max_size=12) | st.from_regex(r"[a-c0-9._/\\-]{1,6}", fullmatch=True) | json_values
templates = st.sampled_from(["Moving [something] up", "Covering [something] with [something]"]) | st.text()
odd_entries = json_values | st.fixed_dictionaries(
    {"id": ids, "label": st.text() | json_values, "template": templates | json_values},
    optional={"task": json_values, "num_frames": json_values, "placeholders": json_values},
)


@settings(max_examples=FUZZ_CASES, deadline=None)
@given(st.lists(odd_entries, max_size=5) | json_values)
def test_fuzz_any_json_is_read_back_or_refused_in_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        path.write_text(json.dumps(content))
        try:
            entries = paths.read_annotations(path)
        except cli.UserError as error:
            assert "\n" not in str(error)
            return
        assert json.dumps(entries) == json.dumps(content)
        for entry in entries:
            inside = paths.video_path(folder, entry["id"]).resolve()
            assert inside.parent == (Path(folder) / "videos").resolve()
            assert (
                paths.frames_dir(folder, 96).resolve()
                == (paths.frame_path(paths.frames_dir(folder, 96), entry["id"], 0).resolve().parents[1])
            )
        matched = dataset.match_tasks(entries, list(dataset.TASK_TEMPLATES))
        chosen = dataset.sample_entries(matched, 2, seed=1)
        paths.write_annotations(path, chosen)
        assert json.dumps(paths.read_annotations(path)) == json.dumps(chosen)


likely_ids = st.integers(0, 12).map(str)
likely_entries = st.fixed_dictionaries(
    {"id": likely_ids, "label": st.text(min_size=1), "template": templates},
    optional={"task": st.text(), "placeholders": st.lists(st.text(), max_size=2)},
)
sources = st.lists(likely_entries | odd_entries, max_size=6, unique_by=lambda entry: str(entry)) | st.lists(
    likely_entries, max_size=12, unique_by=lambda entry: entry["id"]
)
file_names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30)
video_names = likely_ids.map("{}.webm".format) | likely_ids.map("{}.WEBM".format) | file_names


@settings(max_examples=FUZZ_CASES, deadline=None)
@given(sources, sources, st.lists(video_names, max_size=15), st.integers(0, 3))
def test_fuzz_filtering_writes_what_is_promised_or_nothing(train, val, names, seed):
    """The filter's whole run, over any two source files and any names of videos."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        write_sources(data_dir, train, val)
        (data_dir / "videos").mkdir()
        for name in names:
            if name not in (".", "..") and len(name.encode()) < 200:
                (data_dir / "videos" / name).touch()
        before = contents(data_dir)
        arguments = ["--data_dir", folder, "--train_samples_per_task", "2", "--seed", str(seed)]
        try:
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
                patch.setattr(sys, "argv", ["data.dataset", *arguments])
                patch.setattr(os, "fsync", lambda file: None)  # costs most of the time, and no crash is tried here
                dataset.main()
        except cli.UserError as error:
            assert "\n" not in str(error) and folder in str(error)
            assert contents(data_dir) == before
            return
        after = contents(data_dir)
        assert {path: after.pop(path) for path in before} == before
        assert {path.name for path in after} == {"train_filtered.json", "val_filtered.json"}
        found = {split: paths.read_annotations(path) for split, path in outputs(data_dir).items()}
        ids = {split: {entry["id"] for entry in entries} for split, entries in found.items()}
        assert not ids["train"] & ids["val"]
        for split, source in (("train", train), ("val", val)):
            for entry in found[split]:
                assert dataset.plain_template(entry["template"]) in dataset.TASK_TEMPLATES[entry["task"]]
                assert {**entry, "task": 0} in [{**original, "task": 0} for original in source]
        present = {path.name for path in (data_dir / "videos").iterdir()}
        assert not present or {f"{video_id}.webm" for video_id in ids["train"] | ids["val"]} <= present


@given(st.integers(0, 30), st.integers(), st.lists(st.integers(0, 1000), unique=True, max_size=30), st.randoms())
def test_sampling_depends_on_seed_and_ids_only(count, seed, numbers, random):
    entries = [{"id": str(number), "task": "drop_object"} for number in numbers]
    others = [{"id": f"other{number}", "task": "move_object"} for number in numbers]
    sampled = dataset.sample_entries(entries, count, seed)
    random.shuffle(entries)
    assert dataset.sample_entries(entries, count, seed) == sampled
    assert len(sampled) == min(count, len(entries))
    assert dataset.sample_entries(entries, count + 1, seed)[:count] == sampled
    beside_others = dataset.sample_entries(entries + others, count, seed)
    assert [entry for entry in beside_others if entry["task"] == "drop_object"] == sampled
