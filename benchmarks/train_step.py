"""Times an optimizer step: as diffusers' InstructPix2Pix example takes it, and ours, plain and compiled.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --models sd15 --mixed_precision fp16 --batch_sizes 8 --gradient_accumulation_steps 2

The alternatives take turns (A B C A B C …) on one UNet with random weights, each turn with a fresh optimizer and a
first step that does not count. Before the first turn all of them compute loss and gradient norm for the same pictures,
prompts, noise and timesteps, which must agree. They run on a GPU where there is one. On a CPU ours keeps freed memory,
as its shell script sets it, which helps any training: diffusers' step is timed with and without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import resource
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from data.cli import CommandParser, UserError, number, run_command

NUM_PAIRS = 16  # pictures and prompts that the steps draw from
SEED = 42
CHECKED_BATCHES = 2
PREPARED_BATCHES = 20
CHECKED_LOSS_SCALE = 1024  # so that gradients neither vanish nor overflow in fp16; a power of 2, so exact
TOLERANCE = {"no": 1e-3, "fp16": 2e-2, "bf16": 5e-2}  # relative, of losses and gradient norms
PARTS = ("encoding", "forward", "backward", "clip", "optimizer", "other")
# Each alternative with its row's name, and what it changes of the one before it.
ALTERNATIVES = {
    "plain": ("plain", "diffusers' example"),
    "plain_memory_kept": ("plain, memory kept", "keeping freed memory"),
    "ours": ("ours", "encoding once, fused AdamW, clipping inside it"),
    "compiled": ("compiled", "torch.compile"),
}
# What the experiment takes: 3,000 samples, 20 epochs; and how long it may take on an H100.
EXPERIMENT_SAMPLES, TARGET_MINUTES = 60_000, 3
BATCH_SIZES = {"cpu": {"demo": (4, 16), "sd15": (1, 2)}, "cuda": {"demo": (16, 64), "sd15": (8, 16)}}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}  # a GPU also has its allocator and the scale of fp16's loss to find
STEPS = {"cpu": {"demo": 5, "sd15": 2}, "cuda": {"demo": 20, "sd15": 20}}
QUICK = {"models": ["demo"], "alternatives": ["plain", "plain_memory_kept", "ours"], "steps": 2, "rounds": 1}
QUICK_BATCH_SIZES = [4]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--models", nargs="+", choices=list(STEPS["cpu"]), default=["demo", "sd15"], help="(%(default)s)")
    add(
        "--alternatives",
        nargs="+",
        choices=list(ALTERNATIVES),
        default=list(ALTERNATIVES),
        help="plain_memory_kept is left out on a GPU (%(default)s)",
    )
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
    add("--batch_sizes", type=count, nargs="+", help="samples a pass (chosen for model and device)")
    add("--gradient_accumulation_steps", type=count, default=1, help="passes per optimizer step (%(default)s)")
    add("--mixed_precision", choices=list(TOLERANCE), help="(fp16 on a GPU, else no)")
    add("--gradient_checkpointing", action="store_true", help="for all alternatives")
    add("--use_8bit_adam", action="store_true", help="ours with AdamW of bitsandbytes; plain keeps torch's")
    add("--allow_tf32", action="store_true", help="for all alternatives")
    add("--steps", type=count, help="optimizer steps timed in a turn (chosen for model and device)")
    add("--rounds", type=count, default=3, help="turns of each alternative (%(default)s)")
    add("--quick", action="store_true", help="under a minute: the demo's model, batch 4, 2 steps, nothing compiled")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK, batch_sizes=args.batch_sizes or QUICK_BATCH_SIZES)
    if args.use_8bit_adam and not find_spec("bitsandbytes"):
        parser.error("the package bitsandbytes is missing: pip install bitsandbytes, or leave --use_8bit_adam out")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import cv2
import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from tqdm import tqdm

from benchmarks.freed_memory import keep_freed_memory
from benchmarks.models import build_model
from benchmarks.training_steps import OurStep, PlainStep, Timed
from data.clips import DEFAULT_CHOICE, Clip, verify_frames
from pecn.encoded_frames import EncodedClips, TrainingBatches, encode_once
from pecn.optimization import compile_unet


def write_clips(folder: Path, resolution: int) -> list[Clip]:
    """Clips of two frames of random colors, as PNG files."""
    random = np.random.default_rng(0)
    clips = []
    for index in range(NUM_PAIRS):
        clip = Clip(str(index), "move_object", f"Moving object {index} up", 40, folder / str(index), (20, 21))
        clip.folder.mkdir()
        for path in clip.paths:
            colors = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(path), cv2.resize(colors, (resolution, resolution), interpolation=cv2.INTER_LINEAR))
        clips.append(clip)
    return clips


# Measuring.


class Stopwatch:
    """Seconds spent in the parts of a step. On a GPU it waits for the work of each part, which slows the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.device)
            self.seconds[part] += time.perf_counter() - started
            return result

        return wrapper

    @contextlib.contextmanager
    def watching(self, functions: Sequence[Timed]) -> Iterator[None]:
        """Times the calls of `owner.name` as `part`, for each (owner, name, part), within the block."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak anew. On the CPU Linux forgets the process's peak when 5 is written there (man 5 proc)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux: the peak is that of all turns so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GB since the last reset: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass
class Measured:
    """One alternative's turns: seconds a step (by the clock; of processors), of each part, and peak memory in GB."""

    all_seconds: list[float] = field(default_factory=list)
    all_cpu_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    memory: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(self.all_seconds)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.all_cpu_seconds)

    def median_part(self, part: str) -> float:
        return statistics.median(parts.get(part, 0.0) for parts in self.parts)


def seconds_per_step(step: Callable[[], None], num_steps: int, device: torch.device) -> tuple[float, float]:
    """By the clock, and of all processors together, which other programs on the machine hardly change."""
    synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / num_steps, (time.process_time() - cpu_started) / num_steps


@dataclass
class Alternatives:
    """One model with a batch size, and all alternatives' ways to take a step with it."""

    accelerator: Accelerator
    models: dict[str, torch.nn.Module]
    steps: dict[str, PlainStep | OurStep]
    checked_steps: dict[str, PlainStep | OurStep]  # the same without accumulation

    def take_turn(self, name: str, num_steps: int, measured: Measured) -> None:
        """Times `num_steps` steps after those that do not count, with an optimizer of its own."""
        step, device = self.steps[name], self.accelerator.device
        if device.type == "cpu":
            keep_freed_memory(name != "plain")
        reset_peak_memory(device)
        functions = step.start(self.models[name])
        for _ in range(WARM_UP_STEPS[device.type]):
            step.take()
        stopwatch, totals = Stopwatch(device), []
        if device.type == "cuda":  # the stopwatch waits for the GPU at each part, so the total is timed without it
            totals.append(seconds_per_step(step.take, num_steps, device))
        with stopwatch.watching(functions):
            totals.append(seconds_per_step(step.take, num_steps, device))
        measured.all_seconds.append(totals[0][0])
        measured.all_cpu_seconds.append(totals[0][1])
        parts = {part: seconds / num_steps for part, seconds in stopwatch.seconds.items()}
        measured.parts.append(parts | {"other": totals[-1][0] - sum(parts.values())})
        measured.memory = max(measured.memory, peak_memory(device))
        step.stop()
        self.accelerator.free_memory()

    def losses_and_norms(self, name: str) -> list[tuple[float, float]]:
        """Loss and gradient norm of the first batches, with the weights as they are; the same for every alternative."""
        step, model, found = self.checked_steps[name], self.models[name], []
        step.start(model)
        for index in range(CHECKED_BATCHES):
            loss = step.loss(index)
            (loss * CHECKED_LOSS_SCALE).backward()
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            found.append((loss.item(), norm.item() / CHECKED_LOSS_SCALE))
            model.zero_grad(set_to_none=True)
        step.stop()
        self.accelerator.free_memory()
        return found


def check_agreement(found: dict[str, list[tuple[float, float]]], mixed_precision: str) -> str:
    """A line that says how well losses and gradient norms agree. Raises UserError where they do not."""
    values = np.array(list(found.values()))  # alternative, batch, loss or norm
    differences = np.abs(values / values[0] - 1).max(axis=(0, 1))
    numbers = ", ".join(f"{loss:.5f}" for loss, _ in values[0])
    line = f"losses ({numbers}) differ by {differences[0]:.1e}, gradient norms by {differences[1]:.1e}, relatively"
    if not differences.max() <= TOLERANCE[mixed_precision]:  # so that nan does not pass
        raise UserError(f"the alternatives do different work: {line}")
    return f"the same work: {line}"


# The tables.


def format_table(results: dict[str, Measured], samples_per_step: int) -> str:
    """A row for each alternative, ratios to the first one, and below what each of them gives over the one before."""
    first = next(iter(results.values()))
    parts = "".join(f"{part:>11}" for part in PARTS)
    lines = [f"{'':20}{'samples/s':>10}{'ratio':>7}{'CPU s/step':>12}{'ratio':>7}{'s/step':>9} ={parts}{'GB':>8}"]
    for name, measured in results.items():
        parts = "".join(f"{measured.median_part(part):>11.4f}" for part in PARTS)
        lines.append(
            f"{ALTERNATIVES[name][0]:20}{samples_per_step / measured.seconds:>10.2f}"
            f"{first.seconds / measured.seconds:>7.2f}{measured.cpu_seconds:>12.4f}"
            f"{first.cpu_seconds / measured.cpu_seconds:>7.2f}{measured.seconds:>9.4f}  {parts}{measured.memory:>8.2f}"
        )
    names = list(results)
    if len(names) > 1:
        lines.append("the share of each cause: times as fast as the row above (by processor time)")
    for before, name in zip(names, names[1:]):
        skipped = list(ALTERNATIVES)[list(ALTERNATIVES).index(before) + 1 : list(ALTERNATIVES).index(name) + 1]
        causes = "; ".join(ALTERNATIVES[alternative][1] for alternative in skipped)
        ratio = results[before].seconds / results[name].seconds
        cpu_ratio = results[before].cpu_seconds / results[name].cpu_seconds
        lines.append(f"  {ratio:.2f} ({cpu_ratio:.2f})  {ALTERNATIVES[name][0]}: {causes}")
    return "\n".join(lines)


def describe_experiment(results: dict[str, Measured], samples_per_step: int) -> str:
    """How long the whole experiment takes with each alternative."""
    return "\n".join(
        f"{ALTERNATIVES[name][0]}: {EXPERIMENT_SAMPLES:,} samples take"
        f" {EXPERIMENT_SAMPLES / samples_per_step * measured.seconds / 60:.1f} min"
        f" (on one H100 they should take at most {TARGET_MINUTES})"
        for name, measured in results.items()
    )


def describe_preparation(batches: TrainingBatches) -> str:
    """What a batch costs before the UNet sees it."""
    started = time.process_time()
    for index in range(PREPARED_BATCHES):
        batches[index]
    milliseconds = (time.process_time() - started) / PREPARED_BATCHES * 1000
    return f"a batch of {batches.train_batch_size} is prepared in {milliseconds:.2f} ms of processor time"


# The run.


def prepare(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: Any,
    unet: torch.nn.Module,
    encoded: EncodedClips,
    batch_size: int,
) -> Alternatives:
    """All alternatives for one batch size; `unet` is the pipeline's, prepared by accelerate."""
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    both = []
    for passes in (args.gradient_accumulation_steps, 1):
        batches = TrainingBatches(
            encoded=encoded,
            seed=SEED,
            train_batch_size=batch_size,
            gradient_accumulation_steps=passes,
            num_train_epochs=1,
            max_train_steps=1_000_000,
            scaling_factor=pipeline.vae.config.scaling_factor,
            num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        )
        plain = PlainStep(accelerator, pipeline, noise_scheduler, batches)
        ours = OurStep(accelerator, pipeline, noise_scheduler, batches, args.use_8bit_adam)
        both.append({name: plain if name.startswith("plain") else ours for name in args.alternatives})
    torch._dynamo.reset()  # what was compiled for another batch size
    models = {name: compile_unet(unet, accelerator) if name == "compiled" else unet for name in args.alternatives}
    return Alternatives(accelerator, models, *both)


def benchmark(model_name: str, args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> None:
    """Times one model with every batch size and prints the tables."""
    device = accelerator.device
    num_steps = args.steps or STEPS[device.type][model_name]
    pipeline = build_model(model_name)
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.requires_grad_(False)
    clips = write_clips(folder, args.resolution)
    frames_hash, cache_dir = verify_frames(clips, args.resolution), folder / "encoded_cache"
    encoded = encode_once(pipeline, clips, DEFAULT_CHOICE, frames_hash, False, cache_dir, accelerator)
    unet = pipeline.unet
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet = accelerator.prepare(unet.train())
    size = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for batch_size in args.batch_sizes or BATCH_SIZES[device.type][model_name]:
        alternatives = prepare(args, accelerator, pipeline, unet, encoded, batch_size)
        results = {name: Measured() for name in args.alternatives}
        with tqdm(total=len(results) * (args.rounds + 1), desc=f"{model_name}, batch {batch_size}", leave=False) as bar:
            found = {}
            for name in results:
                found[name] = alternatives.losses_and_norms(name)
                bar.update()
            agreement = check_agreement(found, args.mixed_precision)
            for _ in range(args.rounds):
                for name, measured in results.items():
                    alternatives.take_turn(name, num_steps, measured)
                    bar.update()
        print(
            f"{model_name} (UNet of {size:.1f} M parameters), {args.resolution}x{args.resolution}, batch {batch_size} x"
            f" {args.gradient_accumulation_steps}, mixed precision {args.mixed_precision}, {where}, torch"
            f" {torch.__version__}; medians of {args.rounds} turns of {num_steps} steps"
        )
        samples_per_step = batch_size * args.gradient_accumulation_steps
        print(format_table(results, samples_per_step))
        if device.type == "cuda":
            print(describe_experiment(results, samples_per_step))
        print(describe_preparation(next(iter(alternatives.steps.values())).batches))
        print(f"{agreement}\n", flush=True)


def main(args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if args.mixed_precision == "fp16" and not has_gpu:
        raise UserError("there is no GPU, and --mixed_precision fp16 needs one; use bf16 or no")
    args.mixed_precision = args.mixed_precision or ("fp16" if has_gpu else "no")
    left_out = {"plain_memory_kept"} if has_gpu else set()
    args.alternatives = [name for name in ALTERNATIVES if name in set(args.alternatives) - left_out]
    if not args.alternatives:
        raise UserError("plain_memory_kept alone is for a CPU: name another alternative")
    datasets.disable_progress_bars()
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.benchmark = True  # for all alternatives
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        for name in dict.fromkeys(args.models):
            benchmark(name, args, accelerator, Path(folder))


if __name__ == "__main__":
    run_command(functools.partial(main, ARGS))
