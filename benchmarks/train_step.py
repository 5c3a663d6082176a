"""Times an optimizer step: as diffusers' InstructPix2Pix example takes it, and ours, plain and compiled.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --models sd15 --mixed_precision bf16 --batch_sizes 16

The alternatives take turns (A B C A B C …) on one UNet with random weights, each turn with a fresh optimizer and first
steps that do not count. Before the first turn all of them compute loss and gradient norm for the same pictures,
prompts, noise and timesteps, which must agree. They run on a GPU if there is one. On a CPU all keep freed memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from tqdm import tqdm

from benchmarks.models import build_model
from data.cli import CommandParser, UserError, number, run_command
from data.clips import Clip, FrameChoice, derive_seed
from data.paths import frame_path
from pecn import optimization
from pecn.diffusion import diffusion_loss
from pecn.encoded_frames import EncodedClips, TrainingBatches, encode_once
from pecn.model import Pipeline, tokenize

# glibc reads these when a process starts; train_instruct_pix2pix.sh sets them too.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
NUM_PAIRS = 16  # pictures and prompts that the steps draw from
SEED = 42
LEARNING_RATE, MAX_GRAD_NORM = 5e-6, 1.0  # training's defaults
ALTERNATIVES = ("plain", "ours", "compiled")
BATCH_SIZES = {"cpu": {"demo": (4, 16), "sd15": (1, 2)}, "cuda": {"demo": (16, 64), "sd15": (8, 16)}}
WARM_UP_STEPS = {"cpu": 1, "cuda": 5}  # a GPU also has its allocator and the scale of fp16's loss to find
STEPS = {"cpu": {"demo": 5, "sd15": 2}, "cuda": {"demo": 20, "sd15": 20}}
QUICK = {"models": ["demo"], "alternatives": ["plain", "ours"], "batch_sizes": [2], "steps": 1, "rounds": 1}

# Do all do the same work?
CHECKED_STEPS = 2
CHECKED_LOSS_SCALE = 1024  # so that gradients neither vanish nor overflow in fp16; a power of 2, so exact
TOLERANCE = {"no": 1e-3, "fp16": 2e-2, "bf16": 5e-2}  # relative, of losses and gradient norms
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of plain's VAE and text encoder


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--models", nargs="+", choices=["demo", "sd15"], default=["demo", "sd15"], help="(%(default)s)")
    add("--alternatives", nargs="+", choices=ALTERNATIVES, default=list(ALTERNATIVES), help="(%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
    add("--batch_sizes", type=count, nargs="+", help="(chosen for model and device)")
    add("--mixed_precision", choices=list(TOLERANCE), help="(bf16 on a GPU, else no)")
    add("--gradient_checkpointing", action="store_true", help="for all alternatives")
    add("--use_8bit_adam", action="store_true", help="ours with AdamW of bitsandbytes; plain keeps torch's")
    add("--steps", type=count, help="optimizer steps timed in a turn (chosen for model and device)")
    add("--rounds", type=count, default=3, help="turns of each alternative (%(default)s)")
    add("--quick", action="store_true", help="under a minute: the demo's model, batch 2, 1 step, nothing compiled")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    if args.use_8bit_adam and not find_spec("bitsandbytes"):
        parser.error("the package bitsandbytes is missing: pip install bitsandbytes, or leave --use_8bit_adam out")
    return args


# The steps. `start` makes a fresh optimizer, `take` makes a step, `stop` puts things back, and `loss` is that of one
# step with its own random numbers, on which both kinds must agree.


class PlainStep:
    """The optimizer step of diffusers' InstructPix2Pix training example, which encodes what it is given each time.

    Pictures and tokens are prepared beforehand: reading them is not part of what is timed.
    """

    def __init__(
        self, accelerator: Accelerator, pipeline: Pipeline, noise_scheduler: Any, batches: TrainingBatches
    ) -> None:
        self.accelerator, self.pipeline, self.noise_scheduler = accelerator, pipeline, noise_scheduler
        self.batches, self.weight_dtype = batches, DTYPES[accelerator.mixed_precision]
        clips, preprocess = batches.encoded.clips, pipeline.image_processor.preprocess
        frames = zip(*(clip.paths for clip in clips))
        self.input_pixels, self.target_pixels = (preprocess([Image.open(path) for path in paths]) for paths in frames)
        self.token_ids = tokenize(pipeline, [clip.prompt(20, None) for clip in clips])

    def start(self, model: torch.nn.Module) -> None:
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to(self.accelerator.device, self.weight_dtype)
        self.model, self.first_rows = model, itertools.count(0, self.batches.train_batch_size)
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))

    def take(self) -> None:
        """One update of the weights, with the losses read where the example reads them to log them."""
        first_row = next(self.first_rows)
        rows = [row % NUM_PAIRS for row in range(first_row, first_row + self.batches.train_batch_size)]
        with self.accelerator.accumulate(self.model):
            loss = self.forward(self.model, rows)
            self.accelerator.gather(loss.repeat(len(rows))).mean().item()
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss.detach().item()  # the example shows each loss in its progress bar

    def forward(
        self, model: torch.nn.Module, rows: list[int], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The loss. A CPU generator in the place of the device's own draws what `TrainingBatches` draws from it."""
        vae, device, scheduler = self.pipeline.vae, self.accelerator.device, self.noise_scheduler
        posterior = vae.encode(self.target_pixels[rows].to(device, self.weight_dtype)).latent_dist
        prompt_embeds = self.pipeline.text_encoder(self.token_ids[rows].to(device))[0]
        image_latents = vae.encode(self.input_pixels[rows].to(device, self.weight_dtype)).latent_dist.mode()
        mean = posterior.mean
        drawn = {"generator": generator, "device": device if generator is None else torch.device("cpu")}
        noise = torch.randn(mean.shape, **drawn).to(mean)
        posterior_noise = torch.randn(mean.shape, **drawn).to(mean)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), **drawn).to(device)
        latents = (mean + posterior.std * posterior_noise) * vae.config.scaling_factor
        unet_input = torch.cat([scheduler.add_noise(latents, noise, timesteps), image_latents], dim=1)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = model(unet_input, timesteps, prompt_embeds, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target.float())  # the reference: it does not follow pecn/diffusion.py

    def loss(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.batches.seed, "step", step))
        return self.forward(model, self.batches.samples_of_step(step), generator)

    def stop(self) -> None:
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to("cpu", torch.float32)
        self.optimizer.zero_grad(set_to_none=True)


class OurStep:
    """The optimizer step of train_instruct_pix2pix.py, with the losses read as seldom as there."""

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: Pipeline,
        noise_scheduler: Any,
        batches: TrainingBatches,
        use_8bit_adam: bool,
    ) -> None:
        self.accelerator, self.pipeline, self.noise_scheduler = accelerator, pipeline, noise_scheduler
        self.batches, self.use_8bit_adam = batches, use_8bit_adam

    def start(self, model: torch.nn.Module) -> None:
        self.model = model
        self.optimizer = self.accelerator.prepare(
            optimization.create_optimizer(model, LEARNING_RATE, self.use_8bit_adam)
        )
        self.passes = self.batches.load(0, self.pipeline, self.accelerator)
        self.unread: list[torch.Tensor] = []

    def take(self) -> None:
        loss, *_ = optimization.optimizer_step(
            self.accelerator, self.model, self.optimizer, self.noise_scheduler, self.passes, MAX_GRAD_NORM
        )
        self.unread.append(loss)
        if len(self.unread) == optimization.LOG_EVERY:
            torch.stack(self.unread).tolist()
            self.unread.clear()

    def loss(self, model: torch.nn.Module, step: int) -> torch.Tensor:
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in self.batches[step].items()}
        return diffusion_loss(model, self.noise_scheduler, batch)

    def stop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


# Measuring.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turn(
    step: PlainStep | OurStep, model: torch.nn.Module, num_steps: int, device: torch.device
) -> dict[str, float]:
    """Times `num_steps` steps after those that do not count: seconds a step, and the peak of a GPU's memory in GB.

    The processor's time, of all cores together, hardly changes where other programs run.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step.start(model)
    for _ in range(WARM_UP_STEPS[device.type]):
        step.take()
    synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step.take()
    synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    step.stop()
    figures = {"s/step": seconds / num_steps, "CPU s/step": cpu_seconds / num_steps}
    if device.type == "cuda":
        figures["GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return figures


def losses_and_norms(step: PlainStep | OurStep, model: torch.nn.Module) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps, with the weights as they are; the same for every alternative."""
    step.start(model)
    found = []
    for index in range(CHECKED_STEPS):
        loss = step.loss(model, index)
        (loss * CHECKED_LOSS_SCALE).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        found.append((loss.item(), norm.item() / CHECKED_LOSS_SCALE))
        model.zero_grad(set_to_none=True)
    step.stop()
    return found


def check_agreement(found: dict[str, list[tuple[float, float]]], mixed_precision: str) -> str:
    """A line that says how well losses and gradient norms agree. Raises UserError where they do not."""
    values = np.array(list(found.values()))  # alternative, step, loss or norm
    differences = np.abs(values / values[0] - 1).max(axis=(0, 1))
    numbers = ", ".join(f"{loss:.5f}" for loss, _ in values[0])
    line = f"losses ({numbers}) differ by {differences[0]:.1e}, gradient norms by {differences[1]:.1e}, relatively"
    if not differences.max() <= TOLERANCE[mixed_precision]:  # so that nan does not pass
        raise UserError(f"the alternatives do different work: {line}")
    return f"the same work: {line}"


def tabulate(turns: list[dict[str, Any]], batch_size: int) -> str:
    """A line for each alternative: medians of its turns, and how many times as fast as the first one it is."""
    table = pd.DataFrame(turns).groupby("alternative", sort=False).median()
    table.insert(0, "samples/s", batch_size / table["s/step"])
    table.insert(1, "ratio", table["s/step"].iloc[0] / table["s/step"])
    table.insert(
        table.columns.get_loc("CPU s/step") + 1, "CPU ratio", table["CPU s/step"].iloc[0] / table["CPU s/step"]
    )
    return table.reset_index().to_string(index=False, float_format="{:.3f}".format)


# The run.


def write_clips(folder: Path, resolution: int) -> list[Clip]:
    """Clips of two frames of random colors, as PNG files."""
    random = np.random.default_rng(0)
    clips = []
    for index in range(NUM_PAIRS):
        clip = Clip(str(index), "move_object", f"Moving object {index} up", folder / str(index), (20, 21))
        clip.folder.mkdir()
        for frame in clip.frames:
            colors = Image.fromarray(random.integers(256, size=(8, 8, 3), dtype=np.uint8))
            colors.resize((resolution, resolution)).save(frame_path(folder, clip.video_id, frame))
        clips.append(clip)
    return clips


def plan_batches(encoded: EncodedClips, pipeline: Pipeline, batch_size: int) -> TrainingBatches:
    return TrainingBatches(
        encoded=encoded,
        seed=SEED,
        train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        max_train_steps=1_000_000,
        scaling_factor=pipeline.vae.config.scaling_factor,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
    )


def benchmark(model_name: str, args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> None:
    """Times one model with every batch size and prints the tables."""
    device, pipeline = accelerator.device, build_model(model_name)
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.requires_grad_(False)
    clips, cache_dir = write_clips(folder, args.resolution), folder / "encoded_cache"
    encoded = encode_once(pipeline, clips, FrameChoice(), False, cache_dir)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    unet = accelerator.prepare(pipeline.unet.train())
    size = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    num_steps = args.steps or STEPS[device.type][model_name]
    for batch_size in args.batch_sizes or BATCH_SIZES[device.type][model_name]:
        shared = (accelerator, pipeline, noise_scheduler, plan_batches(encoded, pipeline, batch_size))
        plain, ours = PlainStep(*shared), OurStep(*shared, args.use_8bit_adam)
        torch._dynamo.reset()  # what was compiled for another batch size
        ways = {"plain": (plain, unet), "ours": (ours, unet)}
        if "compiled" in args.alternatives:
            ways["compiled"] = (ours, optimization.compile_unet(unet, accelerator))
        ways = {name: way for name, way in ways.items() if name in args.alternatives}
        agreement = check_agreement({name: losses_and_norms(*way) for name, way in ways.items()}, args.mixed_precision)
        turns = [
            {"alternative": name, **take_turn(*way, num_steps, device)}
            for _ in tqdm(range(args.rounds), desc=f"{model_name}, batch {batch_size}", leave=False)
            for name, way in ways.items()
        ]
        print(
            f"{model_name} (UNet of {size:.1f} M parameters), {args.resolution}x{args.resolution}, batch {batch_size},"
            f" mixed precision {args.mixed_precision}, {where}, torch {torch.__version__}; medians of {args.rounds}"
            f" turns of {num_steps} steps"
        )
        print(tabulate(turns, batch_size))
        print(f"{agreement}\n", flush=True)
        accelerator.free_memory()


def main(args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    if args.mixed_precision == "fp16" and not has_gpu:
        raise UserError("there is no GPU, and --mixed_precision fp16 needs one; use bf16 or no")
    args.mixed_precision = args.mixed_precision or ("bf16" if has_gpu else "no")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # for all alternatives
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    for name in dict.fromkeys(args.models):
        with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
            benchmark(name, args, accelerator, Path(folder))


if __name__ == "__main__":
    options = parse_args()
    if not KEPT_MEMORY.items() <= os.environ.items():
        os.environ |= KEPT_MEMORY
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]])
    run_command(lambda: main(options))
