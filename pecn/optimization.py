"""How the UNet is updated: optimizer, schedule, one step with clipping, the moving average, and what each step logs."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.cli import UserError
from pecn.diffusion import diffusion_loss

LOG_EVERY = 10  # steps between two reads of the losses from the device: each read waits for the device
MANY_SKIPPED = 20  # steps in a row: halving in each, fp16's scale has come from 65,536 to below 1
# A resumed run keeps both, and takes the same steps again.
HOW_TO_KEEP_FINITE = (
    "earlier checkpoints are untouched, but go on to the same. Start in another OUTPUT_DIR with a lower LEARNING_RATE,"
    " or with bf16 or no mixed precision"
)
WHY_SKIPPED = "had non-finite gradients in fp16; start in another OUTPUT_DIR with MIXED_PRECISION=bf16, or no"


def trained_weights(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights that training changes: all of them, or with LoRA a few."""
    return [weight for weight in unet.parameters() if weight.requires_grad]


def create_optimizer(
    unet: torch.nn.Module, learning_rate: float, use_8bit_adam: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """AdamW; `options` are such as `weight_decay`. `use_8bit_adam` needs the package bitsandbytes."""
    if not use_8bit_adam:
        return torch.optim.AdamW(trained_weights(unet), lr=learning_rate, fused=True, **options)
    import bitsandbytes  # optional, and only for GPUs

    return bitsandbytes.optim.AdamW8bit(trained_weights(unet), lr=learning_rate, **options)


def create_lr_scheduler(
    name: str, optimizer: torch.optim.Optimizer, lr_warmup_steps: int, max_train_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over optimizer steps. `constant` with a warm-up warms up, which diffusers' own ignores."""
    if name == "constant" and lr_warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(name, optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=max_train_steps)


def compile_unet(unet: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """The UNet compiled for the one shape that training has; the settings for GPUs are untested."""
    if accelerator.device.type == "cpu":
        # torch 2.13's C++ backend fuses loops of compatible ranges wrongly: an upsampling's gradient is zero.
        # The layout optimization leads there by choosing channels-last.
        return torch.compile(unet, dynamic=False, options={"layout_optimization": False})
    torch._dynamo.config.optimize_ddp = False  # which would split the UNet into a graph for each bucket of gradients
    # CUDA graphs reuse the memory of gradients: right only where a step is one pass, without other processes.
    one_pass = accelerator.gradient_accumulation_steps == accelerator.num_processes == 1
    mode = torch._inductor.list_mode_options("max-autotune" if one_pass else "max-autotune-no-cudagraphs")
    # Convolutions are channels-last inside the compiled UNet: its weights keep the order that DistributedDataParallel,
    # fused AdamW's moments and checkpoints rely on. By itself torch would not do so, for the last one's few outputs.
    return torch.compile(unet, dynamic=False, options=mode | {"force_layout_optimization": True})


def fast_attention(device: torch.device, in_bf16: bool) -> contextlib.AbstractContextManager:
    """Plain steps on a CPU in bfloat16: for the few latents of a frame they are faster than torch's fused attention."""
    return sdpa_kernel(SDPBackend.MATH) if in_bf16 and device.type == "cpu" else contextlib.nullcontext()


def optimizer_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    noise_scheduler: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    max_grad_norm: float,
    guidance: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of the weights from all its passes; returns this process's mean loss and the gradient's norm."""
    losses = []
    for batch in itertools.islice(batches, accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model), fast_attention(accelerator.device, accelerator.mixed_precision == "bf16"):
            loss = diffusion_loss(model, noise_scheduler, batch, guidance)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, optimizer, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return sum(losses) / len(losses), grad_norm


def clip_gradients(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> torch.Tensor:
    """Makes the optimizer use gradients of at most this norm together; returns their norm before that.

    A fused optimizer divides by `grad_scale` while it reads the gradients, which saves the pass over all of them
    that clipping would be.
    """
    if not getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
        return accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1)
    return norm


@contextlib.contextmanager
def averaged_weights(ema: EMAModel | None, unet: torch.nn.Module) -> Iterator[None]:
    """Puts the moving average in the UNet's place for a while, where there is one."""
    if ema is None:
        yield
        return
    weights = trained_weights(unet)
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(weights)


class StepLog:
    """Collects the figures of steps and writes them to the trackers; the loss is averaged over processes.

    fp16's scaler skips a step whose gradients overflow, and lowers its scale. Only the scale tells, and it is read with
    the losses: each read waits for the device.
    """

    def __init__(self, accelerator: Accelerator, samples_per_step: int) -> None:
        self.accelerator, self.samples_per_step = accelerator, samples_per_step
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor, float, torch.Tensor]] = []
        self.num_updates, self.skipped = 0, 0  # the latter in a row, up to the last step
        self.scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
        self.samples_per_second = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the samples per second what was not training."""
        self.started = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """Takes a step's figures."""
        scale = self.accelerator.scaler._scale.clone() if self.accelerator.scaler else torch.ones(())
        self.pending.append((step, loss, grad_norm, learning_rate, scale))

    def flush(self) -> float:
        """Writes what was collected; returns the last step's loss.

        Raises UserError where the loss of a step that was not skipped is not finite, or many steps in a row were.
        """
        losses = self.accelerator.reduce(torch.stack([loss for _, loss, *_ in self.pending]), "mean").tolist()
        scales = torch.stack([scale for *_, scale in self.pending]).tolist()
        self.samples_per_second = len(losses) * self.samples_per_step / (time.perf_counter() - self.started)
        for (step, _, grad_norm, learning_rate, _), loss, scale in zip(self.pending, losses, scales):
            was_skipped, self.scale = not scale >= self.scale > 0, scale
            self.num_updates += not was_skipped
            self.skipped = self.skipped + 1 if was_skipped else 0
            figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": float(grad_norm), "grad_scale": scale}
            figures["samples_per_second"] = self.samples_per_second
            self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=step)
            if not math.isfinite(loss) and not was_skipped:
                raise UserError(f"the loss of step {step} is {loss}; {HOW_TO_KEEP_FINITE}")
            if self.skipped == MANY_SKIPPED:
                raise UserError(f"the {MANY_SKIPPED} steps up to {step} {WHY_SKIPPED}")
        self.pending.clear()
        self.restart_clock()
        return losses[-1]


def check_weights(accelerator: Accelerator, unet: torch.nn.Module, step: int) -> None:
    """Raises UserError, on all processes, where a weight is not finite, so that only good weights are ever saved."""
    finite = torch.stack([weight.detach().isfinite().all() for weight in unet.parameters()]).all()
    if accelerator.reduce(finite.float(), "sum").item() < accelerator.num_processes:
        raise UserError(f"after step {step} the weights are not finite; {HOW_TO_KEEP_FINITE}")
