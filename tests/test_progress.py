"""Progress without an oracle: pecn.progress as users run it, and what its estimates do to prompts."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import pecn.progress
from data.files import write_json
from data.paths import filtered_annotations_path, frame_path, frames_dir
from data.prompts import progress_percent
from pecn.progress import NUM_SEEN, load_cuts, parse_args
from tests.commands import call
from tests.conftest import SIDE, entry, last_line, run, sampling_command, train

LENGTHS = {"train": (8, 11, 15, 20, 27, 36) * 3, "val": (9, 13, 18, 24, 33)}
FRAMES = ("--input_frame_idx", 8, "--target_frame_idx", 9)
THERE, BACK = "pushing a cup from left to right", "pushing a cup from right to left"


def rigged_data_dir(folder: Path) -> Path:
    """Clips in which the length of a bright bar tells the progress, whatever the frame's index."""
    for split, lengths in LENGTHS.items():
        entries = []
        for number, length in enumerate(lengths):
            video_id = f"{split}{number}"
            entries.append(entry(video_id, "move_object", num_frames=length))
            for index in range(length):
                frame = np.full((SIDE, SIDE, 3), 30, np.uint8)
                frame[:, : round(SIDE * index / length)] = 220
                path = frame_path(frames_dir(folder, SIDE), video_id, index)
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), frame)
        filtered_annotations_path(folder, split).parent.mkdir(exist_ok=True)
        write_json(filtered_annotations_path(folder, split), entries)
    return folder


@pytest.fixture(scope="module")
def rigged(tmp_path_factory) -> Path:
    return rigged_data_dir(tmp_path_factory.mktemp("rigged"))


def command(data_dir: Path, model: Path, file: Path, *options: object) -> list[object]:
    words = ["--data_dir", data_dir, "--pretrained_model_name_or_path", model, "--resolution", SIDE]
    return [str(word) for word in [*words, "--output_file", file, *options]]


@pytest.fixture(scope="module")
def estimated(rigged, tiny_model, tmp_path_factory):
    """The file of estimates, and what the command printed."""
    file = tmp_path_factory.mktemp("estimates") / "progress.json"
    done = call(pecn.progress, *command(rigged, tiny_model, file, "--max_train_steps", 150))
    assert not done.returncode, done.stderr
    return file, done.stdout


def test_every_frame_that_can_be_an_input_has_a_percentage(estimated):
    written = json.loads(estimated[0].read_text())
    for split, lengths in LENGTHS.items():
        assert set(written[split]) == {f"{split}{number}" for number in range(len(lengths))}
        for number, length in enumerate(lengths):
            of_video = written[split][f"{split}{number}"]
            assert {str(index) for index in range(length - 1)} <= set(of_video)
            assert all(percent in range(0, 100, 10) for percent in of_video.values())
    assert [progress_percent(share) for share in (0, 0.099, 0.1, 0.57, 0.95, 1.0)] == [0, 0, 10, 50, 90, 90]


def test_what_is_printed_compares_with_constants_that_see_nothing(estimated):
    """Each clip counts alike. The last line's command is understood."""
    file, printed = estimated
    assert printed.splitlines()[-1] == f"{file} has the estimates; train with: PROGRESS={file}"
    written = json.loads(file.read_text())
    shares = {
        split: [np.array([*map(int, written[split][f"{split}{number}"])]) / length for number, length in enumerate(of)]
        for split, of in LENGTHS.items()
    }
    median = np.median(np.concatenate(shares["train"]))
    for split in LENGTHS:
        [line] = [line for line in printed.splitlines() if line.startswith(f"{split}, any frame, ")]
        figures = [float(number) for number in re.findall(r"[+-]?\d+\.\d", line)]
        constant = np.mean([100 * np.abs(share - median).mean() for share in shares[split]])
        assert figures[1] == pytest.approx(constant, abs=0.051)
        assert figures[0] < figures[1] / 2  # the bar tells it
        assert figures[3] == pytest.approx(figures[0] - min(figures[1:3]), abs=0.11)
    assert re.search(r"^val, frame 20, .* ± \d", printed, re.MULTILINE)


def test_no_network_estimates_a_clip_that_it_has_seen(rigged, tiny_model, monkeypatch, tmp_path):
    """Four networks for the training clips and one of all of them for validation: what each saw, and is asked for."""
    calls = []
    monkeypatch.setattr(pecn.progress, "train_network", lambda cuts, chosen, *_: ids_of(cuts, chosen))

    def ids_of(cuts, chosen):
        return set(cuts.table.video_id.iloc[chosen])

    def estimate(seen, cuts, chosen):
        calls.append((seen, ids_of(cuts, chosen)))
        return np.full(len(chosen), 0.5)

    monkeypatch.setattr(pecn.progress, "estimate", estimate)
    assert not call(pecn.progress, *command(rigged, tiny_model, tmp_path / "progress.json")).returncode
    *folds, (seen_last, asked_last) = calls
    everything = {f"train{number}" for number in range(18)}
    assert len(folds) == 4 and set().union(*(asked for _, asked in folds)) == everything
    assert all(not seen & asked and seen | asked == everything for seen, asked in folds)
    assert seen_last == everything and asked_last == {f"val{number}" for number in range(5)}


def test_what_is_seen_ends_with_the_input(rigged, tiny_model, tmp_path):
    """Six frames, evenly spread; a mirrored clip has mirrored latents and the mirrored sentence."""
    from pecn.model import load_pipeline

    args = parse_args(command(rigged, tiny_model, tmp_path / "progress.json"))
    cuts = load_cuts(load_pipeline(tiny_model), args, "val")
    first_row = sum(LENGTHS["val"][:4])
    for rows, cut in zip(cuts.rows, cuts.table.itertuples()):
        seen = rows - sum(LENGTHS["val"][: int(cut.video_id[3:])])
        assert len(seen) == NUM_SEEN and seen[0] == 0 and seen[-1] == cut.frame and (np.diff(seen) >= 0).all()
    at_20 = cuts.table.index[(cuts.table.video_id == "val4") & (cuts.table.frame == 20)]
    assert (cuts.rows[at_20] - first_row).tolist() == [[0, 4, 8, 12, 16, 20]]
    assert cuts.table.share[at_20].tolist() == [20 / 33]
    (latents, told), (mirrored, told_mirrored) = cuts.show(at_20), cuts.show(at_20, mirrored=True)
    assert (mirrored == latents.flip(-1)).all() and not (mirrored == latents).all()
    assert (told[0, :-2] == cuts.sentences[THERE]).all() and (told_mirrored[0, :-2] == cuts.sentences[BACK]).all()
    assert (told[0, -2:] == told_mirrored[0, -2:]).all() and not (told == told_mirrored).all()


def prompts_of(output_dir: Path) -> dict[str, str]:
    samples = json.loads((output_dir / "metrics.json").read_text())["samples"]
    return {sample["video_id"]: sample["edit_prompt"] for sample in samples}


def test_estimates_are_what_training_and_sampling_tell(rigged, estimated, tiny_model, tmp_path):
    """Of the trained model's record the file is known; no length is needed; resuming needs the same progress."""
    file, _ = estimated
    options = (*FRAMES, "--add_progress", file, "--num_validation_images", 1, "--validation_epochs", 1)
    train(rigged, tiny_model, tmp_path / "model", *options, "--max_train_steps", 2, "--checkpointing_steps", 1)
    arguments = json.loads((tmp_path / "model" / "training_config.json").read_text())["arguments"]
    assert arguments["add_progress"] == str(file)

    data_dir = shutil.copytree(rigged, tmp_path / "data", ignore=shutil.ignore_patterns("encoded_cache"))
    path = filtered_annotations_path(data_dir, "val")
    write_json(path, [{**clip, "num_frames": None} for clip in json.loads(path.read_text())])
    run("python", *sampling_command(data_dir, tmp_path / "model", tmp_path / "out", "--num_samples", "all"))
    prompts, written = prompts_of(tmp_path / "out"), json.loads(file.read_text())["val"]
    assert set(prompts) == set(written)  # the first one's last frame is the input
    for video_id, prompt in prompts.items():
        if "8" in written[video_id]:
            assert prompt.endswith(f"And {written[video_id]['8']}% of the action has been completed.")
    assert len(set(prompts.values())) > 2

    words = sampling_command(rigged, tmp_path / "model", tmp_path / "out", "--num_samples", "all")
    run("python", *words, "--add_progress", "True")
    told = {video_id: re.search(r"(\d+)%", prompt)[1] for video_id, prompt in prompts_of(tmp_path / "out").items()}
    assert told == {f"val{number}": f"{int(8 / length * 10)}0" for number, length in enumerate(LENGTHS["val"])}

    resumed = ("--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    done = train(rigged, tiny_model, tmp_path / "model", *options, *resumed, "--add_progress", "True", check=False)
    assert f"add_progress was {file}, is True" in last_line(done.stderr)
    changed = json.loads(file.read_text())
    changed["train"]["train1"]["8"] = 10 if changed["train"]["train1"]["8"] else 20
    before = file.read_text()
    write_json(file, changed)
    done = train(rigged, tiny_model, tmp_path / "model", *options, *resumed, check=False)
    assert "hash_of_model_frames_and_prompts was" in last_line(done.stderr)
    file.write_text(before)
    train(rigged, tiny_model, tmp_path / "model", *options, *resumed)


def test_mistakes_get_one_line(rigged, tiny_model, tmp_path):
    done = call(pecn.progress, *command(rigged, tiny_model, tmp_path / "progress.json", "--resolution", 64))
    assert done.returncode == 1 and "python -m data.video_loader" in last_line(done.stderr)
    data_dir = tmp_path / "one"
    shutil.copytree(rigged, data_dir)
    path = filtered_annotations_path(data_dir, "train")
    write_json(path, json.loads(path.read_text())[:1])
    done = call(pecn.progress, *command(data_dir, tiny_model, tmp_path / "progress.json"))
    assert done.returncode == 1 and "has 1 train videos" in last_line(done.stderr)
    assert not (tmp_path / "progress.json").exists()
