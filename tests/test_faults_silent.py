"""Neither lost nor silent: validations that fail, steps that are skipped, a checkpoint that one machine alone has."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import SIDE, fork_script, make_data_dir, run, scalars

SCRIPT = "train_instruct_pix2pix.py"


def options(data_dir: object, model: Path, output_dir: object, *others: object) -> list[object]:
    words = ["--train_data_dir", data_dir, "--pretrained_model_name_or_path", model, "--output_dir", output_dir]
    words += ["--resolution", SIDE, "--train_batch_size", 4, "--learning_rate", 1e-3, "--num_inference_steps", 1]
    return [*words, "--max_train_steps", 8, "--num_validation_images", 0, *others]


def change_weight(model: Path, part: str, name: str, factor: float) -> None:
    path = model / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[name] *= factor
    save_file(weights, path, {"format": "pt"})


def trained_weights(output_dir: Path) -> bytes:
    return (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_failed_validation_is_a_warning_and_changes_no_weight(data_dir, tiny_model, tmp_path):
    """The decoder's pictures are not finite; then the pictures' folder is a file."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    change_weight(model, "vae", "decoder.conv_out.weight", torch.nan)
    (tmp_path / "no_folder").mkdir()
    (tmp_path / "no_folder" / "validation").touch()
    validated = ("--num_validation_images", 1, "--validation_epochs", 2)
    causes = {"not_finite": "the model's output is not finite", "no_folder": "File exists"}
    for name, cause in causes.items():
        base = model if name == "not_finite" else tiny_model
        done = run("python", SCRIPT, *options(data_dir, base, tmp_path / name, *validated))
        lines = [line for line in re.split("[\r\n]", done.stderr) if line.startswith("warning: ")]
        assert [re.search(r"validation of step (\d+) failed", line)[1] for line in lines] == ["3", "6", "8"]
        assert all(cause in line and line.endswith("training is not affected") for line in lines)
    run("python", SCRIPT, *options(data_dir, tiny_model, tmp_path / "without"))
    assert trained_weights(tmp_path / "without") == trained_weights(tmp_path / "not_finite")
    assert trained_weights(tmp_path / "without") == trained_weights(tmp_path / "no_folder")


WITH_SCALER = """
import runpy, sys, torch
from accelerate import Accelerator

prepare = Accelerator.prepare

def prepare_with_scaler(accelerator, *objects):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    return prepare(accelerator, *objects)

Accelerator.prepare = prepare_with_scaler
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_whose_every_step_is_skipped_says_so_and_saves_no_pipeline(data_dir, tiny_model, tmp_path):
    """Losses of 1e14 are finite, but not at fp16's scale, which starts so high here that it never gets low enough."""
    model, output_dir = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "output"
    change_weight(model, "unet", "conv_out.weight", 1e8)
    words = options(data_dir, model, output_dir, "--max_train_steps", 24)
    done = run("python", "-c", WITH_SCALER, SCRIPT, *words, check=False)
    assert done.returncode == 1
    assert done.stderr.count("warning: the 20 steps up to 20 were skipped: gradients are not finite in fp16") == 1
    assert done.stderr.splitlines()[-1].startswith("error: every step was skipped and nothing learned: ")
    assert not (output_dir / "model_index.json").exists()
    scales = scalars(output_dir / "logs", "train/grad_scale")
    assert {10, 20, 24} <= scales.keys() and scales == {step: 2.0 ** (126 - step) for step in scales}


@pytest.fixture
def run_on_two_machines(tiny_model, tmp_path):
    """Trains with two processes that share no files; returns the exit status and what was printed for each.

    Each has a folder of its own, `machine0` and `machine1`, with a prepared data directory.
    """
    folders = [tmp_path / "machine0", tmp_path / "machine1"]
    for folder in folders:
        make_data_dir(folder / "data")

    def run_on_two_machines(*others: object) -> list[tuple[int, str]]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        words = [SCRIPT, *(str(word) for word in options("data", tiny_model, "output", *others))]
        logs = [folder / "log" for folder in folders]
        for log in logs:
            log.unlink(missing_ok=True)
        processes = [
            fork_script(words, log, log, folder=folder, RANK=str(rank), **shared, **own)
            for rank, (folder, log) in enumerate(zip(folders, logs))
        ]
        try:
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
        return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs)]

    return run_on_two_machines


def test_machines_without_shared_files_encode_each_and_miss_the_checkpoint_aloud(run_on_two_machines, tmp_path):
    first, second = tmp_path / "machine0", tmp_path / "machine1"
    options = ("--train_batch_size", 2, "--checkpointing_steps", 2)
    assert [status for status, _ in run_on_two_machines(*options, "--max_train_steps", 2)] == [0, 0]
    caches = [sorted(path.name for path in (folder / "data/encoded_cache").iterdir()) for folder in (first, second)]
    assert caches[0] == caches[1] and len(caches[0]) == 2

    resume = (*options, "--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    expected = rf"on {socket.gethostname()} output/checkpoint-2 is missing: copy it there from the first machine"
    for (status, printed), start in zip(run_on_two_machines(*resume), ("error: ", "error on process 1: ")):
        assert status == 1 and "Traceback" not in printed
        assert printed.splitlines()[-1].startswith(start + expected)

    shutil.copytree(first / "output/checkpoint-2", second / "output/checkpoint-2")
    (status, printed), (other_status, _) = run_on_two_machines(*resume)
    assert status == other_status == 0 and "resuming from output/checkpoint-2" in printed
