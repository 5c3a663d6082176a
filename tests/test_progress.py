"""Progress without an oracle: pecn.progress as users run it, and what its estimates do to prompts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from pecn.progress_model import CONFIG, NUM_SEEN, WEIGHTS, encode_clips, load_estimator, seen_frames, with_estimates

from data.cli import UserError
from data.clips import ESTIMATED, FrameChoice, draw_pairs, load_clips, verify_frames
from data.paths import filtered_annotations_path, frame_path, frames_dir, write_annotations
from data.prompts import progress_percent
from pecn.encoded_frames import encode_once
from pecn.model import load_pipeline
from tests.conftest import SIDE, entry, read_events, run

LENGTHS = {"train": (8, 11, 15, 20, 27, 36) * 3, "val": (9, 13, 18, 24, 33)}
DEVICE = torch.device("cpu")


def share_cuts(length: int) -> np.ndarray:
    """The share of the action done at every frame but the last."""
    return np.arange(length - 1) / length


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
        write_annotations(filtered_annotations_path(folder, split), entries)
    return folder


@pytest.fixture(scope="module")
def rigged(tmp_path_factory) -> Path:
    return rigged_data_dir(tmp_path_factory.mktemp("rigged"))


def progress(command: str, data_dir: Path, model: Path, output_dir: Path, *options: object, check: bool = True):
    words = ("python", "-m", "pecn.progress", command, "--data_dir", data_dir, "--pretrained_model_name_or_path", model)
    return run(*words, "--resolution", SIDE, "--output_dir", output_dir, *options, check=check)


@pytest.fixture(scope="module")
def estimator(rigged, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("estimators") / "estimator"
    progress("train", rigged, tiny_model, folder, "--max_train_steps", 250, "--train_batch_size", 32)
    return folder


@pytest.fixture(scope="module")
def constant(rigged, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("estimators") / "constant"
    progress("train", rigged, tiny_model, folder, "--max_train_steps", 0)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return load_pipeline(tiny_model)


def table_row(table: str, name: str) -> list[float]:
    """The mean error, and the percentage within 8 points, of one of a table's rows."""
    [line] = [line for line in table.splitlines() if line.startswith(f"  {name}  ")]
    return [float(number) for number in re.findall(r"\s{2,}([+-]?[\d.]+)", line.replace(name, ""))]


def test_estimator_learns_what_frames_tell_and_constants_are_right(rigged, tiny_model, estimator, constant):
    printed = progress("evaluate", rigged, tiny_model, estimator).stdout
    at_20, any_cut = printed.split("any cut: ", maxsplit=1)
    assert at_20.startswith("cuts at frame 20: 2 of 2 clips\n") and any_cut.startswith("92 of 5 clips\n")
    by_hand = {"cuts at frame 20": [(24, [20]), (33, [20])]}
    by_hand["any cut"] = [(length, range(length - 1)) for length in LENGTHS["val"]]
    median = np.median(np.concatenate([share_cuts(length) for length in LENGTHS["train"]]))

    def median_at(cut: int) -> float:
        return float(np.median([cut / length for length in LENGTHS["train"] if cut < length - 1]))

    for title, table in (("cuts at frame 20", at_20), ("any cut", any_cut)):
        errors = {"training median": [], "training median at that frame": []}
        for length, cuts in by_hand[title]:
            errors["training median"].append(100 * np.abs([cut / length - median for cut in cuts]))
            errors["training median at that frame"].append(
                100 * np.abs([cut / length - median_at(cut) for cut in cuts])
            )
        estimated = table_row(table, "estimator")[0]
        for name, of_clips in errors.items():
            error = np.mean([of_clip.mean() for of_clip in of_clips])
            within = 100 * np.mean([(of_clip <= 8).mean() for of_clip in of_clips])
            assert table_row(table, name) == pytest.approx([error, within], abs=0.51)
            assert table_row(table, name)[0] == pytest.approx(error, abs=0.006)
            assert table_row(table, f"estimator - {name}")[0] == pytest.approx(estimated - error, abs=0.02)
            assert estimated < error / 2
    assert (
        "any cut: the estimator beats the better constant (the training median at that frame): an error of" in printed
    )

    untrained = progress("evaluate", rigged, tiny_model, constant).stdout.split("any cut: ", maxsplit=1)[1]
    assert table_row(untrained, "estimator") == table_row(untrained, "training median")
    assert "the estimator is worse than the better constant" in untrained


@given(st.lists(st.integers(0, 80), min_size=1, unique=True).map(sorted), st.data())
def test_seen_frames_end_with_the_input(frames, data):
    cut = data.draw(st.sampled_from(frames))
    seen = seen_frames(frames, cut)
    assert len(seen) == NUM_SEEN and seen == sorted(seen)
    assert seen[-1] == cut and seen[0] == frames[0] and set(seen) <= set(frames)
    assert len(set(seen)) == min(NUM_SEEN, sum(frame <= cut for frame in frames))


def test_seen_frames_are_evenly_spread():
    assert seen_frames(range(41), 20) == [0, 4, 8, 12, 16, 20]


def test_mirrored_clips_have_mirrored_latents_and_sentences(rigged, pipeline):
    clips, _ = load_clips(rigged, "val", SIDE, FrameChoice(None, (1,)))

    def show(label: str, mirrored: bool = False) -> tuple[torch.Tensor, ...]:
        seen = encode_clips(pipeline, [replace(clips[0], label=label)], SIDE, rigged / "encoded_cache", DEVICE)
        return seen.show([(0, 6)], mirrored)

    there, back = "pushing a cup from left to right", "pushing a cup from right to left"
    latents, sentence, cut = show(there)
    of_mirrored = show(there, mirrored=True)
    assert torch.equal(of_mirrored[0], latents.flip(-1)) and not torch.equal(of_mirrored[0], latents)
    torch.testing.assert_close(of_mirrored[1], show(back)[1])
    assert not torch.allclose(of_mirrored[1], sentence, atol=1e-3)
    assert of_mirrored[2] == cut == 6


def estimated_clips(data_dir, split, choice, estimator, pipeline, seed=None, cache_dir=None):
    clips, _ = load_clips(data_dir, split, SIDE, choice)
    return with_estimates(clips, choice, seed, estimator, pipeline, DEVICE, cache_dir)


def test_estimates_depend_on_no_frame_after_the_input(rigged, estimator, pipeline, tmp_path):
    choice = FrameChoice(6, (1,), progress_source=ESTIMATED)
    before = estimated_clips(rigged, "val", choice, estimator, pipeline)
    assert len({clip.estimated_progress[6] for clip in before}) > 2  # 6 of 9 frames, 6 of 33
    data_dir = tmp_path / "cut_off"
    shutil.copytree(rigged, data_dir, ignore=shutil.ignore_patterns("encoded_cache"))
    for path in frames_dir(data_dir, SIDE).glob("val*/*.png"):
        if int(path.stem) > 7:
            path.unlink()
    after = estimated_clips(data_dir, "val", choice, estimator, pipeline)
    assert [clip.estimated_progress for clip in after] == [clip.estimated_progress for clip in before]


def test_training_pairs_of_any_start_tell_their_own_estimate(rigged, estimator, pipeline, monkeypatch):
    choice = FrameChoice(None, (1,), progress_source=ESTIMATED)
    cache_dir = rigged / "encoded_cache"
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_: pytest.fail("a frame was encoded again"))
    clips = estimated_clips(rigged, "train", choice, estimator, pipeline, cache_dir=cache_dir)
    encoded = encode_once(pipeline, clips, choice, verify_frames(clips, SIDE), False, cache_dir, Accelerator(cpu=True))
    errors = []
    for index, clip in enumerate(clips):
        for place in np.linspace(0, 0.99, 7):
            row, _, prompt = encoded.draw(index, 0, place, mirrored=False)
            start = clip.frames[row - encoded.first_rows[index]]
            told = int(re.search(r"And (\d0|0)% of the action has been completed\.$", prompt)[1])
            errors.append(told + 5 - 100 * start / clip.num_frames)  # rounded down: 5 less on average
    assert np.abs(errors).mean() < 8
    others = [clip.estimated_progress for clip in clips]
    assert len({tuple(progress.values()) for progress in others}) > 3


def test_percentages_are_rounded_down_and_clipped():
    assert [progress_percent(share) for share in (0, 0.099, 0.1, 0.57, 0.95, 1.0)] == [0, 0, 10, 50, 90, 90]


def sampled_prompts(data_dir: Path, model: Path, output_dir: Path, *options: object) -> tuple[dict[str, str], str]:
    """The prompt of each validation video, and what was printed last."""
    words = ["python", "sample_from_pix2pix.py", "--model_dir", model, "--frames_dir", frames_dir(data_dir, SIDE)]
    words += ["--val_annotations", filtered_annotations_path(data_dir, "val"), "--output_dir", output_dir]
    done = run(*words, "--num_samples", "all", "--num_inference_steps", 1, *options)
    samples = json.loads((output_dir / "metrics.json").read_text())["samples"]
    return {sample["video_id"]: sample["edit_prompt"] for sample in samples}, done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def trained(rigged, tiny_model, estimator, tmp_path_factory) -> Path:
    """A model that was trained for a step with estimated progress."""
    output_dir = tmp_path_factory.mktemp("trained")
    run(*training(rigged, tiny_model, output_dir, "--progress_source", "estimated", "--progress_estimator", estimator))
    return output_dir


def training(data_dir: Path, model: Path, output_dir: Path, *options: object) -> list[object]:
    words = ["python", "train_instruct_pix2pix.py", "--train_data_dir", data_dir, "--output_dir", output_dir]
    words += ["--pretrained_model_name_or_path", model, "--resolution", SIDE, "--train_batch_size", 2]
    words += ["--input_frame_idx", 6, "--target_frame_idx", 7, "--max_train_steps", 1, "--checkpointing_steps", 1]
    return [*words, "--add_progress", "--report_to", "none", "--num_validation_images", 1, *options]


def test_estimated_prompts_reach_the_model_as_it_was_trained(rigged, trained, estimator, pipeline, tmp_path):
    arguments = json.loads((trained / "training_config.json").read_text())["arguments"]
    assert (arguments["progress_source"], arguments["progress_estimator"]) == ("estimated", str(estimator))
    choice = FrameChoice(6, (1,), progress_source=ESTIMATED)
    clips = estimated_clips(rigged, "val", choice, estimator, pipeline, seed=42)
    expected = {pair.video_id: pair.edit_prompt for pair in draw_pairs(clips, choice, 42)}
    data_dir = tmp_path / "without_lengths"
    shutil.copytree(rigged, data_dir, ignore=shutil.ignore_patterns("encoded_cache"))
    path = filtered_annotations_path(data_dir, "val")
    write_annotations(path, [{**clip, "num_frames": None} for clip in json.loads(path.read_text())])
    prompts, last_line = sampled_prompts(data_dir, trained, tmp_path / "as_trained")
    assert prompts == expected  # without any length
    assert last_line.startswith("frame 6 to 7 (progress from an estimator), ")

    prompts, last_line = sampled_prompts(rigged, trained, tmp_path / "oracle", "--progress_source", "oracle")
    told = {video_id: int(re.search(r"(\d+)%", prompt)[1]) for video_id, prompt in prompts.items()}
    assert told == {f"val{number}": int(6 / length * 10) * 10 for number, length in enumerate(LENGTHS["val"])}
    assert last_line.startswith("frame 6 to 7 (progress from an oracle), ")

    prompts, last_line = sampled_prompts(rigged, trained, tmp_path / "none", "--progress_source", "none")
    assert not any("completed" in prompt for prompt in prompts.values())
    assert last_line.startswith("frame 6 to 7, ")


def test_validation_rolls_out_with_estimated_progress(rigged, tiny_model, estimator, tmp_path):
    options = ("--input_frame_idx", "any", "--horizon", "1-2", "--num_inference_steps", 1, "--report_to", "tensorboard")
    estimated = ("--progress_source", "estimated", "--progress_estimator", estimator)
    run(*training(rigged, tiny_model, tmp_path, *options, *estimated))
    [event_file] = (tmp_path / "logs").rglob("events*")
    assert [tag for tag in read_events(event_file).Tags()["images"] if tag.startswith("validation_rollout/")]


def test_resuming_needs_the_same_progress(rigged, tiny_model, trained, estimator, constant, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    resumed = ("--resume_from_checkpoint", "latest", "--max_train_steps", 2)
    words = training(rigged, tiny_model, tmp_path / "run", *resumed)

    def message(*options: object) -> str:
        done = run(*words, *options, check=False)
        assert done.returncode and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "progress_source was estimated, is oracle" in message()
    assert "hash_of_model_frames_and_prompts was" in message(
        "--progress_source=estimated", "--progress_estimator", constant
    )
    assert "--progress_estimator DIR" in message("--progress_source=estimated")
    run(*words, "--progress_source", "estimated", "--progress_estimator", estimator)


def test_estimators_that_do_not_fit_are_refused_in_one_line(estimator, pipeline, tiny_model, tmp_path):
    def message(folder, pipeline=pipeline, resolution=SIDE) -> str:
        with pytest.raises(UserError) as caught:
            load_estimator(folder, pipeline, resolution)
        assert "\n" not in str(caught.value) and "python -m pecn.progress train" in str(caught.value)
        return str(caught.value)

    assert load_estimator(estimator, pipeline, SIDE)
    assert f"({SIDE} pixels wide, not 64)" in message(estimator, resolution=64)
    other = load_pipeline(tiny_model)
    with torch.no_grad():
        other.text_encoder.get_input_embeddings().weight[0, 0] += 1
    assert "another VAE or text encoder" in message(estimator, pipeline=other)
    assert "--progress_estimator DIR" in message(None)
    assert f"no {CONFIG}" in message(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(estimator, damaged)
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:1000])
    assert "is damaged" in message(damaged)
