"""Rollouts: what is predicted from what, the films and scores that the command leaves, and its errors."""

import io
import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from pecn.rollout_pictures import enlarged, film, save_mp4, save_rollouts
from PIL import Image

from data.clips import ORACLE, Clip, FrameChoice, choose_samples, load_frame_pairs
from data.paths import filtered_annotations_path, frame_path, frames_dir, video_path
from data.prompts import build_prompt
from data.video_decoder import frame_rate, load_picture
from pecn import rollouts
from pecn.pictures import titled
from pecn.rollouts import Rollout, describe_rollouts, roll_out, rollout_choice, score_rollout, summarize_by_horizon
from pecn.sampling import predict_frames
from pecn.sampling_options import SamplingOptions
from tests.conftest import SIDE, make_data_dir, make_tiny_pipeline, read_events, run, write_frames

LABEL = "pushing a cup from left to right"
OPTIONS = SamplingOptions(num_inference_steps=1, image_guidance_scale=1.0)
ANY_START = FrameChoice(start=None, horizons=range(1, 4), progress_source=ORACLE, tell_horizon=True)


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
        folder, frames = frames_dir(data_dir, SIDE) / f"v{number}", tuple(range(20, last + 1))
        made.append(Clip(f"v{number}", "move_object", LABEL, num_frames=last + 1, folder=folder, frames=frames))
    return made


def start_frame(clip: Clip) -> np.ndarray:
    return load_picture(clip.paths[0])


def recorded(monkeypatch) -> list[tuple]:
    """The arguments of every call of `predict_frames` that a rollout makes from now on."""
    calls = []

    def record(pipeline, images, edit_prompts, seeds, options):
        calls.append((images, edit_prompts, seeds))
        return predict_frames(pipeline, images, edit_prompts, seeds, options)

    monkeypatch.setattr(rollouts, "predict_frames", record)
    return calls


def test_direct_predicts_each_horizon_from_the_start_frame(pipeline, clips, monkeypatch):
    calls = recorded(monkeypatch)
    [rollout] = roll_out(pipeline, clips[:1], rollout_choice(ANY_START, 3, "direct"), "direct", 7, 8, OPTIONS, False)
    start = start_frame(clips[0])
    prompts = [build_prompt(LABEL, 80, horizon) for horizon in (1, 2, 3)]  # frame 20 of 24
    assert rollout.edit_prompts == prompts and list(rollout.horizons) == [1, 2, 3]
    seeds = [of_call[2][0] for of_call in calls]
    assert len(set(seeds)) == 3
    for frame, prompt, seed in zip(rollout.predictions[1:], prompts, seeds, strict=True):
        [expected] = predict_frames(pipeline, [start], [prompt], [seed], OPTIONS)
        assert np.array_equal(frame, expected.sample)
    for index, truth in enumerate(rollout.truths):
        assert np.array_equal(truth, load_picture(clips[0].paths[index]))


def test_chained_feeds_each_prediction_back_and_moves_the_progress_on(pipeline, clips, monkeypatch):
    calls = recorded(monkeypatch)
    clip = replace(clips[0], num_frames=30)  # frames 20 and 21 of 30 are 60%, 21 to 23 of it 70%
    [rollout] = roll_out(pipeline, [clip], rollout_choice(ANY_START, 3, "chained"), "chained", 7, 8, OPTIONS, False)
    assert rollout.edit_prompts == [build_prompt(LABEL, progress, 1) for progress in (60, 70, 70)]
    inputs = [of_call[0][0] for of_call in calls]
    assert all(np.array_equal(image, frame) for image, frame in zip(inputs, rollout.predictions[:3], strict=True))
    assert np.array_equal(inputs[0], start_frame(clip)) and not np.array_equal(inputs[1], inputs[0])


def test_a_model_of_one_horizon_is_chained_by_it(pipeline, clips):
    choice = rollout_choice(FrameChoice(start=18, horizons=(2,), progress_source=ORACLE), 5, "chained")
    assert list(choice.horizons) == [2, 4] and choice.start == 18
    clip = replace(clips[0], frames=(20, 22), num_frames=23)
    [rollout] = roll_out(pipeline, [clip], choice, "chained", 7, 8, OPTIONS, False)
    assert rollout.edit_prompts == [build_prompt(LABEL, 80), build_prompt(LABEL, 90)]  # of frames 20 and 22; no horizon
    assert np.array_equal(rollout.truths[1], load_picture(frame_path(clip.folder.parent, "v0", 22)))
    assert rollout.truths[2] is None and rollout.step == 2


@pytest.mark.parametrize("mode", ["direct", "chained"])
def test_predictions_do_not_depend_on_the_batch(mode, pipeline, clips):
    choice = rollout_choice(ANY_START, 3, mode)
    several = replace(OPTIONS, num_predictions=3)
    alone, together = (
        list(roll_out(pipeline, clips, choice, mode, 7, size, several, show_progress=False)) for size in (1, 9)
    )
    assert [rollout.clip for rollout in together] == clips
    for one, other in zip(alone, together, strict=True):
        difference = np.subtract(one.predictions, other.predictions, dtype=int)
        assert one.expected[0] is None and np.abs(np.subtract(one.expected[1], other.expected[1], dtype=int)).max() <= 3
        assert np.abs(difference).max() <= 3  # rounding of the last bit differs with the batch, and is fed back
    assert not np.array_equal(alone[0].predictions[1], alone[1].predictions[1])


def test_where_a_video_ends_the_rest_is_predicted_but_not_scored(pipeline, clips):
    [rollout] = roll_out(
        pipeline, clips[3:], rollout_choice(ANY_START, 3, "chained"), "chained", 7, 8, OPTIONS, show_progress=False
    )
    assert len(rollout.predictions) == 4 and [truth is None for truth in rollout.truths] == [False, False, True, True]
    assert all(" 90% " in prompt for prompt in rollout.edit_prompts)  # never 100%, which no model has seen
    rows = score_rollout(rollout)
    assert [row["psnr"] is None for row in rows] == [False, True, True]
    pictures = film(rollout)
    last = titled(enlarged(rollout.truths[1]), "truth +3, ended")
    assert np.array_equal(pictures[3][:, : last.shape[1]], last)


def made_rollout(number: int, quality: float, is_mean: bool = False) -> Rollout:
    """A square that moves on 4 pixels a frame, and predictions that are a part `quality` of the way there.

    With `is_mean` they are the expected frames, and the samples copy the start frame.
    """
    truths = np.full((5, SIDE, SIDE, 3), (60 + number, 100, 50), np.uint8)
    truths[:, ::4] += 30
    for index, frame in enumerate(truths):
        frame[8:16, 4 * index : 4 * index + 8] = (240, 200, 20)
    changed = truths[0] + quality * (truths.astype(float) - truths[0])
    predictions = list(changed.clip(0, 255).astype(np.uint8))
    folder = Path(f"nowhere/frames_{SIDE}x{SIDE}/v{number}")
    clip = Clip(f"v{number}", "move_object", LABEL, num_frames=40, folder=folder, frames=tuple(range(20, 25)))
    samples, expected = ([truths[0]] * 5, predictions) if is_mean else (predictions, [None] * 5)
    return Rollout(clip, range(1, 5), ["prompt"] * 4, list(truths), samples, expected)


def test_scores_are_those_of_the_region_that_moves_from_the_start_on():
    rows = score_rollout(made_rollout(0, quality=1))
    assert [row["horizon"] for row in rows] == [1, 2, 3, 4]
    assert all(row["moving"]["psnr"]["sample"] == 100 and row["moving"]["is_frame"]["sample"] for row in rows)
    copies = [row["psnr"]["copy"] for row in rows]
    assert copies[0] > copies[1] and copies[1] == copies[3]  # from the second frame on the square lies somewhere else


BETTER, UNSURE, COPY = (0.5, 0.5, 0.5), (-0.5, 0.5, 0.5), (0, 0, 0)  # the quality of three videos


@pytest.mark.parametrize(
    ("qualities", "ending"),
    [
        ((BETTER, BETTER, BETTER, BETTER), "up to horizon 4 of 4"),
        ((BETTER, BETTER, UNSURE, BETTER), "at these horizons alone: 1, 2, 4"),
        ((BETTER, BETTER, COPY, UNSURE), "up to horizon 2 of 4"),
        ((UNSURE, COPY, COPY, COPY), "at none of the 4 horizons"),
    ],
)
def test_the_last_line_tells_how_far_the_prediction_beats_copying(qualities, ending):
    rows = []
    for number in range(3):
        made = [made_rollout(number, of_videos[number]) for of_videos in qualities]
        rows += [score_rollout(rollout)[place] for place, rollout in enumerate(made)]
    table = describe_rollouts(summarize_by_horizon(rows)).splitlines()
    assert table[-1].endswith(ending)
    assert [line.split()[:2] for line in table[1:5]] == [[str(horizon), "3"] for horizon in (1, 2, 3, 4)]
    single = describe_rollouts(summarize_by_horizon(rows[:4])).splitlines()
    assert single[-1].endswith("at none of the 4 horizons")  # one video has no interval


def test_the_mean_of_several_has_lines_of_its_own(tmp_path):
    save_rollouts([made_rollout(number, 0.5, is_mean=True) for number in range(3)], tmp_path, "model")
    summary = json.loads((tmp_path / "rollout.json").read_text())["summary"]
    assert all(group["moving"]["psnr"]["sample"]["gain"] == 0 for group in summary)
    assert all(group["moving"]["psnr"]["expected"]["gain"] > 1 for group in summary)
    table = describe_rollouts(summary).splitlines()
    assert [line.split()[0 if line.startswith("  " * 5) else 2] for line in table[1:9]] == ["sample", "expected"] * 4
    assert table[-2].endswith("at none of the 4 horizons") and "the expected frame's PSNR" in table[-1]
    assert table[-1].endswith("up to horizon 4 of 4")


def test_files_show_truth_beside_prediction_at_the_videos_rate(tmp_path):
    save_rollouts([made_rollout(number, 0.5) for number in range(2)], tmp_path, "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quality_by_horizon.png", "rollout.json", "samples"]
    folder, rollout = tmp_path / "samples" / "v1", made_rollout(1, 0.5)
    assert sorted(path.name for path in folder.iterdir()) == ["filmstrip.png", "rollout.gif", "rollout.mp4"]
    expected = film(rollout)
    assert expected[0].shape == (192 + 28, 2 * 192, 3)
    truth, prediction = expected[2][28:, :192], expected[2][28:, 192:]
    assert np.array_equal(truth[3::6, 3::6], rollout.truths[2])
    assert np.array_equal(prediction[3::6, 3::6], rollout.predictions[2])

    with av.open(str(folder / "rollout.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12 and stream.codec_context.pix_fmt == "yuv420p"
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert container.duration == pytest.approx(5 / 12 * av.time_base, rel=0.01)
    assert len(shown) == 5
    assert all(np.abs(one.astype(int) - other).mean() < 6 for one, other in zip(shown, expected))
    assert np.abs(shown[0].astype(int) - shown[4])[28:].mean() > 6

    with Image.open(folder / "rollout.gif") as animation:
        assert animation.n_frames == 5 and animation.size == (384, 220)
        durations = []
        for index, picture in enumerate(expected):
            animation.seek(index)
            durations.append(animation.info["duration"])
            assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - picture).mean() < 6
    assert durations == [80] * 5

    strip = np.asarray(Image.open(folder / "filmstrip.png"))
    assert strip.shape == (2 * 28 + 2 * 192, 5 * 192, 3)
    assert np.array_equal(strip[56 + 3 : 56 + 192 : 6, 2 * 192 + 3 : 3 * 192 : 6], rollout.truths[2])
    assert np.array_equal(strip[56 + 192 + 3 :: 6, 2 * 192 + 3 : 3 * 192 : 6], rollout.predictions[2])
    saved = json.loads((tmp_path / "rollout.json").read_text())
    assert [(row["video_id"], row["horizon"]) for row in saved["samples"]] == [
        (f"v{number}", horizon) for number in range(2) for horizon in (1, 2, 3, 4)
    ]
    assert [group["moving"]["psnr"]["sample"]["gain"] > 0 for group in saved["summary"]] == [True] * 4


def test_films_are_written_where_h264_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    rate = Fraction(30000, 1001) / 5
    save_mp4(tmp_path / "film.mp4", film(made_rollout(0, 0.5)), rate)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert container.streams.video[0].average_rate == rate
        assert len(list(container.decode(video=0))) == 5


def test_the_frame_rate_is_the_videos(tmp_path):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(30000, 1001))
        stream.width = stream.height = 32
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    assert frame_rate(path) == Fraction(30000, 1001)
    assert frame_rate(tmp_path / "gone.webm") == 12
    (tmp_path / "damaged.webm").write_bytes(b"no video")
    assert frame_rate(tmp_path / "damaged.webm") == 12


# The command.


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """As training leaves them: of any start and horizons 1 to 3, and of frame 19 to 21."""
    made = {}
    frames = {"several": {"input_frame_idx": "any", "target_frame_idx": 21, "horizon": "1-3"}}
    frames["one"] = {"input_frame_idx": 19, "target_frame_idx": 21}
    for name, chosen in frames.items():
        made[name] = tmp_path_factory.mktemp("models") / name
        shutil.copytree(tiny_model, made[name])
        arguments = {"resolution": SIDE, "num_inference_steps": 1, "image_guidance_scale": 1.0, **chosen}
        (made[name] / "training_config.json").write_text(json.dumps({"arguments": arguments}))
    return made


def sample(data_dir, model, output_dir, *extra, check=True):
    command = ["python", "sample_from_pix2pix.py", "--model_dir", model, "--frames_dir", frames_dir(data_dir, SIDE)]
    command += ["--val_annotations", filtered_annotations_path(data_dir, "val"), "--output_dir", output_dir]
    return run(*command, *extra, check=check)


def rows_of(output_dir: Path, video_id: str) -> list[dict]:
    samples = json.loads((output_dir / "rollout.json").read_text())["samples"]
    return [row for row in samples if row["video_id"] == video_id]


def test_the_model_decides_between_direct_and_chained(data_dir, models, tmp_path):
    done = sample(data_dir, models["several"], tmp_path, "--rollout", 3)
    rows = rows_of(tmp_path, "val0")
    assert [row["edit_prompt"].split(". ")[-1] for row in rows] == [
        "The frame is 1 frame later.",
        "The frame is 2 frames later.",
        "The frame is 3 frames later.",
    ]
    assert [row["psnr"] is None for row in rows_of(tmp_path, "val_short")] == [True] * 3  # frame 20 is its last
    assert "3 of the predicted frames lie beyond the end of their video" in done.stdout
    assert "warning" not in done.stderr and " horizon" in done.stdout.splitlines()[-1]

    sample(data_dir, models["several"], tmp_path, "--rollout", 2, "--rollout_mode", "chained", "--input_frame_idx", 19)
    rows = rows_of(tmp_path, "val0")
    assert [row["edit_prompt"].split(". ")[-1] for row in rows] == ["The frame is 1 frame later."] * 2

    sample(data_dir, models["one"], tmp_path, "--rollout", 4)
    rows = rows_of(tmp_path, "val0")
    assert [row["horizon"] for row in rows] == [2, 4] and "later" not in rows[0]["edit_prompt"]
    done = sample(data_dir, models["one"], tmp_path, "--rollout", 3, "--input_frame_idx", 20)
    assert [row["horizon"] for row in rows_of(tmp_path, "val0")] == [2]  # the model's horizon from another start
    assert "warning: predicting frame 20 to 22, but" in done.stderr


def test_films_run_as_fast_as_the_video(models, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    path = video_path(data_dir, "val0", ".mp4")
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    sample(data_dir, models["one"], tmp_path / "out", "--rollout", 4, "--num_samples", "all")
    # 30 a second, or 12 where the video is gone, in steps of two frames.
    for video_id, rate, duration in (("val0", 15, 70), ("val1", 6, 170)):
        folder = tmp_path / "out" / "samples" / video_id
        with av.open(str(folder / "rollout.mp4")) as container:
            assert container.streams.video[0].average_rate == rate
        with Image.open(folder / "rollout.gif") as animation:
            assert animation.info["duration"] == duration  # in milliseconds, whose tens are all that a GIF can tell


def test_training_on_several_horizons_shows_filmstrips_from_the_validation_pairs_on(data_dir, tiny_model, tmp_path):
    command = ["python", "train_instruct_pix2pix.py", "--train_data_dir", data_dir, "--output_dir", tmp_path]
    command += ["--pretrained_model_name_or_path", tiny_model, "--resolution", SIDE, "--max_train_steps", 1]
    command += ["--input_frame_idx", "any", "--horizon", "1-7", "--num_validation_images", 2]
    run(*command, "--num_inference_steps", 1)
    [event_file] = (tmp_path / "logs").rglob("events*")
    events = read_events(event_file)
    pairs, _ = load_frame_pairs(data_dir, "val", SIDE, FrameChoice(None, range(1, 8), tell_horizon=True), seed=42)
    chosen = {pair.video_id: pair for pair in choose_samples(pairs, 2, seed=42)}
    assert len({pair.paths[0].name for pair in chosen.values()}) == 2  # else the starts would not tell
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("validation_rollout/")]
    assert {tag.split("/")[1] for tag in tags} == set(chosen)
    for tag in tags:
        [shown] = events.Images(tag)
        strip = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
        assert strip.shape == (440, 6 * 192, 3)  # the start and five of the seven horizons
        assert np.array_equal(strip[56 + 3 : 248 : 6, 3:192:6], load_picture(chosen[tag.split("/")[1]].paths[0]))


def test_mistakes_get_one_line_and_leave_former_results(data_dir, models, tmp_path):
    def message(*extra: object, model: str = "one", output_dir: Path = tmp_path / "out", status: int = 1) -> str:
        done = sample(data_dir, models[model], output_dir, *extra, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert not (output_dir / "rollout.json").exists()
        return done.stderr.splitlines()[-1]

    assert "only ROLLOUT_MODE=chained is possible" in message("--rollout", 3, "--rollout_mode", "direct")
    assert "predicts 2 frames ahead" in message("--rollout", 1)
    late = message("--rollout", 3, "--input_frame_idx", 23, model="several")
    assert "none of the 3 videos chosen has both frames (frame 23 to that 1 to 3 later)" in late
    assert late.endswith("choose an earlier INPUT_FRAME_IDX")
    assert "no video of" in message("--rollout", 3, "--input_frame_idx", 70)
    assert "--rollout goes without --image" in message("--rollout", 3, "--target_frame_idx", 21, status=2)
    assert "--input_frame_idx any" in message("--rollout", 3, "--input_frame_idx", "any", status=2)
    assert "needs --rollout" in message("--rollout_mode", "direct", status=2)
    assert "must be at least 1" in message("--rollout", 0, status=2)
    (tmp_path / "other" / "samples").mkdir(parents=True)
    (tmp_path / "other" / "metrics.json").write_text("of pairs")
    assert "choose another OUTPUT_DIR" in message("--rollout", 4, output_dir=tmp_path / "other")
    assert (tmp_path / "other" / "metrics.json").read_text() == "of pairs"
