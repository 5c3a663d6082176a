"""The shell scripts, run as users run them, and the README's promises about them."""

import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from data.cli import CommandParser
from pecn.sampling_options import DEFAULT_OPTIONS, add_sampling_options, sampling_options
from tests.conftest import PROJECT, SHARED, SIDE, run

SCRIPTS = ("train_instruct_pix2pix.sh", "test_train_instruct_pix2pix.sh", "sample_from_pix2pix.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_variable_at_the_top_comes_from_the_environment_too(script):
    text = (PROJECT / script).read_text()
    assert "set -euo pipefail" in text
    top = re.findall(r"^([A-Z_0-9]+)=(.*)$", text, flags=re.MULTILINE)
    assert len(top) > 5
    for name, value in top:
        assert value.startswith(f"${{{name}:-"), f"{name} in {script}"


def test_defaults_of_the_scripts_are_the_documented_ones():
    def defaults(script: str) -> dict[str, str]:
        return dict(re.findall(r"^([A-Z_0-9]+)=\$\{\1:-([^}]*)\}", (PROJECT / script).read_text(), flags=re.MULTILINE))

    training = defaults("train_instruct_pix2pix.sh")
    expected = {"RESOLUTION": "128", "BATCH_SIZE": "16", "GRADIENT_ACCUM": "1", "EPOCHS": "20"}
    expected |= {"MIXED_PRECISION": "auto", "PROGRESS": "False", "INPUT_FRAME_IDX": "20", "TARGET_FRAME_IDX": "21"}
    expected |= {"OUTPUT_DIR": "outputs/instruct_pix2pix_128", "VALIDATION_EPOCHS": "5", "NUM_PROCESSES": "1"}
    assert {name: training[name] for name in expected} == expected
    sampling = defaults("sample_from_pix2pix.sh")
    expected = {"MODEL_DIR": "outputs/instruct_pix2pix_128", "OUTPUT_DIR": "test_result/baseline"}
    expected |= {"NUM_SAMPLES": "8", "SEED": "42"}
    assert {name: sampling[name] for name in expected} == expected

    text = (PROJECT / "sample_from_pix2pix.sh").read_text()
    not_recorded = dict(re.findall(r"^([A-Z_0-9]+)=\$\{\1:-\} +#.* \((.*)\)$", text, flags=re.MULTILINE))
    not_recorded["RESIDUAL"] = re.search(r"\((\w+)\)\.\nRESIDUAL=", text)[1]
    expected = {"FRAMES_DIR": "data/sthv2/frames_128x128", "INPUT_FRAME_IDX": "20", "TARGET_FRAME_IDX": "21"}
    expected |= {"VAL_ANNOTATIONS": "data/sthv2/annotations/val_filtered.json"}
    expected |= {"NUM_INFERENCE_STEPS": "20", "IMAGE_GUIDANCE_SCALE": "1.5", "GUIDANCE_SCALE": "1"}
    assert {name: not_recorded[name] for name in expected} == expected
    assert not any(sampling[name] for name in not_recorded)
    expected = {
        name.upper(): f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in asdict(DEFAULT_OPTIONS).items()
    }
    assert {name: not_recorded[name] for name in expected} == expected
    parser = CommandParser()
    add_sampling_options(parser)
    assert sampling_options(parser.parse_args([])) == DEFAULT_OPTIONS


def test_training_script_trains_and_logs_and_sampling_script_samples(data_dir, tiny_model, tmp_path):
    variables = {
        "PRETRAINED_MODEL": tiny_model,
        "DATA_DIR": data_dir,
        "RESOLUTION": SIDE,
        "OUTPUT_DIR": tmp_path / "model",
        "MAX_TRAIN_STEPS": 2,
        "MIXED_PRECISION": "fp16",
        "NUM_VALIDATION_IMAGES": 1,
        "NUM_INFERENCE_STEPS": 1,
        "NUM_PREDICTIONS": 3,  # two would be equally near to their mean
        "RESIDUAL": "False",
        "PROGRESS": "True",
    }
    script = PROJECT / "train_instruct_pix2pix.sh"
    done = run("bash", "-c", f"cd {tmp_path} && bash {script}", **variables)
    assert "training on the CPU, mixed precision: no" in done.stdout
    log = (tmp_path / "model" / "train.log").read_text()
    assert "training on 6 frame pairs" in log and "the trained pipeline is in" in log
    arguments = json.loads((tmp_path / "model" / "training_config.json").read_text())["arguments"]
    assert (arguments["add_progress"], arguments["global_batch_size"]) == (True, 16)
    assert arguments["mixed_precision"] == "no"  # what fp16 has become
    assert arguments["learning_rate"] == 5e-6
    assert (arguments["num_inference_steps"], arguments["residual"]) == (1, False)  # of the validation
    sampling = f"MODEL_DIR={tmp_path / 'model'} bash sample_from_pix2pix.sh"
    assert f"  {sampling}\n" in log

    run("bash", "-c", sampling, OUTPUT_DIR=tmp_path / "samples")
    assert json.loads((tmp_path / "samples" / "metrics.json").read_text())["summary"]["num_samples"] == 3
    [validation] = (tmp_path / "model" / "validation").iterdir()
    video_id = validation.stem.removeprefix("step-000002_")
    comparison = tmp_path / "samples" / "samples" / video_id / "comparison.png"
    with Image.open(validation) as validated, Image.open(comparison) as sampled:
        box = (0, 0, validated.width, 256)  # the panels: the words below name the step, and the model
        assert np.abs(np.asarray(validated.crop(box)).astype(int) - np.asarray(sampled.crop(box))).max() <= 1

    variables = {"MODEL_DIR": tmp_path / "model", "OUTPUT_DIR": tmp_path / "samples", "NUM_PREDICTIONS": 1}
    run("bash", "-c", f"cd {tmp_path} && bash {PROJECT / 'sample_from_pix2pix.sh'}", **variables)
    assert not list((tmp_path / "samples").rglob("expected.png"))


@pytest.mark.parametrize(
    ("script", "variable", "wanted"),
    [
        ("train_instruct_pix2pix.sh", "PROGRESS", "True or False"),
        ("sample_from_pix2pix.sh", "RESIDUAL", "True or False"),
        ("sample_from_pix2pix.sh", "LPIPS", "True or False"),
        ("train_instruct_pix2pix.sh", "NUM_PREDICTIONS", "is not a whole number"),
        ("train_instruct_pix2pix.sh", "RESOLUTION", "is not a whole number"),
    ],
)
def test_variables_of_another_kind_are_refused_in_one_line(script, variable, wanted, tmp_path):
    done = run("bash", script, check=False, OUTPUT_DIR=tmp_path / "output", **{variable: "yes"})
    assert done.returncode == 2
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith(f"error: argument --{'add_progress' if variable == 'PROGRESS' else variable.lower()}: ")
    assert wanted in line and "'yes'" in line


def test_quick_tests_options_follow_the_model_not_the_data(tmp_path):
    """The commands are replaced by one that only shows what it was given."""
    for name in ("python", "accelerate"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)

    def shown(**variables: object) -> str:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        variables = {name: str(value) for name, value in ({"TEST_OUTPUT": tmp_path / "out"} | variables).items()}
        command = ["bash", "test_train_instruct_pix2pix.sh"]
        return subprocess.run(
            command,
            cwd=PROJECT,
            env=os.environ | variables | {"PATH": path},
            text=True,
            capture_output=True,
            check=True,
        ).stdout

    demo = shown(DATA_DIR="data/demo")
    assert "--learning_rate 3e-4" in demo and "--max_train_steps 800" in demo and "--num_inference_steps 8 " in demo
    assert f"--against {tmp_path}/out/base_samples" in demo
    assert "--num_predictions 8 " in demo and "--strength 0.9 " in demo
    assert "--train_batch_size 8 --gradient_accumulation_steps 1 " in demo
    assert "--mixed_precision auto" in shown(NUM_PROCESSES=2).partition("train_instruct_pix2pix.py")[2]
    for variables in ({"DATA_DIR": "data/sthv2"}, {"PRETRAINED_MODEL": "timbrooks/instruct-pix2pix"}):
        other = shown(**variables)
        assert "--pretrained_model_name_or_path timbrooks/instruct-pix2pix" in other
        assert "--learning_rate" not in other and "--max_train_steps 20 " in other
        assert "--num_inference_steps" not in other and "--num_predictions" not in other and "3e-4" not in other


def test_all_that_the_gpu_script_runs_is_understood(tmp_path, monkeypatch):
    """Python is replaced by what notes its arguments; each command's own parser then reads them."""
    (tmp_path / "python").write_text('#!/bin/sh\n(printf "%s\\t" "$@"; echo) >> "$OUTPUT/commands"\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUTPUT": str(tmp_path), "MODEL": "demo"}
    command = ["bash", "benchmarks/gpu.sh"]
    subprocess.run(command, cwd=PROJECT, env=os.environ | variables, capture_output=True, check=True)
    understood = []
    for line in (tmp_path / "commands").read_text().splitlines():
        first, *words = line.split("\t")[:-1]
        if first == "-c":
            exec(words[0])
            continue
        if first == "-m":
            first, *words = words
            parse_args = importlib.import_module(first).parse_args
        else:
            parse_args = runpy.run_path(first)["parse_args"]
        monkeypatch.setattr("sys.argv", [first, *words])
        parse_args()
        understood.append(first)
    assert understood.count("train_instruct_pix2pix.py") == 5  # the quick test, and each precision in two halves
    assert understood.count("benchmarks.train_step") == 2 and understood[-1] == "benchmarks.memory"
    assert (tmp_path / "demo" / "model_index.json").is_file()


def test_failed_training_makes_the_script_fail(data_dir, tmp_path):
    variables = {"DATA_DIR": data_dir, "RESOLUTION": 64, "OUTPUT_DIR": tmp_path / "model"}
    done = run("bash", "train_instruct_pix2pix.sh", check=False, **variables)
    assert done.returncode != 0
    assert "python -m data.video_loader" in (tmp_path / "model" / "train.log").read_text()
    assert "Traceback" not in done.stdout + done.stderr


def test_quick_test_runs_on_the_embedded_default(tmp_path):
    """The README's first command, with fewer clips and steps."""
    variables = {
        "DEMO_DIR": tmp_path / "demo",
        "TEST_OUTPUT": tmp_path / "output",
        "NUM_TRAIN_CLIPS": 9,
        "NUM_VAL_CLIPS": 6,
        "MAX_TRAIN_STEPS": 2,
        "CHECKPOINTING_STEPS": 1,
        "BATCH_SIZE": 2,
        "NUM_SAMPLES": 2,
        "OMP_NUM_THREADS": 2,
    }
    done = run("bash", "test_train_instruct_pix2pix.sh", **variables)
    assert "data: the embedded default" in done.stdout
    output = tmp_path / "output"
    assert json.loads((output / "samples" / "metrics.json").read_text())["summary"]["psnr"]["copy"]["mean"] > 15
    assert (output / "samples" / "overview.png").is_file()
    assert len(list((output / "samples" / "samples").iterdir())) == 2
    assert list((output / "model" / "validation").glob("*.png"))
    assert list((output / "model" / "logs").rglob("events*"))
    assert "the quick test is done" in done.stdout
    again = run("bash", "test_train_instruct_pix2pix.sh", RESUME="latest", **variables)
    assert "no checkpoint" not in again.stdout + again.stderr  # the model of the run that goes on is kept


@pytest.mark.skipif(not (SHARED / "clips").is_dir(), reason="the real clips of ../shared are not here")
def test_real_clips_pass_through_the_whole_pipeline(tiny_model, tmp_path):
    data_dir = tmp_path / "clips"
    shutil.copytree(SHARED / "clips", data_dir)
    subprocess.run(["chmod", "-R", "u+w", str(data_dir)], check=True)
    run("python", "-m", "data.dataset", "--data_dir", data_dir)
    run("python", "-m", "data.video_loader", "--data_dir", data_dir, "--resolutions", 96)
    variables = {"DATA_DIR": data_dir, "PRETRAINED_MODEL": tiny_model, "TEST_OUTPUT": tmp_path, "RESOLUTION": 96}
    variables |= {"MAX_TRAIN_STEPS": 4, "PROGRESS": "True", "NUM_SAMPLES": "all", "NUM_INFERENCE_STEPS": 2}
    done = run("bash", "test_train_instruct_pix2pix.sh", **variables)
    assert f"data: {data_dir}" in done.stdout
    assert "1 without frame 20 (30011)" in done.stdout
    metrics = json.loads((tmp_path / "samples" / "metrics.json").read_text())
    assert all(row["edit_prompt"].endswith("% of the action has been completed.") for row in metrics["samples"])
    assert metrics["summary"]["num_samples"] == 3


def test_ci_runs_the_readmes_test_command():
    ci, readme = (PROJECT / ".ci" / "run").read_text(), (PROJECT / "README.md").read_text()
    command = "pip install -r requirements.txt && python -m pytest"
    assert command in readme
    assert command in ci.replace("--quiet ", "")
    assert "pip install -r requirements.txt && bash test_train_instruct_pix2pix.sh" in readme
    assert os.access(PROJECT / ".ci" / "run", os.X_OK)
