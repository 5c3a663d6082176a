"""Rollouts: what is predicted from what, the films and scores that the command leaves, and its errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.clips import Clip, FrameChoice
from data.files import write_json
from data.paths import frames_dir
from data.prompts import build_prompt
from data.video_decoder import load_picture
from pecn import rollouts
from pecn.rollouts import roll_out, rollout_choice
from pecn.sampling import predict_frames
from pecn.sampling_options import SamplingOptions
from tests.conftest import SIDE, last_line, make_tiny_pipeline, run, sampling_command, write_frames

LABEL = "pushing a cup from left to right"
OPTIONS = SamplingOptions(num_inference_steps=1, image_guidance_scale=1.0)
ANY_START = FrameChoice(start=None, horizons=range(1, 4), tell_horizon=True)


@pytest.fixture(scope="module")
def pipeline():
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    """Three videos of 24 frames and one that ends with frame 21; their frames from 20 on, up to three of them later."""
    data_dir = tmp_path_factory.mktemp("clips")
    made = []
    for number, last in enumerate((23, 23, 23, 21)):
        write_frames(data_dir, f"v{number}", range(20, last + 1), seed=number)
        progress = {frame: int(frame / (last + 1) * 10) * 10 for frame in range(last + 1)}
        folder, frames = frames_dir(data_dir, SIDE) / f"v{number}", tuple(range(20, last + 1))
        made.append(Clip(f"v{number}", "move_object", LABEL, folder, frames, progress))
    return made


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The pictures, prompts and seeds of every call of `predict_frames` that a rollout makes."""
    calls = []

    def record(pipeline, images, edit_prompts, seeds, options):
        calls.append((images, edit_prompts, seeds))
        return predict_frames(pipeline, images, edit_prompts, seeds, options)

    monkeypatch.setattr(rollouts, "predict_frames", record)
    return calls


def every(rollout, name):
    """What the predictions of a rollout have of this name."""
    return [getattr(one, name) for one in rollout.predictions.values()]


def test_direct_predicts_each_horizon_from_the_start_frame(pipeline, clips, calls):
    [rollout] = roll_out(pipeline, clips[:1], rollout_choice(ANY_START, 3, "direct"), "direct", 7, 8, OPTIONS)
    prompts = [build_prompt(LABEL, 80, horizon) for horizon in (1, 2, 3)]  # frame 20 of 24
    assert every(rollout, "edit_prompt") == prompts and list(rollout.predictions) == [1, 2, 3]
    assert len({seeds[0] for _, _, seeds in calls}) == 3
    start, *later = (load_picture(path) for path in clips[0].paths)
    for (images, told, _), prompt in zip(calls, prompts, strict=True):
        assert np.array_equal(images[0], start) and told == [prompt]
    assert np.array_equal(rollout.start, start) and np.array_equal(every(rollout, "target"), later)


def test_chained_feeds_each_prediction_back_and_moves_the_progress_on(pipeline, clips, calls):
    clip = replace(clips[0], progress={20: 60, 21: 60, 22: 70, 23: 70})
    [rollout] = roll_out(pipeline, [clip], rollout_choice(ANY_START, 3, "chained"), "chained", 7, 8, OPTIONS)
    assert every(rollout, "edit_prompt") == [build_prompt(LABEL, progress, 1) for progress in (60, 60, 70)]
    made = [rollout.start, *(frame.sample for frame in every(rollout, "predicted"))]
    assert all(np.array_equal(images[0], frame) for (images, _, _), frame in zip(calls, made))
    assert len(calls) == 3 and not np.array_equal(made[1], made[0])


def test_a_model_of_one_horizon_is_chained_by_it(pipeline, clips):
    choice = rollout_choice(FrameChoice(start=18, horizons=(2,)), 5, "chained")
    assert list(choice.horizons) == [2, 4] and choice.start == 18
    clip = replace(clips[0], frames=(20, 22))
    [rollout] = roll_out(pipeline, [clip], choice, "chained", 7, 8, OPTIONS)
    # Of frames 20 and 22; no horizon.
    assert every(rollout, "edit_prompt") == [build_prompt(LABEL, 80), build_prompt(LABEL, 90)]
    first, second = every(rollout, "target")
    assert np.array_equal(first, load_picture(clip.path(22))) and second is None


@pytest.mark.parametrize("mode", ["direct", "chained"])
def test_predictions_do_not_depend_on_the_batch(mode, pipeline, clips):
    choice, several = rollout_choice(ANY_START, 3, mode), replace(OPTIONS, num_predictions=3)
    alone, together = (list(roll_out(pipeline, clips, choice, mode, 7, size, several)) for size in (1, 9))
    assert [rollout.clip for rollout in together] == clips
    for one, other in zip(alone, together, strict=True):
        for way in ("sample", "expected"):
            made = [[getattr(frame, way).astype(int) for frame in every(made, "predicted")] for made in (one, other)]
            assert np.abs(np.subtract(*made)).max() <= 3  # rounding of the last bit differs, and is fed back
    assert not np.array_equal(*(rollout.predictions[2].predicted.sample for rollout in alone[:2]))


def test_where_a_video_ends_the_rest_is_predicted_but_not_scored(pipeline, clips):
    [rollout] = roll_out(pipeline, clips[3:], rollout_choice(ANY_START, 3, "chained"), "chained", 7, 8, OPTIONS)
    assert [truth is None for truth in every(rollout, "target")] == [False, True, True]
    assert all(" 90% " in prompt for prompt in every(rollout, "edit_prompt"))  # never 100%, which no model has seen
    rows = rollout.rows()
    assert [row["moving_share"] is None for row in rows] == [False, True, True]
    assert [row["horizon"] for row in rows] == [1, 2, 3]


# The command.


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """As training leaves them: of any start and horizons 1 to 3, and of frame 19 to 21."""
    made = {}
    recorded = {"resolution": SIDE, "image_guidance_scale": 1.0, "scheduler": "euler_ancestral", "add_progress": False}
    frames = {"several": {"input_frame_idx": "any", "horizon": "1-3", "tell_horizon": True}}
    frames["one"] = {"input_frame_idx": 19, "horizon": "2", "tell_horizon": False}
    for name, chosen in frames.items():
        made[name] = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / name)
        write_json(made[name] / "training_config.json", {"arguments": recorded | chosen})
    return made


def sample(data_dir, model, output_dir, *options, check=True):
    words = sampling_command(data_dir, model, output_dir, "--num_inference_steps", 1, "--num_samples", "all", *options)
    return run("python", *words, check=check)


def rows_of(output_dir: Path, video_id: str) -> list[dict]:
    samples = json.loads((output_dir / "rollout.json").read_text())["samples"]
    return [row for row in samples if row["video_id"] == video_id]


def test_the_command_leaves_films_filmstrips_and_the_scores_of_each_horizon(data_dir, models, tmp_path):
    done = sample(data_dir, models["several"], tmp_path, "--rollout", 3, "--num_predictions", 2)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["rollout.json", "samples"]
    rows = rows_of(tmp_path, "val0")
    assert [row["edit_prompt"].split(". ")[-1] for row in rows] == [
        "The frame is 1 frame later.",
        "The frame is 2 frames later.",
        "The frame is 3 frames later.",
    ]
    assert [row["moving_share"] is None for row in rows_of(tmp_path, "val_short")] == [True] * 3  # frame 20 is its last
    assert "3 of the predicted frames lie beyond the end of their video" in done.stdout and "warning" not in done.stderr
    summary = json.loads((tmp_path / "rollout.json").read_text())["summary"]
    assert list(summary) == ["all", "1", "2", "3"] and {"sample", "expected", "copy"} <= set(summary["3"])
    assert summary["3"]["sample"]["psnr"]["gain_half_width"] > 0 and "3, 3 pairs" in done.stdout

    folder = tmp_path / "samples" / "val0"
    strip = np.asarray(Image.open(folder / "filmstrip.png"))
    predictions, truths = np.split(strip, 2)
    predictions, truths = predictions[-200:-8], truths[-220:-28]  # below the first one's line of text, and its lack
    with Image.open(folder / "rollout.gif") as film, av.open(str(folder / "rollout.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert film.n_frames == len(shown) == 4
        durations = []
        for index, picture in enumerate(shown):
            film.seek(index)
            durations.append(film.info["duration"])
            animated = np.asarray(film.convert("RGB")).astype(int)
            assert np.abs(animated[: len(picture), : picture.shape[1]] - picture).mean() < 10
            left = 8 + 200 * index
            for part, side in ((truths, picture[-200:-8, 8:200]), (predictions, picture[-200:-8, 208:400])):
                assert np.abs(part[:, left : left + 192].astype(int) - side).mean() < 8, index
    assert len(set(durations[:3])) == 1 and durations[3] > 4 * durations[0]  # a pause on the last frame
    truth = np.asarray(Image.fromarray(load_picture(frames_dir(data_dir, SIDE) / "val0" / "00022.png")))
    enlarged = Image.fromarray(truth).resize((192, 192), Image.Resampling.BICUBIC)
    assert np.array_equal(truths[:, 8 + 400 : 8 + 400 + 192], enlarged)
    row = rows_of(tmp_path, "val0")[1]
    assert row["copy"]["psnr"] < 100 and set(row) > {"horizon", "task", "moving_share"}


def test_the_model_decides_between_direct_and_chained(data_dir, models, tmp_path):
    options = ("--rollout", 2, "--rollout_mode", "chained", "--input_frame_idx", 19)
    sample(data_dir, models["several"], tmp_path, *options)
    rows = rows_of(tmp_path, "val0")
    assert [row["edit_prompt"].split(". ")[-1] for row in rows] == ["The frame is 1 frame later."] * 2
    sample(data_dir, models["one"], tmp_path, "--rollout", 4)
    rows = rows_of(tmp_path, "val0")
    assert [row["horizon"] for row in rows] == [2, 4] and "later" not in rows[0]["edit_prompt"]
    done = sample(data_dir, models["one"], tmp_path, "--rollout", 3, "--input_frame_idx", 20)
    assert [row["horizon"] for row in rows_of(tmp_path, "val0")] == [2]  # the model's horizon from another start
    assert "warning: predicting frame 20 to 22, but" in done.stderr


def test_mistakes_get_one_line_and_leave_former_results(data_dir, models, tmp_path):
    def message(*options, model="one", output_dir=tmp_path / "out", status=1):
        done = sample(data_dir, models[model], output_dir, *options, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert not (output_dir / "rollout.json").exists()
        return last_line(done.stderr)

    assert "only ROLLOUT_MODE=chained is possible" in message("--rollout", 3, "--rollout_mode", "direct")
    assert "predicts 2 frames ahead" in message("--rollout", 1)
    assert "no validation video of" in message("--rollout", 3, "--input_frame_idx", 70)
    assert "must be at least 1" in message("--rollout", 0, status=2)
    (tmp_path / "other" / "samples").mkdir(parents=True)
    (tmp_path / "other" / "metrics.json").write_text("of pairs")
    assert "choose another OUTPUT_DIR" in message("--rollout", 4, output_dir=tmp_path / "other")
    assert (tmp_path / "other" / "metrics.json").read_text() == "of pairs"
    write_json(tmp_path / "file.json", {"val": {f"val{name}": {"19": 10} for name in (0, 1, 2, "_short")}})
    assert "chained, there are no frames" in message("--rollout", 2, "--add_progress", tmp_path / "file.json")
