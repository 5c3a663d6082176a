"""How the UNet is updated: optimizer, schedule, one step with clipping, the moving average, and what each step logs."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.cli import UserError, warn
from pecn.diffusion import diffusion_loss

LOG_EVERY = 10  # steps between two reads of the losses from the device: each read waits for the device
MANY_SKIPPED = 20  # steps in a row: halving in each, fp16's scale has come from 65,536 to below 1
# A resumed run keeps both, and takes the same steps again.
HOW_TO_KEEP_FINITE = (
    "earlier checkpoints are untouched, but go on to the same. Start in another OUTPUT_DIR with a lower LEARNING_RATE,"
    " or with bf16 or no mixed precision"
)
WHY_SKIPPED = "gradients are not finite in fp16; start in another OUTPUT_DIR with MIXED_PRECISION=bf16, or no"


def trained_weights(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights that training changes: all of them, or with LoRA a few."""
    return [weight for weight in unet.parameters() if weight.requires_grad]


def create_optimizer(
    unet: torch.nn.Module, learning_rate: float, use_8bit_adam: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """AdamW; `options` are its `betas`, `weight_decay` and `eps`. `use_8bit_adam` needs the package bitsandbytes."""
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
    """The UNet compiled for the one shape that training has. Its weights are the UNet's own.

    What is chosen for GPUs has not been run on one yet; `python -m benchmarks.train_step` compares its losses and
    gradients with those of the UNet as it is.
    """
    if accelerator.device.type == "cpu":
        # torch 2.13's C++ backend fuses loops of compatible ranges wrongly: an upsampling's gradient is zero.
        # The layout optimization leads there by choosing channels-last.
        return torch.compile(unet, dynamic=False, options={"layout_optimization": False})
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
    snr_gamma: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | float | None, bool]:
    """One update of the weights from all its passes.

    Returns this process's mean loss, the gradient's norm (a number or None under DeepSpeed), and whether the weights
    were updated: fp16's scaler, or DeepSpeed's, skips a step whose gradients overflow, and lowers its scale.
    """
    losses, scaler = [], accelerator.scaler
    scale = scaler.get_scale() if scaler else 1.0  # a fused optimizer skips by itself, which accelerate cannot see
    for batch in itertools.islice(batches, accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model), fast_attention(accelerator.device, accelerator.mixed_precision == "bf16"):
            loss = diffusion_loss(model, noise_scheduler, batch, snr_gamma)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, model, optimizer, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    skipped = optimizer.step_was_skipped or (scaler is not None and not scaler.get_scale() >= scale > 0)
    return sum(losses) / len(losses), grad_norm, not skipped


def clip_gradients(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> torch.Tensor:
    """Makes the optimizer use gradients of at most this norm together; returns their norm before that.

    A fused optimizer divides by `grad_scale` while it reads the gradients, which saves the pass over all of them
    that clipping would be. Where there is none, or the processes share out the gradients, accelerate clips them.
    """
    fused = getattr(optimizer.optimizer, "_step_supports_amp_scaling", False)
    if not fused or accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1)
    return norm


class MovingAverage(EMAModel):
    """diffusers' moving average of the weights, updated in one pass over them instead of three for each tensor."""

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, list(parameters), 1 - self.cur_decay_value)


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


def gather_unet(accelerator: Accelerator, unet: torch.nn.Module) -> UNet2DConditionModel:
    """The UNet without its wrappers; gathered from all processes where they share it out. Call it on every process."""
    unwrapped = accelerator.unwrap_model(unet)
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return unwrapped
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param  # optional

        # accelerate would give those that are computed with, which bf16 and fp16 have rounded
        state_dict = {name: safe_get_full_fp32_param(weight).cpu() for name, weight in unwrapped.named_parameters()}
    else:
        state_dict = accelerator.get_state_dict(unet)
    if not accelerator.is_main_process:
        return unwrapped  # only the main process has the whole, and uses it
    gathered = type(unwrapped).from_config(unwrapped.config)
    gathered.load_state_dict(state_dict)
    return gathered


@contextlib.contextmanager
def current_unet(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    accelerator: Accelerator,
    unet: torch.nn.Module,
    ema: EMAModel | None,
) -> Iterator[None]:
    """Gives the main process's pipeline the UNet as trained so far, or its moving average, for a while.

    Call it on every process.
    """
    former = pipeline.unet
    with averaged_weights(ema, unet):
        pipeline.unet = gather_unet(accelerator, unet)
        try:
            yield
        finally:
            pipeline.unet = former  # else a gathered one would stay in memory


class StepLog:
    """Collects each step's figures and hands them to the trackers every few steps.

    Losses stay on the device until then, since reading one waits for all work before it. Beside each stands the mean of
    the last epoch's (after resuming: of those since), as the timesteps drawn make single ones jump. Raises UserError
    where a loss is not finite; warns where fp16's scaler skips many steps in a row.
    """

    def __init__(self, accelerator: Accelerator, samples_per_step: int, samples_per_epoch: int) -> None:
        self.accelerator, self.samples_per_step = accelerator, samples_per_step
        self.losses_of_epoch: deque[float] = deque(maxlen=math.ceil(samples_per_epoch / samples_per_step))
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor | float | None, float]] = []
        self.skipped = 0  # steps in a row, up to the last one
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the samples per second what was not training."""
        self.started = time.perf_counter()

    def add(
        self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float, updated: bool
    ) -> None:
        """Takes a step's figures; `updated` says whether it has changed the weights."""
        self.pending.append((step, loss, grad_norm, learning_rate))
        self.skipped = 0 if updated else self.skipped + 1
        if self.skipped == MANY_SKIPPED and self.accelerator.is_main_process:
            warn(f"the {MANY_SKIPPED} steps up to {step} were skipped: {WHY_SKIPPED}")

    def flush(self) -> float:
        """Writes what was collected; returns the last step's loss."""
        losses = self.accelerator.reduce(torch.stack([loss for _, loss, *_ in self.pending]), "mean").tolist()
        # DeepSpeed gives a number or nothing in place of a tensor.
        grad_norms = [math.nan if norm is None else float(norm) for _, _, norm, *_ in self.pending]
        samples_per_second = len(self.pending) * self.samples_per_step / (time.perf_counter() - self.started)
        for (step, _, _, learning_rate), loss, grad_norm in zip(self.pending, losses, grad_norms):
            self.losses_of_epoch.append(loss)
            figures = {
                "train/loss": loss,
                "train/loss_epoch_mean": sum(self.losses_of_epoch) / len(self.losses_of_epoch),
                "train/learning_rate": learning_rate,
                "train/grad_norm": grad_norm,
                "train/samples_per_second": samples_per_second,
            }
            self.accelerator.log(figures, step=step)
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {step} is {loss}; {HOW_TO_KEEP_FINITE}")
        if self.accelerator.scaler:
            self.accelerator.log({"train/grad_scale": self.accelerator.scaler.get_scale()}, step=step)  # the last one's
        self.pending.clear()
        self.restart_clock()
        return losses[-1]


def check_weights(accelerator: Accelerator, unet: torch.nn.Module, step: int) -> None:
    """Raises UserError, on all processes, where a weight is not finite, so that only good weights are ever saved."""
    # Where processes share out the weights (as DTensors under FSDP 2), each looks at its part.
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in unet.parameters()]
    finite = torch.stack([weight.detach().isfinite().all() for weight in weights]).all()
    if accelerator.reduce(finite.float(), "sum").item() < accelerator.num_processes:
        raise UserError(f"after step {step} the weights are not finite; {HOW_TO_KEEP_FINITE}")
