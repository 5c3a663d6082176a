"""The benchmarks of sampling, in their quick form."""

import json
import re
import shutil

from tests.conftest import SIDE, run


def test_batches_draw_the_pictures_of_single_calls(tiny_model):
    done = run("python", "-m", "benchmarks.sampling", "--quick", "--model", tiny_model, "--resolution", SIDE)
    assert re.search(r"diffusers, one by one +[\d.]+ +[\d.]+ +1\.00", done.stdout)
    assert re.search(r"ours, batch 4 +[\d.]+ +[\d.]+ +[\d.]+", done.stdout)
    difference = re.search(r"largest difference between their pictures: (\d+)", done.stdout)
    assert int(difference[1]) <= 1


def test_options_are_compared_on_the_same_pairs(data_dir, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    arguments = {"resolution": SIDE, "input_frame_idx": 20, "target_frame_idx": 22, "scheduler": "ddim"}
    arguments |= {"num_predictions": 4, "residual": False}
    (model / "training_config.json").write_text(json.dumps({"arguments": arguments}))
    output = tmp_path / "scores.json"
    options = ["--model_dir", model, "--data_dir", data_dir, "--output", output]
    options += ["--num_predictions", 2]
    done = run("python", "-m", "benchmarks.sampling_options", "--quick", *options)
    rows = json.loads(output.read_text())
    assert len(rows) == 6 and all(name in done.stdout for name in rows)
    pairs = {tuple(sample["video_id"] for sample in row["samples"]) for row in rows.values()}
    assert len(pairs) == 1 and sorted(pairs.pop()) == ["val0", "val1", "val2"]
    copies = {row["summary"]["psnr"]["copy"]["mean"] for row in rows.values()}
    samples = {row["summary"]["psnr"]["sample"]["mean"] for row in rows.values()}
    assert len(copies) == 1 and len(samples) > 1  # the same pairs, predicted differently
    assert "--num_inference_steps 2 " in done.stdout and "--num_predictions 2 --residual False" in done.stdout
    assert "--scheduler ddim" in done.stdout  # as the model was validated
    assert f"copying: PSNR {copies.pop():.2f} dB" in done.stdout
    lines = {name: next(line for line in done.stdout.splitlines() if line.startswith(f"{name} ")) for name in rows}
    for name, row in rows.items():
        moving, cells = row["summary"]["moving"], lines[name].removeprefix(name).split()
        ways = [way for way in ("sample", "expected") if way in moving["psnr"]]
        assert ("expected" in ways) == (name not in ("the paper's (diffusers' pipeline)", "the paper's, residual"))
        shown = []
        for way in ways:
            shown += [f"{moving['sharpness'][way]['median']:.2f}", f"{moving['ssim'][way]['gain']:+.3f}"]
            shown += [f"{moving['psnr'][way]['gain']:+.2f}", f"{moving['frames'][way]['share']:.0%}"]
        assert cells[:-1] == shown + ["-"] * (8 - len(shown))  # the last is the seconds for a pair


def test_a_missing_model_is_not_blamed_on_the_data(tmp_path, data_dir):
    options = ("--model_dir", tmp_path / "nowhere", "--data_dir", data_dir)
    done = run("python", "-m", "benchmarks.sampling_options", "--quick", *options, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"there is no directory {tmp_path / 'nowhere'}" in done.stderr.splitlines()[-1]


def test_a_model_without_pairs_is_one_line(tmp_path, data_dir, tiny_model):
    options = ("--model_dir", tiny_model, "--data_dir", data_dir)  # no training config: 128 pixels
    done = run("python", "-m", "benchmarks.sampling_options", "--quick", *options, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
