"""The shell scripts, run as users run them: the pipeline from end to end."""

import importlib
import json
import os
import runpy
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

import data.dataset
import data.video_loader
from tests.commands import call
from tests.conftest import PROJECT, SHARED, SIDE, run, sampling_command, train


def pictures(path):
    """The panels of a comparison picture, without the words above them, which name the step or the model."""
    return np.asarray(Image.open(path)).astype(int)[-200:]


def test_training_script_trains_and_logs_and_the_command_that_it_prints_samples(data_dir, tiny_model, tmp_path):
    variables = {"PRETRAINED_MODEL": tiny_model, "DATA_DIR": data_dir, "RESOLUTION": SIDE, "MAX_TRAIN_STEPS": 2}
    variables |= {"OUTPUT_DIR": tmp_path / "model", "MIXED_PRECISION": "fp16", "PROGRESS": "True", "HORIZON": 2}
    variables |= {"NUM_VALIDATION_IMAGES": 1, "NUM_INFERENCE_STEPS": 1, "NUM_PREDICTIONS": 3, "KEEP_BACKGROUND": "True"}
    done = run("bash", "-c", f"cd {tmp_path} && bash {PROJECT / 'train_instruct_pix2pix.sh'}", **variables)
    assert "training on the CPU, mixed precision: no" in done.stdout
    log = (tmp_path / "model" / "train.log").read_text()
    assert "training on 6 frame pairs (frame 20 to 22" in log and "the trained pipeline is in" in log
    assert "\r" not in log and "2/2" in log  # of each bar the last state
    arguments = json.loads((tmp_path / "model" / "training_config.json").read_text())["arguments"]
    expected = {"add_progress": True, "global_batch_size": 16, "learning_rate": 5e-6, "num_inference_steps": 1}
    expected |= {"mixed_precision": "no", "keep_background": True, "horizon": "2"}  # "no" is what fp16 has become
    assert {name: arguments[name] for name in expected} == expected
    sampling = f"MODEL_DIR={tmp_path / 'model'} bash sample_from_pix2pix.sh"
    assert f"  {sampling}\n" in log

    run("bash", "-c", sampling, OUTPUT_DIR=tmp_path / "samples")
    metrics = json.loads((tmp_path / "samples" / "metrics.json").read_text())
    assert metrics["summary"]["all"]["num_pairs"] == 3 and metrics["settings"]["num_predictions"] == 3
    [validation] = (tmp_path / "model" / "validation").glob("step-000002*")
    comparison = tmp_path / "samples" / "samples" / validation.stem.removeprefix("step-000002_") / "comparison.png"
    assert np.abs(pictures(validation) - pictures(comparison)).max() <= 1  # sampling does as validation did


def test_quick_test_runs_on_the_embedded_default(tmp_path):
    """The README's first command, with fewer clips and steps."""
    output = tmp_path / "output"
    variables = {"DEMO_DIR": tmp_path / "demo", "TEST_OUTPUT": output, "NUM_TRAIN_CLIPS": 9, "NUM_VAL_CLIPS": 6}
    variables |= {"MAX_TRAIN_STEPS": 2, "BATCH_SIZE": 2, "NUM_SAMPLES": 2, "NUM_VALIDATION_IMAGES": 1}
    done = run("bash", "test_train_instruct_pix2pix.sh", **variables, OMP_NUM_THREADS=2)
    assert "data: the embedded default" in done.stdout and "the quick test is done" in done.stdout
    assert f" {output}/base_samples: " in done.stdout  # what fine-tuning added
    summary = json.loads((output / "samples" / "metrics.json").read_text())["summary"]["all"]
    assert summary["copy"]["whole_psnr"]["value"] > 15 and "expected" in summary
    assert (output / "samples" / "random_pairs.png").is_file()
    assert len(list((output / "samples" / "samples").iterdir())) == 2
    assert list((output / "model" / "validation").glob("*.png")) and list((output / "model" / "logs").rglob("events*"))


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="the real clips of ../shared are not here")
def test_real_clips_pass_through_the_whole_pipeline(tiny_model, tmp_path):
    data_dir, model, results = tmp_path / "clips", tmp_path / "model", tmp_path / "samples"
    shutil.copytree(SHARED / "clips", data_dir)
    subprocess.run(["chmod", "-R", "u+w", str(data_dir)], check=True)
    assert not call(data.dataset, "--data_dir", data_dir).returncode
    assert not call(data.video_loader, "--data_dir", data_dir, "--resolutions", SIDE).returncode
    done = train(data_dir, tiny_model, model, "--add_progress", "--num_validation_images", 1, "--max_train_steps", 2)
    assert "1 without frame 20 (30011)" in done.stdout
    run("python", *sampling_command(data_dir, model, results, "--num_samples", "all"))
    metrics = json.loads((results / "metrics.json").read_text())
    assert all(row["edit_prompt"].endswith("% of the action has been completed.") for row in metrics["samples"])
    assert metrics["summary"]["all"]["num_pairs"] == 3


@pytest.mark.parametrize(
    ("script", "variable", "wanted"),
    [
        ("train_instruct_pix2pix.sh", "PROGRESS", "is neither True, False, nor a file"),
        ("train_instruct_pix2pix.sh", "NUM_PREDICTIONS", "is not a whole number"),
        ("sample_from_pix2pix.sh", "KEEP_BACKGROUND", "True or False"),
        ("sample_from_pix2pix.sh", "STRENGTH", "is not a number"),
    ],
)
def test_variables_of_another_kind_are_refused_in_one_line(script, variable, wanted, tmp_path):
    done = run("bash", script, check=False, OUTPUT_DIR=tmp_path, MODEL_DIR="x", **{variable: "yes"})
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith(f"error: argument --{'add_progress' if variable == 'PROGRESS' else variable.lower()}: ")
    assert wanted in line and "'yes'" in line
    assert script.startswith("sample") or (tmp_path / "train.log").read_text() == f"{line}\n"


@pytest.fixture
def commands(tmp_path):
    """Runs a script whose commands are replaced by one that shows what it was given; returns their words."""
    for name in ("python", "accelerate"):
        (tmp_path / name).write_text('#!/bin/sh\n(printf "%s\\t" "$@"; echo) >> "$COMMANDS"\n')
        (tmp_path / name).chmod(0o755)

    def commands(script: str, **variables: object) -> list[list[str]]:
        file = tmp_path / "commands.txt"
        file.unlink(missing_ok=True)
        variables = {"COMMANDS": file, "TEST_OUTPUT": tmp_path / "out"} | variables
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        environment["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", script], cwd=PROJECT, env=environment, capture_output=True, check=True)
        return [line.split("\t")[:-1] for line in file.read_text().splitlines()]

    return commands


def test_the_quick_tests_options_follow_the_model_not_the_data(commands, tmp_path):
    def options(**variables: object) -> str:
        """Of the training, and of the sampling from what it left."""
        _, *words = commands("test_train_instruct_pix2pix.sh", **variables)
        return " ".join(word.replace("=", " ", 1) for line in words for word in line) + " "

    kept = tmp_path / "out" / "model" / "checkpoint-1"
    kept.mkdir(parents=True)
    demo = options(DATA_DIR="data/demo", RESUME="latest")
    assert kept.is_dir() and "--resume_from_checkpoint latest " in demo  # the model of the run that goes on is kept
    assert "--learning_rate 8e-4 " in demo and "--max_train_steps 150 " in demo and "--num_inference_steps 8 " in demo
    assert f"--against {tmp_path}/out/base_samples " in demo and "--scheduler euler " in demo
    assert "--train_batch_size 8 --gradient_accumulation_steps 1 " in demo
    assert "--mixed_precision auto " in options(DATA_DIR="data/demo", NUM_PROCESSES=2).partition("pix2pix.py")[2]
    assert not kept.is_dir()
    for variables in ({"DATA_DIR": "data/sthv2"}, {"PRETRAINED_MODEL": "timbrooks/instruct-pix2pix"}):
        lines = commands("test_train_instruct_pix2pix.sh", **variables)
        other = " ".join(word.replace("=", " ", 1) for line in lines for word in line)
        assert "--pretrained_model_name_or_path timbrooks/instruct-pix2pix" in other
        assert "--learning_rate" not in other and "--max_train_steps 20 " in other
        assert "--num_inference_steps" not in other and "--num_predictions 1 " in other + " "


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ("train_instruct_pix2pix.sh", {"TARGET_FRAME_IDX": 25}),
        ("train_instruct_pix2pix.sh", {"INPUT_FRAME_IDX": "any", "HORIZON": "1-10", "LORA": "True"}),
        ("train_instruct_pix2pix.sh", {"ACCELERATE_CONFIG": "file.yaml", "EXTRA_ARGS": "--use_ema --random_flip"}),
        ("sample_from_pix2pix.sh", {"ROLLOUT": 10, "ROLLOUT_MODE": "chained", "SCHEDULER": "euler"}),
        ("sample_from_pix2pix.sh", {"IMAGE": "a photo.jpg", "PROMPT": "pushing a cup", "PROGRESS": 40}),
        ("train_instruct_pix2pix.sh", {"DATA_DIR": "-data", "PRETRAINED_MODEL": "-model", "RESUME": "-1"}),
        ("sample_from_pix2pix.sh", {"MODEL_DIR": "-model", "IMAGE": "-a photo.jpg", "PROMPT": "-pushing a cup"}),
        ("benchmarks/gpu.sh", {"MODEL": "demo"}),
    ],
)
def test_all_that_the_scripts_run_is_understood(script, variables, commands, monkeypatch, tmp_path):
    """Each command's own parser reads what it would be given."""
    own = {"OUTPUT_DIR": tmp_path / "run", "OUTPUT": tmp_path / "gpu"}
    for first, *words in commands(script, **own, **variables):
        if first == "-c":
            continue
        if first == "launch":  # of accelerate, with options of its own
            place = words.index("train_instruct_pix2pix.py")
            first, words = words[place], words[place + 1 :]
        if first == "-m":
            first, *words = words
            parse_args = importlib.import_module(first).parse_args
        else:
            functions = runpy.run_path(first)
            parse_args = functions["create_parser" if first.startswith("sample") else "parse_args"]
            parse_args = parse_args().parse_args if first.startswith("sample") else parse_args
        monkeypatch.setattr("sys.argv", [first, *words])
        args = parse_args()
        assert script.startswith("benchmarks") or args.output_dir == tmp_path / "run"
