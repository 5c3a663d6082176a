"""The training loop of the demo's three models, with checkpoints from which the same command continues.

A step is a pure function of the seed and its number: on a CPU, a run that was stopped and continued ends with the same
weights as an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.cli import UserError, one_line
from data.clips import derive_seed
from data.files import whole_or_absent
from pecn.optimization import averaged_weights, create_lr_scheduler, create_optimizer, fast_attention
from pecn.processes import is_fast_in_bf16

BETAS, MAX_GRAD_NORM, EMA_DECAY = (0.9, 0.99), 1.0, 0.999
LOG_EVERY = 10  # steps; reading a loss waits for the device


def train_stage(
    name: str,
    model: torch.nn.Module,
    loss_of_step: Callable[[int], torch.Tensor],
    args: argparse.Namespace,
    logs: SummaryWriter,
    *,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    depends_on: tuple[str, ...] = (),
    validate: Callable[[int], None] | None = None,
) -> None:
    """Trains a model in place (AdamW, cosine schedule); in the end its weights are their moving average.

    `name` is "vae", "text", "unet" or "guided": the prefix of its options in `args`. Its checkpoint is
    <work_dir>/<name>.pt. `depends_on` names the stages whose models it uses. `validate` is called with the number of
    steps done.
    """
    steps, path = getattr(args, f"{name}_train_steps"), args.work_dir / f"{name}.pt"
    of_stages = [f"{stage}_{what}" for stage in (*depends_on, name) for what in ("train_steps", "batch_size")]
    parameters = list(model.parameters())
    settings = {option: getattr(args, option) for option in ("seed", "num_clips", "start_weights", *of_stages)}
    model.to(memory_format=memory_format(parameters[0].device)).train()
    optimizer = create_optimizer(model, learning_rate, betas=BETAS, weight_decay=weight_decay)
    schedule = create_lr_scheduler("cosine", optimizer, min(warmup_steps, steps // 10), steps)
    average = EMAModel(parameters, decay=EMA_DECAY, use_ema_warmup=True, power=0.75, foreach=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    first = load_checkpoint(path, parts, settings) if path.is_file() else 0
    average.to(parameters[0].device)
    with tqdm(total=steps, initial=first, desc=f"training: {name}", unit="step") as bar:
        for done in range(first + 1, steps + 1):
            loss = loss_of_step(done - 1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            average.step(parameters)
            bar.update()
            if done % LOG_EVERY == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                logs.add_scalar(f"{name}/loss", loss.item(), done)
            if done % args.checkpointing_steps == 0 or done == steps:
                if not math.isfinite(loss.item()):
                    raise UserError(f"the loss of step {done} is {loss.item()}; the last checkpoint is kept")
                save_checkpoint(path, parts, settings, done)
            if validate and (done % args.validation_steps == 0 or done == steps):
                with averaged_weights(average, model):
                    validate(done)
    average.copy_to(parameters)
    model.eval()


def save_checkpoint(path: Path, parts: dict[str, Any], settings: dict[str, Any], step: int) -> None:
    """Writes what continuing after `step` steps needs, whole or not at all."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with whole_or_absent(path) as partial:
        torch.save({"settings": settings, "step": step, **states}, partial)


def load_checkpoint(path: Path, parts: dict[str, Any], settings: dict[str, Any]) -> int:
    """Puts the parts into the state of a checkpoint; returns the number of steps done.

    Raises UserError where the file is damaged, or was written with other settings.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one kind of error for damaged files
        raise UserError(f"{path} cannot be read ({one_line(error)}); delete it to train that model again") from error
    before = saved["settings"]
    changed = [f"{name} was {before.get(name)}, is {now}" for name, now in settings.items() if before.get(name) != now]
    if changed:
        raise UserError(
            f"{path} belongs to other settings ({'; '.join(changed)}): use the same ones, or another --work_dir"
        )
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"]


@contextlib.contextmanager
def fast_arithmetic(device: torch.device) -> Iterator[None]:
    """bfloat16 where the device is fast in it, else float32."""
    in_bf16 = is_fast_in_bf16(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), fast_attention(device, in_bf16):
        yield


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images in memory with which convolutions are fastest."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def step_generator(seed: int, use: str, step: int) -> torch.Generator:
    """A generator that depends on its arguments alone."""
    return torch.Generator().manual_seed(derive_seed(seed, use, step))
