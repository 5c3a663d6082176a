"""Faults during training: kills, signals, full disks, damaged files, too little memory. Each happens for real."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from data.paths import frame_path, frames_dir
from pecn.checkpoints import checkpoint_steps
from pecn.training import PROJECT_NAME
from tests.conftest import (
    PROJECT,
    SIDE,
    STEPS,
    fork_script,
    hear_ctrl_c,
    last_line,
    make_data_dir,
    read_events,
    scalars,
    train,
    training_command,
    unet_file,
)

ENDLESS = ("--max_train_steps", 5000, "--checkpointing_steps", 5000)
RUNNING = re.compile(rf"[1-9]\d*/{STEPS}|[1-9]\d*/5000")  # the progress bar after at least one step
RESUME = ("--resume_from_checkpoint", "latest")


class Training:
    """A running training process, forked."""

    def __init__(self, log: Path, words: list[str], memory: int | None) -> None:
        self.log, self.process = log, fork_script(words, log, log, memory)

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def runs(self) -> bool:
        return RUNNING.search(self.printed()) is not None

    def when(self, condition: Callable[[], object], *signals: int) -> None:
        """Sends the signals as soon as the condition holds; fails where the process ends before it does."""
        while self.process.is_alive():
            if condition():
                for number in signals:
                    os.kill(self.process.pid, number)
                return
            self.process.join(0.001)
        pytest.fail(f"training ended too early:\n{self.printed()[-2000:]}")

    def end(self) -> tuple[int, str]:
        """Waits; returns the exit status, negative for a signal, and what was printed. No traceback is allowed."""
        self.process.join()
        assert "Traceback" not in self.printed(), self.printed()[-3000:]
        return self.process.exitcode, self.printed()


@pytest.fixture(scope="module")
def start(data_dir, tiny_model, tmp_path_factory):
    """Starts training: `start(output_dir, *options, data_dir=…)`."""
    logs, started = tmp_path_factory.mktemp("logs"), []

    def start(output_dir: Path, *options: object, memory: int | None = None, data_dir: Path = data_dir) -> Training:
        words = training_command(data_dir, tiny_model, output_dir, *options)
        started.append(Training(logs / f"{len(started)}.log", words, memory))
        return started[-1]

    yield start
    for training in started:
        training.process.kill()


# Kills and signals.


def test_stopped_once_and_killed_five_times_it_ends_with_the_same_bits(start, trained, tmp_path):
    """Kills at seeded moments: before a step is saved, at any file of an unfinished checkpoint, right after it."""
    rng = random.Random(42)
    options = ("--add_progress", "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, *RESUME)
    stopped = start(tmp_path, *options)
    stopped.when(stopped.runs, signal.SIGUSR1)  # Slurm's, before a time limit
    status, printed = stopped.end()
    assert status == 128 + signal.SIGUSR1
    step = checkpoint_steps(tmp_path)[-1]
    assert last_line(printed) == (
        f"interrupted after step {step}: go on from {tmp_path}/checkpoint-{step} with RESUME=latest"
        " (--resume_from_checkpoint latest)"
    )
    killed_while_saving = 0
    for kill in range(5):
        step = checkpoint_steps(tmp_path)[-1] + 1
        folder, num_files = tmp_path / f".checkpoint-{step}.partial", rng.randint(0, 6)
        moments = {
            "begun": lambda: folder.is_dir() and len(list(folder.iterdir())) >= num_files,
            "saved": lambda: (tmp_path / f"checkpoint-{step}").is_dir(),
        }
        training = start(tmp_path, *options)
        # A folder that was renamed between two looks counts as well.
        training.when(lambda: moments["begun" if kill % 5 else "saved"]() or moments["saved"](), signal.SIGKILL)
        assert training.end()[0] == -signal.SIGKILL
        killed_while_saving += bool(list(tmp_path.glob(".*.partial")))
        if checkpoint_steps(tmp_path)[-1] >= STEPS - 1:
            break
    assert killed_while_saving >= 2
    status, printed = start(tmp_path, *options).end()
    assert status == 0 and "resuming from" in printed
    assert unet_file(tmp_path).read_bytes() == unet_file(trained).read_bytes()
    assert not list(tmp_path.glob(".*.partial"))
    logged = read_events(tmp_path / "logs" / PROJECT_NAME).Scalars("train/loss")
    assert [event.step for event in logged] == list(range(1, STEPS + 1))  # no step twice


def test_a_signal_before_the_first_step_gets_one_line(start, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    training = start(tmp_path / "output", data_dir=data_dir)
    training.when(lambda: (data_dir / "encoded_cache").is_dir(), signal.SIGTERM)
    status, printed = training.end()
    assert status == 128 + signal.SIGTERM and last_line(printed) == "interrupted: run the same command again"
    assert not list((data_dir / "encoded_cache").glob(".*.partial"))


def interrupt(command: list[object], number: int, log: Path, **variables: object) -> int:
    """Runs a command until its progress bar has moved, sends the signal to its group, and returns the exit status.

    Returns when all processes that the command has started are gone.
    """
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=PROJECT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=hear_ctrl_c,
        )
    try:
        while not RUNNING.search(log.read_text()):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-3000:])
        os.killpg(process.pid, number)
        status = process.wait()
        with contextlib.suppress(ProcessLookupError):  # as soon as the whole group is gone
            while True:
                os.killpg(process.pid, 0)
        return status
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        pytest.param(signal.SIGHUP, 1, id="closed terminal"),
        pytest.param(signal.SIGINT, 2, id="Ctrl-C, two processes"),
    ],
)
def test_an_interrupted_script_saves_a_checkpoint(number, processes, data_dir, tiny_model, tmp_path):
    output_dir, log = tmp_path / "output", tmp_path / "log"
    variables = {"DATA_DIR": data_dir, "PRETRAINED_MODEL": tiny_model, "OUTPUT_DIR": output_dir, "RESOLUTION": SIDE}
    variables |= {"MAX_TRAIN_STEPS": 5000, "NUM_VALIDATION_IMAGES": 0, "NUM_PROCESSES": processes, "BATCH_SIZE": 1}
    status = interrupt(["bash", "train_instruct_pix2pix.sh"], number, log, **variables)
    [step] = checkpoint_steps(output_dir)
    expected = f"interrupted after step {step}: go on from {output_dir}/checkpoint-{step} with RESUME=latest"
    assert expected in log.read_text() and expected in (output_dir / "train.log").read_text()
    if processes == 1:  # torch's launcher has its own status and report
        assert status == 128 + number and "Traceback" not in log.read_text()
        assert last_line(log.read_text()).startswith(expected)


def test_two_trainings_into_one_folder_are_refused(start, tmp_path):
    first = start(tmp_path, *ENDLESS)
    first.when(first.runs)
    status, printed = start(tmp_path, *RESUME).end()
    assert status == 1 and f"error: another training is running in {tmp_path}" in last_line(printed)
    first.when(lambda: True, signal.SIGINT)
    assert first.end()[0] == 128 + signal.SIGINT


# Disks.


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a tmpfs of a given size: `small_disk("6m")`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str, *options: str) -> Path:
        settings = ",".join([*options, f"size={size}"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", settings, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_full_disk_while_saving_a_checkpoint(start, trained, small_disk):
    disk = small_disk("6m")  # two checkpoints of 2.6 MB, not three
    options = ("--add_progress", "--checkpoints_total_limit", STEPS, "--checkpointing_steps")
    status, printed = start(disk / "run", *options, 1).end()
    assert status == 1
    line = last_line(printed)
    assert re.search(r"error: \S+/checkpoint-3 cannot be saved: .* MB are free there", line)
    assert "go on from checkpoint-2 with RESUME=latest" in line
    assert checkpoint_steps(disk / "run") == [1, 2] and not list((disk / "run").glob(".*.partial"))
    small_disk("30m", "remount")
    status, printed = start(disk / "run", *options, 100, *RESUME).end()
    assert status == 0 and f"resuming from {disk}/run/checkpoint-2" in printed
    assert unet_file(disk / "run").read_bytes() == unet_file(trained).read_bytes()


def test_a_last_checkpoint_that_finds_no_space_costs_nothing(start, small_disk):
    disk = small_disk("3m")  # the pipeline, and no checkpoint of 2.6 MB beside it
    status, printed = start(disk / "run", "--max_train_steps", 1).end()
    assert status == 0 and (disk / "run" / "model_index.json").is_file() and not checkpoint_steps(disk / "run")
    assert f"warning: the trained pipeline is saved, but {disk}/run/checkpoint-1 cannot be saved: " in printed
    assert f"MODEL_DIR={disk}/run bash sample_from_pix2pix.sh" in printed


def test_full_disk_while_saving_the_pipeline_or_the_encoded_data(start, small_disk, tmp_path):
    disk = small_disk("600k")
    status, printed = start(disk / "run", "--max_train_steps", 1).end()
    assert status == 1 and f"error: the pipeline in {disk}/run cannot be saved: " in last_line(printed)
    assert not list((disk / "run").glob(".*.partial")) and not (disk / "run" / "model_index.json").exists()

    shutil.rmtree(disk / "run")
    data_dir = make_data_dir(disk / "data")
    with pytest.raises(OSError, match="No space"), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    status, printed = start(tmp_path / "output", data_dir=data_dir).end()
    assert status == 1
    assert last_line(printed).startswith("error: ") and "No space left on device" in last_line(printed)


def test_a_data_directory_that_cannot_be_written_to(start, small_disk, tmp_path):
    disk = small_disk("10m")
    data_dir = make_data_dir(disk / "data")
    small_disk("10m", "remount", "ro")
    status, printed = start(tmp_path / "output", "--max_train_steps", 1, data_dir=data_dir).end()
    assert status == 0, printed
    assert list((tmp_path / "output" / "encoded_cache").glob("*.npy"))


# Damaged files, too little memory.


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_checkpoint_that_cannot_be_loaded_is_named_with_what_to_delete(file, start, trained, tmp_path):
    damaged = shutil.copytree(trained / "checkpoint-6", tmp_path / "checkpoint-6")
    os.truncate(damaged / file, 1000)
    status, printed = start(tmp_path, "--add_progress", *RESUME).end()
    assert status == 1
    assert last_line(printed).startswith(f"error: {damaged} cannot be loaded (")
    assert last_line(printed).endswith(f"delete it to go on from the one before: rm -r {damaged}")


def test_damaged_frames_are_named_before_the_first_step(start, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    frame = frame_path(frames_dir(data_dir, SIDE), "train0", 20)
    for damage in (frame.read_bytes()[:60], b""):
        frame.write_bytes(damage)
        status, printed = start(tmp_path / "output", data_dir=data_dir).end()
        assert status == 1 and "training on" not in printed
        assert last_line(printed).startswith("error: ") and str(frame) in last_line(printed)


def test_out_of_memory_says_which_variables_to_lower(start, tmp_path):
    options = ("--train_batch_size", 5_000, "--max_train_steps", 1)
    status, printed = start(tmp_path, *options, memory=400 * 2**20).end()
    assert status == 1
    line = last_line(printed)
    assert line.startswith("error: out of memory: lower BATCH_SIZE and raise GRADIENT_ACCUM") and "RESOLUTION" in line
    assert 'EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"' in line


# Numbers that are not finite.


def test_weights_and_losses_that_are_not_finite_stop_the_run(data_dir, tiny_model, tmp_path):
    """The warm-up leaves the first step harmless; the second one's loss is finite, its weights are not."""
    options = ("--learning_rate", 1e38, "--lr_warmup_steps", 1, "--report_to", "none", "--checkpointing_steps", 1)
    done = train(data_dir, tiny_model, tmp_path, *options, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line(done.stderr).startswith("error: after step 2 the weights are not finite")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "model_index.json").exists() and not (tmp_path / "logs").exists()
    options = ("--learning_rate", 1e38, "--checkpointing_steps", 100)
    done = train(data_dir, tiny_model, tmp_path / "other", *options, check=False)
    assert last_line(done.stderr).startswith("error: the loss of step 2 is nan")


def add_scaler() -> None:
    """Gives the Accelerator what it has in fp16, which it refuses on a CPU; its scale never gets low enough."""
    prepare = Accelerator.prepare

    def prepare_with_scaler(accelerator: Accelerator, *objects: object) -> object:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
        return prepare(accelerator, *objects)

    Accelerator.prepare = prepare_with_scaler


@pytest.mark.parametrize("steps, said", [(8, "all steps had"), (24, "the 20 steps up to 20 had")])
def test_a_run_whose_every_step_is_skipped_says_so_and_saves_no_pipeline(steps, said, data_dir, tiny_model, tmp_path):
    """Losses of 1e14 are finite, but not at the scale."""
    model, output_dir = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "output"
    weights = load_file(unet_file(model))
    weights["conv_out.weight"] *= 1e8
    save_file(weights, unet_file(model), {"format": "pt"})
    options = ("--max_train_steps", steps, "--checkpointing_steps", 500)
    done = train(data_dir, model, output_dir, *options, before=add_scaler, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last_line(done.stderr).startswith(f"error: {said} non-finite gradients in fp16")
    assert not (output_dir / "model_index.json").exists()
    scales = scalars(output_dir / "logs", "train/grad_scale")
    assert scales[8] == 2.0 ** (126 - 8)  # each skipped step halves it


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharing_of_weights_is_refused_in_one_line(kind, data_dir, tiny_model, tmp_path):
    """As `accelerate launch` asks for it; on a CPU accelerate itself would leave FSDP out in silence."""
    done = train(data_dir, tiny_model, tmp_path, check=False, **{f"ACCELERATE_USE_{kind}": "true"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(f"error: .*{kind} is not supported", last_line(done.stderr)), done.stderr
