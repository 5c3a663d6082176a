"""Each benchmark runs on tiny input, and what it prints is of the right form."""

import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import sampling_options, score_folder, study, train_step
from benchmarks.study import Setting, Study
from data.cli import UserError
from data.paths import frame_path, frames_dir
from tests.conftest import SIDE, run

STUDY = study.__file__  # in the place of a file of progress
VIDEOS = ("val0", "val1", "val2")


def frame(data_dir: Path, video_id: str, index: int) -> np.ndarray:
    return np.asarray(Image.open(frame_path(frames_dir(data_dir, SIDE), video_id, index)))


def save(folder: Path, pictures: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    for video_id, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{video_id}.png")
    return folder


# A training step


def test_training_steps_are_compared(capsys):
    """Fails where plain or ours computes anything but the loss that they share."""
    train_step.main(train_step.parse_args(["--quick", "--resolution", "32"]))
    title, head, *lines, agreement, _ = capsys.readouterr().out.split("\n")[:-1]
    assert "32x32, batch 2, mixed precision no, cpu" in title
    assert head.split() == "alternative samples/s ratio s/step CPU s/step CPU ratio".split()
    rows = {name: [float(number) for number in numbers] for name, *numbers in map(str.split, lines)}
    assert list(rows) == ["plain", "ours"] and rows["plain"][1] == 1
    assert agreement.startswith("the same work: ")


# Ways to sample


def test_ways_to_sample_are_compared(data_dir, tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    arguments = {"resolution": SIDE, "input_frame_idx": 20, "horizon": "2", "num_predictions": 2, "scheduler": "euler"}
    (model / "training_config.json").write_text(json.dumps({"arguments": arguments}))
    words = ["--quick", "--model_dir", str(model), "--data_dir", str(data_dir), "--image_guidance_scale", "1"]
    sampling_options.main(sampling_options.parse_args(words))
    title, _, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"3 pairs of {data_dir}, model {model}, ")
    assert "--image_guidance_scale 1.0 --scheduler euler --strength 1.0 --num_predictions 2" in title
    assert head.split()[-7:] == ["SSIM", "-", "copy", "PSNR", "-", "copy", "s/pair"]
    ways = ["sample", "sample", "sample", "sample", "expected"]
    for line, way in zip(lines, ways, strict=True):
        assert re.search(rf" {way} +[\d.]+ +\d+%( +[+-][\d.]+ ± [\d.]+){{2}} +[\d.]+$", line), line


# Pictures of another system


def test_foreign_pictures_are_scored(data_dir, tmp_path, capsys):
    def score(predictions: Path, name: str, *words: object) -> list[str]:
        common = ["--predictions", predictions, "--output_dir", tmp_path / name, *words]
        score_folder.main(score_folder.parse_args([str(word) for word in common]))
        return capsys.readouterr().out.splitlines()

    targets = {name: frame(data_dir, name, 21) for name in VIDEOS}
    truth = save(tmp_path / "truth", targets | dict.fromkeys(["val_short", "stranger"], targets["val0"]))
    data = ("--data_dir", data_dir, "--resolution", SIDE)
    lines = score(truth, "scored", *data)
    assert "1 without frame 21 (val_short)" in lines[0] and "1 not a validation video (stranger)" in lines[0]
    rows = json.loads((tmp_path / "scored" / "metrics.json").read_text())["samples"]
    assert [row["sample"]["psnr"] for row in rows] == [100, 100, 100]  # the target itself
    assert any(line.startswith("where something moves the prediction is better than copying: +") for line in lines)

    strips = {name: np.hstack([frame(data_dir, name, index) for index in (20, 21, 20)]) for name in VIDEOS[:2]}
    lines = score(
        save(tmp_path / "strips", strips), "strips_scored", "--layout", "strip", "--against", tmp_path / "scored"
    )
    assert "left out: 1 not scored alike in both (val2)" in lines
    assert lines[-1].startswith(f"where something moves the prediction is worse than {tmp_path / 'scored'}: -")

    with pytest.raises(UserError, match="choose their --resolution"):
        score(save(tmp_path / "large", {"val0": np.tile(frame(data_dir, "val0", 21), (2, 2, 1))}), "out", *data)
    assert not (tmp_path / "out" / "metrics.json").exists()


# Studies


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """What a study runs: the scripts in forked processes, which have loaded the libraries."""
    called: list[str] = []

    def call(words, log):
        called.append(str(words[0]))
        run("python", *words)

    monkeypatch.setattr(study, "call", call)
    frames = "--input_frame_idx 20 --horizon 1"
    settings = [Setting(name, f"{frames} --add_progress {value}", frames) for name, value in study.PROGRESS.items()]
    groups = {"20 -> 21": [settings[0], settings[3]]}  # none, constant
    tiny = Study("--max_train_steps 1 --train_batch_size 1", "--num_inference_steps 1", groups)
    monkeypatch.setattr(study, "STUDIES", {"progress": tiny})
    return called


def test_a_study_compares_settings_and_goes_on(commands, data_dir, tiny_model, tmp_path, capsys):
    words = ["progress", "--work_dir", tmp_path, "--data_dir", data_dir, "--resolution", SIDE, "--seeds", 0]
    args = study.parse_args([str(word) for word in (*words, "--pretrained_model_name_or_path", tiny_model)])
    study.main(args)
    head, *lines = capsys.readouterr().out.splitlines()[:3]
    assert "setting" in head and "PSNR of sample - copy" in head and "difference, dB" in head
    assert re.search(r"20 -> 21 +none +3 +[\d.]+ +\d+% +[+-][\d.]+ *$", lines[0])
    assert re.search(r"constant +3 +[\d.]+ +\d+% +[+-][\d.]+ +[+-][\d.]+ ± [\d.]+ +[+-][\d.]+$", lines[1])
    assert commands == [study.TRAIN, study.SAMPLE] * 2
    assert not list(tmp_path.rglob("*.safetensors"))  # models are not kept
    prompts = {
        row["edit_prompt"] for path in tmp_path.rglob("metrics.json") for row in json.loads(path.read_text())["samples"]
    }
    assert sum("And 50% of the action" in prompt for prompt in prompts) == len(prompts) / 2  # of 40 frames

    study.main(args)
    assert capsys.readouterr().out.splitlines()[1:3] == lines and len(commands) == 4


def test_every_flag_of_the_studies_is_understood():
    parse_training = runpy.run_path(study.TRAIN)["parse_args"]
    parse_sampling = runpy.run_path(study.SAMPLE)["create_parser"]().parse_args
    for of_name in study.STUDIES.values():
        for setting in itertools.chain(*of_name.groups.values()):
            parse_training(f"{of_name.training} {setting.training.format(estimates=STUDY, constant=STUDY)}".split())
            parse_sampling(f"--model_dir m {of_name.sampling} {setting.sampling}".split())
