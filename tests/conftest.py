"""Small stand-ins that several test files share: a prepared data directory and a base model of 100,000 parameters."""

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import FileLock

from data.files import write_json
from data.paths import filtered_annotations_path, frame_path, frames_dir

PROJECT = Path(__file__).parents[1]
SHARED = PROJECT.parent / "shared"
SIDE = 32
LABELS = {
    "move_object": "pushing a cup from left to right",
    "drop_object": "dropping a ball onto a table",
    "cover_object": "covering a box with a cloth",
}
STEPS = 8  # of a training run, where the test does not say otherwise
MOST_WORKERS = 8

SCRIPTS = ("train_instruct_pix2pix.py", "sample_from_pix2pix.py")
PRELOADED = ["torch._dynamo", "tensorboard", "pecn.training", "pecn.evaluation"]

# For this process and all that it starts: tests run side by side, and have neither a network nor a GPU.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs the whole suite on all cores, file by file, unless `-n` or file names say otherwise."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # which must not have workers of its own
    if is_worker or config.option.file_or_dir or getattr(config.option, "numprocesses", 0) is not None:
        return
    config.option.numprocesses = min(os.cpu_count() or 1, MOST_WORKERS)
    config.option.dist = "loadfile"


def run(*command: object, check: bool = True, **environment: object) -> subprocess.CompletedProcess:
    """Runs a command in the project's folder as a user would, output as text."""
    variables = {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    if words[0] == "python" and words[1] in SCRIPTS and not variables:
        done = run_forked(words[1:])
    else:
        words = [sys.executable if word == "python" else word for word in words]
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(words, cwd=PROJECT, env=os.environ | variables, text=True, capture_output=True)
    if check and done.returncode:
        pytest.fail(f"{' '.join(words)} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def run_forked(words: list[str], processes: int = 1, **how: object) -> subprocess.CompletedProcess:
    """Runs a script in one process or in several that work together; returns what the first one printed.

    `how` is what `fork_script` takes.
    """
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        several = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
            "WORLD_SIZE": str(processes),
        }
        server.close()
        outputs = [[Path(folder, f"{name}{rank}") for name in ("stdout", "stderr")] for rank in range(processes)]
        started = []
        for rank, (stdout, stderr) in enumerate(outputs):
            own = several | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            started.append(fork_script(words, stdout, stderr, **own, **how))
        for process in started:
            process.join()
        status = max(process.exitcode for process in started)
        return subprocess.CompletedProcess(words, status, *(output.read_text() for output in outputs[0]))


def fork_script(
    words: list[str],
    stdout: Path,
    stderr: Path,
    memory: int | None = None,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> multiprocessing.Process:
    """Starts `python SCRIPT ...` in a process forked from one that has loaded the libraries, which takes seconds.

    It may use so many more bytes of `memory`; `before` is called in it first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=execute_script, args=(words, stdout, stderr, memory, before, environment))
    process.start()
    return process


def execute_script(
    words: list[str],
    stdout: Path,
    stderr: Path,
    memory: int | None,
    before: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    os.environ |= environment
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(PROJECT)
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    if before:
        before()
    sys.argv = words
    try:
        runpy.run_path(str(PROJECT / words[0]), run_name="__main__")
    finally:
        sys.stdout.flush()


def training_command(data_dir: Path, model: object, output_dir: Path, *options: object) -> list[str]:
    """A short training of a small model, without validation; later options replace earlier ones."""
    words = ["train_instruct_pix2pix.py", "--train_data_dir", data_dir, "--output_dir", output_dir]
    words += ["--pretrained_model_name_or_path", model, "--resolution", SIDE, "--max_train_steps", STEPS]
    words += ["--train_batch_size", 4, "--learning_rate", 1e-3, "--checkpointing_steps", 3]
    words += ["--num_validation_images", 0, "--num_inference_steps", 1]
    return [str(word) for word in [*words, *options]]


def train(
    data_dir: Path, model: object, output_dir: Path, *options: object, check: bool = True, **how: object
) -> subprocess.CompletedProcess:
    done = run_forked(training_command(data_dir, model, output_dir, *options), **how)
    if check and done.returncode:
        pytest.fail(f"training exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def sampling_command(data_dir: Path, model: object, output_dir: Path, *options: object) -> list[str]:
    words = ["sample_from_pix2pix.py", "--model_dir", model, "--data_dir", data_dir, "--output_dir", output_dir]
    words += ["--resolution", SIDE, "--num_inference_steps", 2]
    return [str(word) for word in [*words, *options]]


def last_line(printed: str) -> str:
    return printed.replace("\r", "\n").strip().splitlines()[-1]


def unet_file(output_dir: Path) -> Path:
    return output_dir / "unet" / "diffusion_pytorch_model.safetensors"


def hear_ctrl_c() -> None:
    """For `preexec_fn`: tests that run in the background ignore SIGINT or SIGHUP, and so would the command."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def write_frames(data_dir: Path, video_id: str, indices: range, side: int = SIDE, seed: int = 0) -> None:
    """Frames of a bright square that moves over a colored gradient, one pixel a frame."""
    color = np.random.default_rng(seed).integers(60, 200, 3)
    for index in indices:
        frame = np.linspace(0, 1, side)[:, None, None] * color * np.ones((side, side, 1))
        left = index % (side - 8)
        frame[8:16, left : left + 8] = 255
        path = frame_path(frames_dir(data_dir, side), video_id, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), frame.astype(np.uint8))


def entry(video_id: str, task: str, num_frames: int = 40) -> dict:
    return {
        "id": video_id,
        "label": LABELS[task],
        "template": "Pushing [something] from left to right",
        "placeholders": ["a cup"],
        "task": task,
        "num_frames": num_frames,
    }


def make_data_dir(data_dir: Path, side: int = SIDE) -> Path:
    """A prepared data directory: 6 training and 3 validation videos over the three tasks, and a short one of each."""
    for split, count in (("train", 6), ("val", 3)):
        entries = []
        for number in range(count):
            video_id = f"{split}{number}"
            write_frames(data_dir, video_id, range(19, 24), side, seed=number)
            entries.append(entry(video_id, list(LABELS)[number % 3]))
        entries.append(entry(f"{split}_short", "move_object", num_frames=21))
        write_frames(data_dir, f"{split}_short", range(19, 21), side)
        path = filtered_annotations_path(data_dir, split)
        path.parent.mkdir(exist_ok=True)
        write_json(path, entries)
    return data_dir


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once for all workers: `made_once(name, make)`. Read-only by agreement: copy it to change it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / f"shared-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                folder.with_suffix(".done").touch()
        return folder

    return made_once


@pytest.fixture(scope="session")
def data_dir(made_once: Callable) -> Path:
    return made_once("data", make_data_dir)


def make_tiny_pipeline(in_channels: int = 8, prediction_type: str = "epsilon", latent_channels: int = 4):
    """A Stable Diffusion pipeline of 100,000 parameters with random weights, the same ones each time."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from demo.pretraining.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=in_channels,
        out_channels=latent_channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.5,
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
    )
    kind = StableDiffusionInstructPix2PixPipeline if in_channels > latent_channels else StableDiffusionPipeline
    return kind(vae, CLIPTextModel(text_config), tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


@pytest.fixture(scope="session")
def tiny_model(made_once: Callable) -> Path:
    return made_once("tiny_model", lambda folder: make_tiny_pipeline().save_pretrained(folder))


@pytest.fixture(scope="session")
def trained(made_once: Callable, data_dir: Path, tiny_model: Path) -> Path:
    """What an undisturbed training of STEPS steps leaves, with progress prompts and validation; `printed.txt` too."""

    def make(folder: Path) -> None:
        options = ("--add_progress", "--validation_epochs", 2, "--num_validation_images", 3)
        done = train(data_dir, tiny_model, folder, *options, "--checkpoints_total_limit", 2)
        (folder / "printed.txt").write_text(done.stdout)

    return made_once("trained", make)


def read_events(event_file: Path):
    """All that a file of TensorBoard's holds, as its EventAccumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(event_file), size_guidance={"images": 0})  # each picture, not the last few
    events.Reload()
    return events


def scalars(logging_dir: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows under a tag, by step; the last run's value where runs overlap."""
    values = {}
    for event_file in sorted(logging_dir.rglob("events*")):
        if tag.startswith("train/") and event_file.parent.name == "held_out":
            continue
        events = read_events(event_file)
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values
