"""Times an optimiser step: as diffusers' InstructPix2Pix example takes it, and ours, plain and compiled.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --models sd15 --mixed_precision fp16 --batch_sizes 8 --gradient_accumulation_steps 2

The alternatives take turns (A B C A B C …) on one UNet with random weights, each turn with a fresh optimiser and a
first step that does not count. Before the first turn all of them compute loss and gradient norm for the same pictures,
prompts, noise and timesteps, which must agree. Both run on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from data.layout import UserError, run_command

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from pecn.encoded_frames import TrainingBatches

NUM_PAIRS = 16  # pictures and prompts that the steps draw from
CHECKED_BATCHES = 2
CHECKED_LOSS_SCALE = 1024  # so that gradients neither vanish nor overflow in fp16; a power of 2, so exact
TOLERANCE = {"no": 1e-3, "fp16": 2e-2, "bf16": 5e-2}  # relative, of losses and gradient norms
PARTS = ("encoding", "forward", "backward", "clip", "optimiser", "other")
PARTS_OF_PLAIN_STEP = {"encode": "encoding", "forward": "forward", "clip": "clip"}
ALTERNATIVES = {"plain": "(a) as diffusers' example", "ours": "(b) ours", "compiled": "(b) ours with --compile"}
# What the experiment takes: 3,000 samples, 20 epochs; and how long it may take on an H100.
EXPERIMENT_SAMPLES, TARGET_MINUTES = 60_000, 3
BATCH_SIZES = {"cpu": {"demo": (4, 16), "sd15": (1, 2)}, "cuda": {"demo": (16, 64), "sd15": (8, 16)}}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}  # a GPU also has its allocator and the scale of fp16's loss to find
STEPS = {"cpu": {"demo": 5, "sd15": 2}, "cuda": {"demo": 20, "sd15": 20}}


def parse_args() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(STEPS["cpu"]), default=["demo", "sd15"], help="(%(default)s)")
    add("--alternatives", nargs="+", choices=list(ALTERNATIVES), default=list(ALTERNATIVES), help="(%(default)s)")
    add("--resolution", type=int, default=128, help="side of the frames (%(default)s)")
    add("--batch_sizes", type=int, nargs="+", help="samples a pass (chosen for model and device)")
    add("--gradient_accumulation_steps", type=int, default=1, help="passes per optimiser step (%(default)s)")
    add("--mixed_precision", choices=list(TOLERANCE), help="(fp16 on a GPU, else no)")
    add("--gradient_checkpointing", action="store_true", help="for all alternatives")
    add("--use_8bit_adam", action="store_true", help="ours with AdamW of bitsandbytes; (a) keeps torch's")
    add("--allow_tf32", action="store_true", help="for all alternatives")
    add("--channels_last", action="store_true", help="the UNet's weights in that order, for all alternatives")
    add("--steps", type=int, help="optimiser steps timed in a turn (chosen for model and device)")
    add("--rounds", type=int, default=3, help="turns of each alternative (%(default)s)")
    add("--quick", action="store_true", help="under a minute: the demo's model, batch 4, 2 steps, nothing compiled")
    args = parser.parse_args()
    if args.quick:
        args.models, args.alternatives = ["demo"], ["plain", "ours"]
        args.batch_sizes, args.steps, args.rounds = args.batch_sizes or [4], 2, 1
    if min(args.gradient_accumulation_steps, args.rounds, args.steps or 1, *(args.batch_sizes or [1])) < 1:
        parser.error("batch sizes, passes, steps and rounds must be at least 1")
    return args


# Models and data


def build_stable_diffusion() -> StableDiffusionInstructPix2PixPipeline:
    """InstructPix2Pix of Stable Diffusion 1.5's size, random weights (float32, CPU); the tokenizer is the demo's."""
    from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from demo.pretraining.tokenizer import build_tokenizer
    from demo.pretraining.untrained import assemble_pipeline

    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=8, out_channels=4, cross_attention_dim=768, attention_head_dim=8
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return assemble_pipeline(vae, CLIPTextModel(text_config), tokenizer, unet, scheduler)


def build_model(name: str) -> StableDiffusionInstructPix2PixPipeline:
    import torch

    if name == "sd15":
        torch.manual_seed(0)
        return build_stable_diffusion()
    from demo.pretraining.untrained import build_pipeline

    return build_pipeline(seed=0)


def write_pairs(folder: Path, resolution: int) -> list[dict[str, Any]]:
    """Frame pairs of random colours, as PNG files, with prompts; rows of `frame_pairs_dataset`."""
    import cv2
    import numpy as np

    from data.sthv2_dataset_hf import build_prompt

    random = np.random.default_rng(0)
    pairs = []
    for index in range(NUM_PAIRS):
        paths = {column: str(folder / f"{index}_{column}.png") for column in ("input_image", "edited_image")}
        for path in paths.values():
            colours = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
            cv2.imwrite(path, cv2.resize(colours, (resolution, resolution), interpolation=cv2.INTER_LINEAR))
        prompt = build_prompt(f"Moving object {index} up")
        pairs.append({**paths, "edit_prompt": prompt, "video_id": str(index), "task": "move_object", "num_frames": 40})
    return pairs


def training_arguments(args: argparse.Namespace, data_dir: Path, batch_size: int) -> argparse.Namespace:
    """The arguments that `train_instruct_pix2pix.py` would get, without conditioning dropout."""
    from train_instruct_pix2pix import parse_args as parse_training_args

    values = {
        "train_data_dir": data_dir,
        "resolution": args.resolution,
        "train_batch_size": batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "mixed_precision": args.mixed_precision,
        "conditioning_dropout_prob": 0,
        "max_train_steps": 1_000_000,
        "report_to": "none",
    }
    words = [str(word) for name, value in values.items() if value is not None for word in (f"--{name}", value)]
    switches = ("gradient_checkpointing", "use_8bit_adam", "allow_tf32")
    return parse_training_args(words + [f"--{name}" for name in switches if getattr(args, name)])


# (a) The plain step


class PlainStep:
    """The optimiser step of diffusers' InstructPix2Pix training example, which encodes what it is given each time.

    Pictures and tokens are prepared beforehand: reading them is not part of what is timed.
    """

    def __init__(
        self,
        pipeline: StableDiffusionInstructPix2PixPipeline,
        pairs: list[dict[str, Any]],
        scheduler: Any,
        accelerator: Accelerator,
        args: argparse.Namespace,
    ) -> None:
        import torch
        from PIL import Image

        from pecn.model import tokenize

        self.pipeline, self.scheduler, self.accelerator, self.args = pipeline, scheduler, accelerator, args
        self.weight_dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
        self.pixels = {
            column: pipeline.image_processor.preprocess([Image.open(pair[column]).convert("RGB") for pair in pairs])
            for column in ("input_image", "edited_image")
        }
        self.token_ids = tokenize(pipeline, [pair["edit_prompt"] for pair in pairs])

    def start(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Puts the frozen models where the step needs them; returns torch's default AdamW."""
        import torch

        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to(self.accelerator.device, self.weight_dtype)
        return torch.optim.AdamW(model.parameters(), lr=self.args.learning_rate)

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        tensors = {column: pixels[rows] for column, pixels in self.pixels.items()}
        tensors["token_ids"] = self.token_ids[rows]
        return {name: tensor.to(self.accelerator.device) for name, tensor in tensors.items()}

    def encode(self, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The posterior of the target's latents, the input's latents, the prompt's embedding."""
        posterior = self.pipeline.vae.encode(batch["edited_image"].to(self.weight_dtype)).latent_dist
        prompt_embeds = self.pipeline.text_encoder(batch["token_ids"])[0]
        image_latents = self.pipeline.vae.encode(batch["input_image"].to(self.weight_dtype)).latent_dist.mode()
        return posterior, image_latents, prompt_embeds

    def forward(
        self, model: torch.nn.Module, encoded: tuple[Any, ...], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The loss. A CPU generator in the place of the device's own draws what `TrainingBatches` draws from it."""
        import torch
        import torch.nn.functional as F

        posterior, image_latents, prompt_embeds = encoded
        device = self.accelerator.device if generator is None else torch.device("cpu")
        drawn = {"generator": generator, "device": device}
        noise = torch.randn(posterior.mean.shape, **drawn).to(posterior.mean)
        posterior_noise = torch.randn(posterior.mean.shape, **drawn).to(posterior.mean)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(noise),), **drawn).to(noise.device)
        latents = (posterior.mean + posterior.std * posterior_noise) * self.pipeline.vae.config.scaling_factor
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        unet_input = torch.cat([noisy_latents, image_latents], dim=1)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = model(unet_input, timesteps, prompt_embeds, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target.float())

    def clip(self, model: torch.nn.Module) -> None:
        self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def take(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, first_row: int) -> None:
        """One update of the weights, with the losses read where the example reads them to log them."""
        size, train_loss = self.args.train_batch_size, 0.0
        for part in range(self.args.gradient_accumulation_steps):
            rows = [(first_row + part * size + i) % NUM_PAIRS for i in range(size)]
            with self.accelerator.accumulate(model):
                loss = self.forward(model, self.encode(self.batch(rows)))
                mean_loss = self.accelerator.gather(loss.repeat(size)).mean()
                train_loss += mean_loss.item() / self.args.gradient_accumulation_steps
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.clip(model)
                optimizer.step()
                optimizer.zero_grad()
            loss.detach().item()  # the example shows each pass's loss in its progress bar

    def stop(self) -> None:
        import torch

        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to("cpu", torch.float32)


# Measuring


class Stopwatch:
    """Seconds spent in the parts of a step. On a GPU it waits for the work of each part, which slows the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(self.device)
            self.seconds[part] += time.perf_counter() - started
            return result

        return wrapper

    @contextlib.contextmanager
    def watching(self, *functions: tuple[Any, str, str]) -> Iterator[None]:
        """Times the calls of `owner.name` as `part`, for each (owner, name, part), within the block."""
        with contextlib.ExitStack() as stack:
            for owner, name, part in functions:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            yield


def synchronise(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak anew. On the CPU Linux forgets the process's peak when 5 is written there (man 5 proc)."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not Linux: the peak is that of all turns so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """GB since the last reset: allocated on the GPU, or resident in this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass
class Measured:
    """One alternative's turns: seconds a step (by the clock; of processors), of each part, and peak memory in GB."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    memory: float = 0.0

    def median_part(self, part: str) -> float:
        return statistics.median(parts.get(part, 0.0) for parts in self.parts)


@dataclass
class Subject:
    """What a turn needs: one model with a batch size, and all alternatives' ways to take a step with it."""

    accelerator: Accelerator
    args: argparse.Namespace  # those of training
    unet: torch.nn.Module
    compiled: torch.nn.Module | None
    scheduler: Any
    plain: PlainStep
    batches: TrainingBatches
    checked_batches: TrainingBatches  # the same without accumulation

    def model(self, alternative: str) -> torch.nn.Module:
        return self.compiled if alternative == "compiled" else self.unet


def take_turn(subject: Subject, alternative: str, num_steps: int, measured: Measured) -> None:
    """Times `num_steps` steps after one that does not count, with an optimiser of its own."""
    from pecn import optimization as training
    from pecn.encoded_frames import load_batches
    from pecn.freed_memory import keep_freed_memory, return_freed_memory

    accelerator, args, model = subject.accelerator, subject.args, subject.model(alternative)
    device = accelerator.device
    return_freed_memory()
    if alternative != "plain" and device.type == "cpu":
        keep_freed_memory()
    reset_peak_memory(device)
    if alternative == "plain":
        optimizer = accelerator.prepare(subject.plain.start(model))
        starts = iter(range(0, 10**9, args.train_batch_size * args.gradient_accumulation_steps))
        watched = [(subject.plain, name, part) for name, part in PARTS_OF_PLAIN_STEP.items()]

        def step() -> None:
            subject.plain.take(model, optimizer, next(starts))
    else:
        optimizer = accelerator.prepare(training.create_optimizer(model, args, args.learning_rate))
        loader = load_batches(subject.batches, 0, accelerator, args)
        log = training.StepLog(accelerator, subject.batches.global_batch_size)
        watched = [(training, "diffusion_loss", "forward"), (training, "clip_gradients", "clip")]

        def step() -> None:
            loss, norm = training.optimisation_step(accelerator, model, optimizer, subject.scheduler, loader, args)
            log.add(len(log.pending) + 1, loss, norm, args.learning_rate)
            if len(log.pending) == training.LOG_EVERY:
                log.flush()

    watched += [(accelerator, "backward", "backward"), (optimizer, "step", "optimiser")]
    for _ in range(WARM_UP_STEPS["cuda" if device.type == "cuda" else "cpu"]):
        step()
    stopwatch = Stopwatch(device)
    totals = []
    if device.type == "cuda":  # the stopwatch waits for the GPU at each part, so the total is timed without it
        totals.append(seconds_per_step(step, num_steps, device))
    with stopwatch.watching(*watched):
        totals.append(seconds_per_step(step, num_steps, device))
    measured.seconds.append(totals[0][0])
    measured.cpu_seconds.append(totals[0][1])
    parts = {part: seconds / num_steps for part, seconds in stopwatch.seconds.items()}
    measured.parts.append(parts | {"other": totals[-1][0] - sum(parts.values())})
    measured.memory = max(measured.memory, peak_memory(device))

    if alternative == "plain":
        subject.plain.stop()
    optimizer.zero_grad(set_to_none=True)
    accelerator.free_memory()


def seconds_per_step(step: Callable[[], None], num_steps: int, device: torch.device) -> tuple[float, float]:
    """By the clock, and of all processors together, which other programs on the machine hardly change."""
    synchronise(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step()
    synchronise(device)
    return (time.perf_counter() - started) / num_steps, (time.process_time() - cpu_started) / num_steps


def losses_and_norms(subject: Subject, alternative: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first batches, with the weights as they are; the same for every alternative."""
    import torch

    from data.sthv2_dataset_hf import derive_seed
    from pecn.diffusion import diffusion_loss

    accelerator, model, plain = subject.accelerator, subject.model(alternative), subject.plain
    if alternative == "plain":
        plain.start(model)
    found = []
    for step in range(CHECKED_BATCHES):
        if alternative == "plain":
            rows = subject.checked_batches.samples_of_step(step)
            generator = torch.Generator().manual_seed(derive_seed(subject.args.seed, "step", step))
            loss = plain.forward(model, plain.encode(plain.batch(rows)), generator)
        else:
            batch = subject.checked_batches[step]
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            loss = diffusion_loss(model, subject.scheduler, batch)
        (loss * CHECKED_LOSS_SCALE).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        found.append((loss.item(), norm.item() / CHECKED_LOSS_SCALE))
        model.zero_grad(set_to_none=True)
    if alternative == "plain":
        plain.stop()
    return found


def check_agreement(found: dict[str, list[tuple[float, float]]], mixed_precision: str) -> str:
    """A line that says how well losses and gradient norms agree. Raises UserError where they do not."""
    import numpy as np

    values = np.array(list(found.values()))  # alternative, batch, loss or norm
    differences = np.abs(values / values[0] - 1).max(axis=(0, 1))
    numbers = ", ".join(f"{loss:.5f}" for loss, _ in values[0])
    line = f"losses ({numbers}) differ by {differences[0]:.1e}, gradient norms by {differences[1]:.1e}, relatively"
    if not differences.max() <= TOLERANCE[mixed_precision]:  # so that nan does not pass
        raise UserError(f"the alternatives do different work: {line}")
    return f"the same work: {line}"


# The run


def describe(subject: Subject, model_name: str, num_steps: int, num_rounds: int) -> str:
    import torch

    args, device = subject.args, subject.accelerator.device
    size = sum(parameter.numel() for parameter in subject.unet.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return (
        f"{model_name} (UNet of {size:.1f} M parameters), {args.resolution}x{args.resolution}, batch"
        f" {args.train_batch_size} x {args.gradient_accumulation_steps}, mixed precision {args.mixed_precision},"
        f" {where}, torch {torch.__version__}; medians of {num_rounds} turns of {num_steps} steps"
    )


def print_table(results: dict[str, Measured], samples_per_step: int, device_type: str) -> None:
    """Samples per second, seconds per step and in each part, peak memory; ratios to the first alternative."""
    first = next(iter(results.values()))
    first_seconds, first_cpu_seconds = statistics.median(first.seconds), statistics.median(first.cpu_seconds)
    parts = "".join(f"{part:>11}" for part in PARTS)
    print(f"{'':26}{'samples/s':>10}{'ratio':>7}{'CPU s/step':>12}{'ratio':>7}{'s/step':>9} ={parts}{'GB':>8}")
    for alternative, measured in results.items():
        seconds, cpu_seconds = statistics.median(measured.seconds), statistics.median(measured.cpu_seconds)
        parts = "".join(f"{measured.median_part(part):>11.4f}" for part in PARTS)
        print(
            f"{ALTERNATIVES[alternative]:26}{samples_per_step / seconds:>10.2f}{first_seconds / seconds:>7.2f}"
            f"{cpu_seconds:>12.4f}{first_cpu_seconds / cpu_seconds:>7.2f}{seconds:>9.4f}  {parts}"
            f"{measured.memory:>8.2f}"
        )
    if device_type == "cuda":
        for alternative, measured in results.items():
            minutes = EXPERIMENT_SAMPLES / samples_per_step * statistics.median(measured.seconds) / 60
            print(
                f"{ALTERNATIVES[alternative]}: {EXPERIMENT_SAMPLES:,} samples take {minutes:.1f} min"
                f" (on one H100 they should take at most {TARGET_MINUTES})"
            )


def benchmark(name: str, args: argparse.Namespace, accelerator: Accelerator, data_dir: Path) -> None:
    """Times one model with every batch size and prints the tables."""
    import torch
    from diffusers import DDPMScheduler
    from tqdm import tqdm

    from pecn import optimization as training
    from pecn.encoded_frames import TrainingBatches, encode_once

    device_type = "cuda" if accelerator.device.type == "cuda" else "cpu"
    num_steps = args.steps or STEPS[device_type][name]
    pipeline = build_model(name)
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.requires_grad_(False)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pairs = write_pairs(data_dir, args.resolution)
    unet = pipeline.unet.to(memory_format=torch.channels_last if args.channels_last else torch.preserve_format)
    for batch_size in args.batch_sizes or BATCH_SIZES[device_type][name]:
        training_args = training_arguments(args, data_dir, batch_size)
        training.prepare_unet(unet, training_args)
        latents, embeddings, _ = encode_once(pipeline, pairs, training_args, accelerator)
        batches, checked_batches = (
            TrainingBatches(
                latents,
                embeddings,
                argparse.Namespace(**vars(training_args) | {"gradient_accumulation_steps": passes}),
                scheduler.config.num_train_timesteps,
                pipeline.vae.config.scaling_factor,
            )
            for passes in (args.gradient_accumulation_steps, 1)
        )
        unet = accelerator.prepare(unet)
        torch._dynamo.reset()  # what was compiled for another batch size
        compiled = training.compile_unet(unet) if "compiled" in args.alternatives else None
        plain = PlainStep(pipeline, pairs, scheduler, accelerator, training_args)
        subject = Subject(accelerator, training_args, unet, compiled, scheduler, plain, batches, checked_batches)

        found, results = {}, {alternative: Measured() for alternative in args.alternatives}
        with tqdm(total=len(results) * (args.rounds + 1), desc=f"{name}, batch {batch_size}", leave=False) as bar:
            for alternative in results:
                found[alternative] = losses_and_norms(subject, alternative)
                bar.update()
            agreement = check_agreement(found, args.mixed_precision)
            for _ in range(args.rounds):
                for alternative, measured in results.items():
                    take_turn(subject, alternative, num_steps, measured)
                    bar.update()
        print(describe(subject, name, num_steps, args.rounds))
        print_table(results, batches.global_batch_size, device_type)
        print(f"{agreement}\n", flush=True)


def main() -> None:
    args = parse_args()
    from train_instruct_pix2pix import check_args

    check_args(training_arguments(args, Path(), batch_size=1))
    import datasets
    import torch

    from pecn.model import quiet_libraries
    from train_instruct_pix2pix import create_accelerator

    quiet_libraries()
    datasets.disable_progress_bars()
    args.mixed_precision = args.mixed_precision or ("fp16" if torch.cuda.is_available() else "no")
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        accelerator = create_accelerator(training_arguments(args, Path(folder), batch_size=1))
        for name in dict.fromkeys(args.models):
            benchmark(name, args, accelerator, Path(folder))


if __name__ == "__main__":
    run_command(main)
