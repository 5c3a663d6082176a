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

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file

from data.cli import UserError
from data.paths import frame_path, frames_dir
from pecn.checkpoints import checkpoint_steps, find_checkpoint, find_damage
from tests.conftest import PROJECT, SIDE, fork_script, hear_ctrl_c, make_data_dir, run

STEPS = 30
RUNNING = re.compile(rf"[1-9]\d*/{STEPS}|[1-9]\d*/5000")  # the progress bar after at least one step


# Training processes. A start costs seconds of imports, so that most are forked from a process that has made them.


class Training:
    """A running training process, forked."""

    def __init__(self, log: Path, arguments: list[str], memory: int | None = None) -> None:
        self.log = log
        self.process = fork_script(["train_instruct_pix2pix.py", *arguments], log, log, memory)

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

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
    logs = tmp_path_factory.mktemp("logs")
    started: list[Training] = []

    def start(output_dir: Path, *options: object, memory: int | None = None, **where: Path) -> Training:
        arguments = command_line(where.get("data_dir", data_dir), tiny_model, output_dir, *options)
        started.append(Training(logs / f"{len(started)}.log", arguments, memory))
        return started[-1]

    yield start
    for training in started:
        training.process.kill()


def command_line(data_dir: Path, model: Path, output_dir: Path, *options: object) -> list[str]:
    words = ["--train_data_dir", data_dir, "--output_dir", output_dir, "--pretrained_model_name_or_path", model]
    words += ["--resolution", SIDE, "--train_batch_size", 4, "--learning_rate", 1e-3, "--num_validation_images", 0]
    # By themselves checkpoints of so small a model come every few seconds.
    words += ["--max_train_steps", STEPS, "--checkpointing_steps", 500]
    words += ["--checkpoints_total_limit", STEPS]
    return [str(word) for word in [*words, *options]]


RESUME = ("--resume_from_checkpoint", "latest")


def last_line(printed: str) -> str:
    return printed.replace("\r", "\n").strip().splitlines()[-1]


def trained_weights(output_dir: Path) -> bytes:
    return (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def unfinished(output_dir: Path) -> list[Path]:
    return list(output_dir.glob(".*"))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A run of STEPS steps with two checkpoints, at steps 10 and 20."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    status, printed = start(output_dir, "--checkpointing_steps", 10).end()
    assert status == 0, printed
    return output_dir


# Kills and signals


def test_stopped_once_and_killed_ten_times_it_ends_with_the_same_bits(start, undisturbed, tmp_path):
    """Kills at seeded moments: before a step is saved, at any file of an unfinished checkpoint, right after it."""
    rng = random.Random(42)
    options = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, *RESUME)
    stopped = start(tmp_path, *options)
    stopped.when(lambda: RUNNING.search(stopped.printed()), signal.SIGTERM)
    status, printed = stopped.end()
    assert status == 128 + signal.SIGTERM
    step = checkpoint_steps(tmp_path)[-1]
    assert last_line(printed) == (
        f"interrupted after step {step}: go on from {tmp_path}/checkpoint-{step} with RESUME=latest"
        " (--resume_from_checkpoint latest)"
    )

    killed_while_saving = 0
    for _ in range(10):
        step = (checkpoint_steps(tmp_path) or [0])[-1] + rng.choice([1, 1, 2])
        folder, num_files = tmp_path / f".checkpoint-{step}.partial", rng.randint(0, 6)
        moments = {
            "begun": lambda: folder.is_dir() and len(list(folder.iterdir())) >= num_files,
            "saved": lambda: (tmp_path / f"checkpoint-{step}").is_dir(),
        }
        moment = rng.choice(["begun", "begun", "saved"])
        training = start(tmp_path, *options)
        # A folder that was renamed between two looks counts as well.
        training.when(lambda: moments[moment]() or moments["saved"](), signal.SIGKILL)
        assert training.end()[0] == -signal.SIGKILL
        killed_while_saving += bool(unfinished(tmp_path))
    assert killed_while_saving >= 3

    status, printed = start(tmp_path, *options).end()
    assert status == 0 and "resuming from" in printed
    assert trained_weights(tmp_path) == trained_weights(undisturbed)
    assert not unfinished(tmp_path)


def test_second_ctrl_c_ends_at_once_and_half_a_checkpoint_never_counts(start, tmp_path):
    options = ("--checkpointing_steps", 5000, "--max_train_steps", 5000)
    training = start(tmp_path, *options)
    training.when(lambda: RUNNING.search(training.printed()), signal.SIGINT)
    training.when(lambda: unfinished(tmp_path), signal.SIGSTOP)  # it holds still in the middle of saving
    training.when(lambda: True, signal.SIGINT, signal.SIGCONT)
    status, printed = training.end()
    assert status == 128 + signal.SIGINT
    assert "stopped without saving" in printed
    assert not checkpoint_steps(tmp_path)
    resumed = start(tmp_path, *options, *RESUME)
    resumed.when(lambda: RUNNING.search(resumed.printed()), signal.SIGINT)
    assert resumed.end()[0] == 128 + signal.SIGINT
    assert "no checkpoint in" in resumed.printed()
    assert not unfinished(tmp_path)


def test_a_signal_before_the_first_step_gets_one_line(start, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    training = start(tmp_path / "output", data_dir=data_dir)
    training.when(lambda: (data_dir / "encoded_cache").is_dir(), signal.SIGTERM)
    status, printed = training.end()
    assert status == 128 + signal.SIGTERM
    assert last_line(printed) == "interrupted: run the same command again"
    assert not list((data_dir / "encoded_cache").glob("tmp*"))


def interrupt(command: list[object], number: int, log: Path, whole_group: bool, **variables: object) -> int:
    """Runs a command until its progress bar has moved, sends the signal, and returns the exit status.

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
        (os.killpg if whole_group else os.kill)(process.pid, number)
        status = process.wait()
        with contextlib.suppress(ProcessLookupError):  # as soon as the whole group is gone
            while True:
                os.killpg(process.pid, 0)
        return status
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def launch_by_hand(data_dir: Path, model: Path, output_dir: Path) -> list[object]:
    command = ["accelerate", "launch", "--quiet", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train_instruct_pix2pix.py"]
    return command + command_line(data_dir, model, output_dir, "--max_train_steps", 5000)


@pytest.mark.parametrize(
    ("number", "whole_group", "processes"),
    [
        pytest.param(signal.SIGINT, True, 1, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, False, 1, id="SIGTERM"),
        pytest.param(signal.SIGTERM, True, 1, id="SIGTERM to the data loader's process, too"),
        pytest.param(signal.SIGHUP, True, 1, id="closed terminal"),
        pytest.param(signal.SIGINT, True, 2, id="Ctrl-C, two processes"),
        pytest.param(signal.SIGTERM, False, 2, id="SIGTERM, two processes"),
        pytest.param(signal.SIGINT, True, 0, id="Ctrl-C, launched by hand"),
        pytest.param(signal.SIGTERM, False, 0, id="SIGTERM, launched by hand"),
    ],
)
def test_interrupted_training_saves_a_checkpoint(number, whole_group, processes, data_dir, tiny_model, tmp_path):
    output_dir, log = tmp_path / "output", tmp_path / "log"
    variables = {"DATA_DIR": data_dir, "PRETRAINED_MODEL": tiny_model, "OUTPUT_DIR": output_dir, "RESOLUTION": SIDE}
    variables |= {"MAX_TRAIN_STEPS": 5000, "NUM_VALIDATION_IMAGES": 0, "NUM_PROCESSES": processes, "BATCH_SIZE": 1}
    if processes == 1:
        variables["EXTRA_ARGS"] = "--dataloader_num_workers 1"
    command = ["bash", "train_instruct_pix2pix.sh"] if processes else launch_by_hand(data_dir, tiny_model, output_dir)
    status = interrupt(command, number, log, whole_group, **variables)
    *_, step = checkpoint_steps(output_dir)
    assert find_damage(output_dir / f"checkpoint-{step}") is None
    expected = f"interrupted after step {step}: go on from {output_dir}/checkpoint-{step} with RESUME=latest"
    assert expected in log.read_text()
    if processes:
        assert expected in (output_dir / "train.log").read_text()
    if processes == 1:  # the launchers have their own statuses and reports
        assert status == 128 + number and "Traceback" not in log.read_text()
        assert last_line(log.read_text()).startswith(expected)


def test_a_mistake_with_two_processes_shows_our_line(data_dir, tmp_path):
    variables = {"DATA_DIR": data_dir, "RESOLUTION": 64, "OUTPUT_DIR": tmp_path, "NUM_PROCESSES": 2}
    done = run("bash", "train_instruct_pix2pix.sh", check=False, **variables)
    assert done.returncode == 1
    # The launcher ends the other one as soon as one has failed, at times before it has said anything.
    assert re.search("^error(: | on process 1: ).*python -m data.video_loader", done.stdout, re.MULTILINE)


def test_two_trainings_into_one_folder_are_refused(start, tmp_path):
    first = start(tmp_path, "--max_train_steps", 5000)
    first.when(lambda: RUNNING.search(first.printed()))
    status, printed = start(tmp_path, "--resume_from_checkpoint", "latest").end()
    assert status == 1 and f"error: another training is running in {tmp_path}" in last_line(printed)
    first.when(lambda: True, signal.SIGINT)
    assert first.end()[0] == 128 + signal.SIGINT


def test_a_finished_pipeline_is_never_overwritten(start, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    for options in ((), RESUME):
        status, printed = start(tmp_path / "model", *options).end()
        assert status == 1 and "holds a model, which training would overwrite" in last_line(printed)


def test_a_data_directory_that_cannot_be_written_to(start, small_disk, tmp_path):
    disk = small_disk("10m")
    data_dir = make_data_dir(disk / "data")
    small_disk("10m", "remount", "ro")
    status, printed = start(tmp_path / "output", "--max_train_steps", 1, data_dir=data_dir).end()
    assert status == 0
    assert f"{data_dir} cannot be written to: what is encoded is kept in {tmp_path}/output/encoded_cache" in printed


# A full disk


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


def test_full_disk_while_saving_a_checkpoint(start, undisturbed, small_disk):
    disk = small_disk("6m")  # two checkpoints of 2.6 MB, not three
    status, printed = start(disk / "run", "--checkpointing_steps", 1).end()
    assert status == 1
    line = last_line(printed)
    assert re.search(r"error: \S+/checkpoint-3 cannot be saved: .* MB are free there", line)
    assert "go on from checkpoint-2 with RESUME=latest" in line
    assert checkpoint_steps(disk / "run") == [1, 2] and not unfinished(disk / "run")
    small_disk("30m", "remount")
    status, printed = start(disk / "run", "--checkpointing_steps", 100, *RESUME).end()
    assert status == 0 and f"resuming from {disk}/run/checkpoint-2" in printed
    assert trained_weights(disk / "run") == trained_weights(undisturbed)


def test_full_disk_while_saving_the_pipeline_or_the_encoded_data(start, small_disk, tmp_path):
    disk = small_disk("600k")
    status, printed = start(disk / "run", "--max_train_steps", 1).end()
    assert status == 1
    assert f"error: the pipeline in {disk}/run cannot be saved: " in last_line(printed)
    assert not unfinished(disk / "run") and not (disk / "run" / "model_index.json").exists()

    shutil.rmtree(disk / "run")
    data_dir = make_data_dir(disk / "data")
    with pytest.raises(OSError, match="No space"), open(disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    status, printed = start(tmp_path / "output", data_dir=data_dir).end()
    assert status == 1
    assert last_line(printed).startswith("error: ") and "No space left on device" in last_line(printed)


# Damaged checkpoints and frames

DAMAGE: dict[str, Callable[[Path], object]] = {
    "lacks model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "the content of optimizer.bin has changed": lambda folder: os.truncate(folder / "optimizer.bin", 100_000),
    "the content of random_states_0.pkl has changed": lambda folder: os.truncate(folder / "random_states_0.pkl", 0),
    "the content of model.safetensors has changed": lambda folder: flip_bit(folder / "model.safetensors"),
    "the content of training_config.json has changed": lambda folder: flip_bit(folder / "training_config.json"),
    "lacks manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "cannot be read: ": lambda folder: os.truncate(folder / "manifest.json", 40),
}


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("described", DAMAGE)
def test_damaged_checkpoint_is_named_and_passed_over(described, undisturbed, tmp_path, capsys):
    for step in (10, 20):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-20"
    DAMAGE[described](tmp_path / "checkpoint-20")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/checkpoint-20 ") and described in line
    with pytest.raises(UserError, match="checkpoint-20 .*; RESUME=latest"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"))
    DAMAGE[described](tmp_path / "checkpoint-10")
    with pytest.raises(UserError, match="no checkpoint in .* is complete"):
        find_checkpoint(tmp_path, "latest")


def test_run_goes_on_from_the_newest_whole_checkpoint_and_keeps_what_it_saves(start, undisturbed, tmp_path):
    """The damaged checkpoint is the newest by its number, which must not cost those that come before it."""
    for step in (10, 20):
        shutil.copytree(undisturbed / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip_bit(tmp_path / "checkpoint-20" / "optimizer.bin")
    options = ("--checkpointing_steps", 100, "--checkpoints_total_limit", 1, *RESUME)
    training = start(tmp_path, *options, "--max_train_steps", 5000)
    training.when(lambda: step_of(training) > 10, signal.SIGINT)
    status, printed = training.end()
    assert status == 128 + signal.SIGINT
    assert "checkpoint-20 is damaged: the content of optimizer.bin has changed; it is passed over" in printed
    assert f"resuming from {tmp_path}/checkpoint-10" in printed
    assert f"go on from {find_checkpoint(tmp_path, 'latest')} with RESUME=latest" in printed


def step_of(training: Training) -> int:
    steps = re.findall(r"(\d+)/5000", training.printed())
    return int(steps[-1]) if steps else 0


def test_damaged_frames_are_named_before_the_first_step(start, tmp_path):
    data_dir = make_data_dir(tmp_path / "data")
    folder = frames_dir(data_dir, SIDE)

    def refusal() -> str:
        status, printed = start(tmp_path / "output", "--num_validation_images", 3, data_dir=data_dir).end()
        assert status == 1 and "training on" not in printed
        return last_line(printed)

    os.truncate(frame_path(folder, "val1", 21), 60)  # a validation frame, which training itself would not read
    line = refusal()
    assert f"{frame_path(folder, 'val1', 21)} is not a whole PNG file (" in line
    assert f"; delete and extract again: rm -r {folder / 'val1'} && " in line
    assert line.endswith(f"python -m data.video_loader --data_dir {data_dir} --resolutions {SIDE}")
    frame_path(folder, "train0", 20).write_bytes(b"GIF89a" * 20)
    assert f"{frame_path(folder, 'train0', 20)} is not a whole PNG file (" in refusal()
    cv2.imwrite(str(frame_path(folder, "train0", 20)), np.zeros((SIDE, 2 * SIDE, 3), np.uint8))
    assert f"is {2 * SIDE}x{SIDE} pixels, not {SIDE}x{SIDE}" in refusal()


# Other settings, too little memory


def test_resuming_with_other_settings_lists_the_differences(start, undisturbed, data_dir, tmp_path):
    shutil.copytree(undisturbed / "checkpoint-10", tmp_path / "checkpoint-10")
    others = make_data_dir(tmp_path / "data")
    make_data_dir(others, side=2 * SIDE)
    path = frame_path(frames_dir(others, SIDE), "train0", 21)
    cv2.imwrite(str(path), np.zeros((SIDE, SIDE, 3), np.uint8))
    for options, where, expected in (
        (("--train_batch_size", 2, "--seed", 7), data_dir, ["seed was 42, is 7", "global_batch_size was 4, is 2"]),
        (("--resolution", 2 * SIDE), others, [f"resolution was {SIDE}, is {2 * SIDE}", "frames_and_prompts was "]),
        ((), others, ["hash_of_model_frames_and_prompts was "]),
    ):
        status, printed = start(tmp_path, *options, *RESUME, data_dir=where).end()
        assert status == 1
        assert all(difference in last_line(printed) for difference in expected), last_line(printed)


def test_the_same_global_batch_divided_otherwise_is_the_same_run(start, tmp_path):
    whole = ("--train_batch_size", 1, "--gradient_accumulation_steps", 4)
    halves = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    # An odd number of steps: then the passes that were made are no multiple of the new number of passes in a step.
    first = start(tmp_path / "resumed", *halves, "--max_train_steps", 3, "--checkpointing_steps", 3)
    straight = start(tmp_path / "straight", *whole, "--max_train_steps", 6)
    assert first.end()[0] == straight.end()[0] == 0
    assert start(tmp_path / "resumed", *whole, "--max_train_steps", 6, *RESUME).end()[0] == 0
    weights = [
        load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("straight", "resumed")
    ]
    differences = [(weights[0][name] - weights[1][name]).abs().mean().item() for name in weights[0]]
    assert max(differences) < 1e-4  # the learning rate is 1e-3


def test_out_of_memory_says_which_variables_to_lower(start, tmp_path):
    options = ("--train_batch_size", 5_000, "--max_train_steps", 1)
    status, printed = start(tmp_path, *options, memory=400 * 2**20).end()
    assert status == 1
    line = last_line(printed)
    assert line.startswith("error: out of memory: lower BATCH_SIZE and raise GRADIENT_ACCUM")
    assert "RESOLUTION" in line
    assert 'EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"' in line
