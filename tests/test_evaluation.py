"""sample_from_pix2pix.py: what it predicts, what it leaves, and what it refuses. (Rollouts: test_rollouts.py;
a picture of your own: test_own_picture.py.)"""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data.files import write_json
from data.paths import frame_path, frames_dir
from pecn.evaluation import results_folder
from tests.conftest import SIDE, entry, last_line, make_data_dir, run, sampling_command, write_frames

RESULTS = ["metrics.json", "overview.png", "random_pairs.png", "samples", "scores.png"]
RECORD = {"resolution": SIDE, "input_frame_idx": 20, "horizon": "1", "tell_horizon": False, "scheduler": "euler"}
RECORD |= {"add_progress": False}


def sample(data_dir, model, output_dir, *options, check=True):
    return run("python", *sampling_command(data_dir, model, output_dir, *options), check=check)


def results(output_dir):
    return json.loads((output_dir / "metrics.json").read_text())


def read(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture
def recorded(tiny_model, tmp_path):
    """Makes a model as training leaves it: `recorded(name, **arguments)`."""

    def make(name, **arguments):
        model = shutil.copytree(tiny_model, tmp_path / name)
        write_json(model / "training_config.json", {"arguments": RECORD | arguments, "library_versions": {}})
        return model

    return make


def test_run_leaves_pictures_scores_and_a_table(data_dir, recorded, tmp_path):
    output_dir, model = tmp_path / "out", recorded("model", add_progress=True)
    (output_dir / "samples" / "old").mkdir(parents=True)
    (output_dir / "metrics.json").write_text("of an earlier run")
    (output_dir / "notes.txt").write_text("mine")
    (output_dir / ".new.partial" / "samples").mkdir(parents=True)  # of a run that was killed
    options = ("--num_samples", "all", "--batch_size", 3, "--num_predictions", 2, "--keep_background")
    done = sample(data_dir, model, output_dir, *options)
    assert sorted(path.name for path in output_dir.glob("[!.]*")) == sorted([*RESULTS, "notes.txt"])
    assert not (output_dir / "samples" / "old").exists() and not list(output_dir.glob(".*.partial"))
    written = results(output_dir)
    assert written["settings"]["keep_background"] and "background kept" in done.stdout
    group, rows = written["summary"]["all"], written["samples"]
    assert (group["num_pairs"], group["num_moving"], group["num_without_target"]) == (3, 3, 1)
    assert sorted(row["video_id"] for row in rows) == ["val0", "val1", "val2", "val_short"]
    scored = [row for row in rows if row["video_id"] != "val_short"]
    for row in rows:
        pictures = {path.stem: path for path in (output_dir / "samples" / row["video_id"]).iterdir()}
        target = ["target"] if row in scored else []
        assert sorted(pictures) == sorted(["comparison", "expected", "input", "prediction", "uncertainty", *target])
        for way, file in (("sample", "prediction"), ("expected", "expected"), ("copy", "input")):
            if row in scored:
                truth, picture = (read(pictures[name]).astype(np.uint8) for name in ("target", file))
                assert row[way]["whole_psnr"] == pytest.approx(peak_signal_noise_ratio(truth, picture))
                ssim = structural_similarity(truth, picture, channel_axis=2, data_range=255)
                assert row[way]["whole_ssim"] == pytest.approx(ssim)
    assert sum(row["edit_prompt"].endswith("And 50% of the action has been completed.") for row in rows) == 3
    for way in ("sample", "expected", "copy", "vae_ceiling"):
        assert group[way]["psnr"]["value"] == pytest.approx(np.mean([row[way]["psnr"] for row in scored]))
        assert way.replace("vae_", "VAE ") in done.stdout
    assert f"{group['copy']['psnr']['value']:.2f}" in done.stdout and "cover_object, 1 pair" not in done.stdout
    assert "not scored, as their video ends before: 1 of 4 (frame 20 to 21)" in done.stdout


def test_runs_are_compared_on_the_pairs_of_both(data_dir, tiny_model, tmp_path):
    """Pictures do not depend on the batch or on how many are drawn."""
    sample(data_dir, tiny_model, tmp_path / "all", "--num_samples", "all", "--batch_size", 4)
    names = {path.name for path in (tmp_path / "all" / "samples").rglob("*.png")}
    assert names == {"comparison.png", "input.png", "prediction.png", "target.png"}  # one draw has no mean
    options = ("--num_samples", 2, "--batch_size", 1, "--against", tmp_path / "all")
    done = sample(data_dir, tiny_model, tmp_path / "two", *options)
    assert "will be replaced" not in done.stdout
    assert "will be replaced" not in sample(data_dir, tiny_model, tmp_path / "two", *options).stdout
    assert (
        "results of another model or other settings"
        in sample(data_dir, tiny_model, tmp_path / "two", "--seed", 1).stdout
    )
    done = sample(data_dir, tiny_model, tmp_path / "two", *options)
    folders = list((tmp_path / "two" / "samples").iterdir())
    left = sorted({"val0", "val1", "val2"} - {folder.name for folder in folders})
    assert len(folders) == 2 and f"left out: {len(left)} not scored alike in both ({left[0]}" in done.stdout
    assert f"not clearly better than {tmp_path / 'all'}: " in done.stdout and "there 0%" in done.stdout
    for folder in folders:
        one, other = (read(path / "prediction.png") for path in (folder, tmp_path / "all" / "samples" / folder.name))
        assert np.abs(one - other).max() <= 1  # rounding of the last bit differs with the batch


def test_what_is_left_out_is_as_the_model_was_trained_and_a_flag_overrides(data_dir, tiny_model, recorded, tmp_path):
    def sampled(model, **flags):
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        run("python", "sample_from_pix2pix.py", "--model_dir", model, "--output_dir", tmp_path / "out", *words)
        return results(tmp_path / "out")["samples"]

    frames = {"input_frame_idx": 19, "horizon": "3", "tell_horizon": False}
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "image_guidance_scale": 1.25, "scheduler": "euler"}
    options |= {"strength": 0.5, "num_predictions": 2, "keep_background": True}
    place = {"train_data_dir": str(data_dir), "resolution": SIDE, "add_progress": True}
    model = recorded("model", **place, **frames, **options)
    left_out = sampled(model)
    assert len(left_out) == 4 and left_out[0]["edit_prompt"].endswith("completed.")
    flags = {"data_dir": data_dir, "resolution": SIDE, "input_frame_idx": 19, "target_frame_idx": 22, **options}
    assert sampled(tiny_model, add_progress=True, **flags) == left_out
    assert "expected" not in sampled(model, num_predictions=1)[0]
    assert not any("completed" in row["edit_prompt"] for row in sampled(model, add_progress=False))
    assert sampled(model, keep_background=False) != left_out
    earlier = {"target_frame_idx": 22, "horizon": None, "progress_source": "oracle", "residual": False}
    del RECORD["tell_horizon"]
    old = recorded("old", **place, **options | {"keep_background": False}, input_frame_idx=19, **earlier)
    RECORD["tell_horizon"] = False
    assert sampled(old, keep_background=True) == left_out  # a record of an earlier version


def test_progress_comes_from_a_file(data_dir, recorded, tmp_path):
    """Recorded with the model as training leaves it; of frame 20 of every validation video."""
    ids = [f"val{number}" for number in range(3)] + ["val_short"]
    told = dict(zip(ids, (10, 40, 70, 90)))
    write_json(tmp_path / "file.json", {"train": {}, "val": {name: {"20": told[name]} for name in ids}})
    model = recorded("model", add_progress=str(tmp_path / "file.json"))
    sample(data_dir, model, tmp_path / "out", "--num_samples", "all")
    for row in results(tmp_path / "out")["samples"]:
        assert row["edit_prompt"].endswith(f"And {told[row['video_id']]}% of the action has been completed.")
    write_json(tmp_path / "file.json", {"val": {"val0": {"20": 10}}})
    done = sample(data_dir, model, tmp_path / "out", check=False)
    assert "file.json has no estimate for frame 20 of video val1" in last_line(done.stderr)
    (tmp_path / "file.json").write_text("no JSON")
    done = sample(data_dir, model, tmp_path / "out", check=False)
    assert "file.json holds no estimates of progress" in last_line(done.stderr) and "Traceback" not in done.stderr


def test_prompts_are_worded_as_in_training_and_another_wording_warns(data_dir, recorded, tmp_path):
    wording = {"prompt_prefix": "Edit:", "example_prompt": "Edit: pushing a cup from left to right"}
    command = (data_dir, recorded("model", **wording), tmp_path / "out", "--num_samples", 1)
    assert "warning" not in sample(*command).stderr
    [row] = results(tmp_path / "out")["samples"]
    assert row["edit_prompt"].startswith("Edit: ") and "future" not in row["edit_prompt"]
    done = sample(*command, "--prompt_prefix", "Draw:")
    assert "warning: prompts are like 'Draw: pushing a cup from left to right', but " in done.stderr
    assert "was trained with 'Edit: pushing a cup from left to right'" in done.stderr


def test_other_frames_than_trained_work_with_a_warning(data_dir, recorded, tiny_model, tmp_path):
    model = recorded("model", horizon="2")
    done = sample(data_dir, model, tmp_path / "out", "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning: predicting frame 19 to 21, but" in done.stderr and "trained with frame 20 to 22" in done.stderr
    done = sample(data_dir, model, tmp_path / "out", "--input_frame_idx", "any", "--num_samples", 2)
    assert "any frame to the one 2 later, " in done.stdout
    plain = sample(data_dir, tiny_model, tmp_path / "out", "--input_frame_idx", 19, "--num_samples", 1)
    assert "warning" not in plain.stderr
    several = recorded("several", input_frame_idx="any", horizon="1-3", tell_horizon=True)
    done = sample(data_dir, several, tmp_path / "out", "--target_frame_idx", 22, "--num_samples", "all")
    assert "warning" not in done.stderr and "frame 20 to 22, " in done.stdout
    assert all(row["edit_prompt"].endswith("is 2 frames later.") for row in results(tmp_path / "out")["samples"])


def test_the_overview_goes_from_the_best_pair_to_the_worst(tiny_model, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    entries = [entry(f"v{number}", "move_object") for number in range(22)]
    for number in range(22):
        write_frames(data_dir, f"v{number}", range(19, 24), seed=number)
    write_json(data_dir / "annotations" / "val_filtered.json", entries)
    sample(data_dir, tiny_model, tmp_path / "out", "--num_samples", "all")
    gains = {
        row["video_id"]: row["sample"]["psnr"] - row["copy"]["psnr"] for row in results(tmp_path / "out")["samples"]
    }
    ranked = sorted(gains, key=gains.get, reverse=True)
    overview = read(tmp_path / "out" / "overview.png")
    for place, of_all in ((0, 0), (8, 21)):
        shown = np.split(overview, 9)[place]
        comparison = read(tmp_path / "out" / "samples" / ranked[of_all] / "comparison.png")
        assert np.array_equal(shown[: len(comparison), : comparison.shape[1]], comparison)
    rows = np.split(read(tmp_path / "out" / "random_pairs.png"), 10)  # 20 pairs, two in a row
    strips = [strip for row in rows for strip in np.split(row, 2, axis=1)]
    assert len({strip.tobytes() for strip in strips}) == 20


def test_mistakes_get_one_line_and_leave_former_results(data_dir, tiny_model, recorded, tmp_path):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "metrics.json").write_text("former")

    def message(*options, model=tiny_model, data_dir=data_dir, status=1):
        done = sample(data_dir, model, output_dir, *options, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert [path.name for path in output_dir.glob("[!.]*")] == ["metrics.json"]
        return last_line(done.stderr)

    assert "python -m data.video_loader" in message("--resolution", 64)
    assert "no validation video of" in message("--input_frame_idx", 70, "--target_frame_idx", 71)
    assert "choose a later target" in message("--input_frame_idx", 20, "--target_frame_idx", 20)
    assert "say with HORIZON" in message("--input_frame_idx", "any", "--target_frame_idx", 20)
    assert "metrics.json cannot be made (it is a file)" in message("--output_dir", output_dir / "metrics.json")
    assert "must be at least 1" in message("--image_guidance_scale", 0.5, status=2)
    assert "must be above 0" in message("--strength", 0, status=2)
    assert "a percentage as --add_progress needs --image" in message("--add_progress", 40, status=2)
    assert "has no scores of an earlier run" in message("--against", tmp_path)
    assert "no model_index.json" in message(model=data_dir)
    bad = make_data_dir(tmp_path / "bad")
    frame = frame_path(frames_dir(bad, SIDE), "val1", 20)
    frame.write_bytes(frame.read_bytes()[:100])
    assert str(frame) in message("--num_samples", "all", data_dir=bad)


def test_nothing_of_the_users_is_replaced(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(Exception, match="samples is not from an earlier run .* choose another OUTPUT_DIR"):
        with results_folder(tmp_path, "metrics.json"):
            pass
    (tmp_path / "metrics.json").write_text("former")
    with pytest.raises(KeyboardInterrupt), results_folder(tmp_path, "metrics.json") as new:
        (new / "samples").mkdir()
        raise KeyboardInterrupt
    assert (tmp_path / "metrics.json").read_text() == "former" and not list(tmp_path.glob(".*.partial"))
