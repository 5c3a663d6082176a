"""Shows the GPU memory of a training step: full fine-tuning, 8-bit Adam with gradient checkpointing, and LoRA.

    python -m benchmarks.memory

On a GPU it is measured (which has not been run yet). Elsewhere it is computed: torch's own tracker follows a step of
tensors that have a size but no content. The computation leaves out what a GPU needs beside tensors: CUDA's context and
the workspaces of convolutions. The frozen VAE and text encoder stay on the CPU while training and need none.
"""

from __future__ import annotations

import argparse
import functools
import signal
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

from data.cli import CommandParser, number, run_command

ADAM, ADAM_8BIT = 8, 2  # bytes that an optimizer keeps for a weight: two moments
# Each row: gradient checkpointing, 8-bit Adam, LoRA.
ROWS = {
    "full fine-tuning": (False, False, False),
    "8-bit Adam, gradient checkpointing": (True, True, False),
    "LoRA": (False, False, True),
    "LoRA, gradient checkpointing": (True, False, True),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("--batch_size", type=count, default=16, help="(%(default)s)")
    add("--resolution", type=number(at_least=32, multiple_of=32), default=128, help="(%(default)s)")
    add("--lora_rank", type=count, default=64, help="(%(default)s)")
    add("--quick", action="store_true", help="the demo's model in place of Stable Diffusion 1.5's size")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.models import build_unet
from pecn.diffusion import diffusion_loss
from pecn.lora import add_adapter
from pecn.optimization import create_optimizer, trained_weights


class Moments:
    """In an optimizer's place: only what it keeps."""

    def __init__(self, unet: torch.nn.Module, bytes_per_weight: int) -> None:
        self.weights = trained_weights(unet)
        self.kept = [torch.empty(bytes_per_weight * weight.numel(), dtype=torch.uint8) for weight in self.weights]

    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


def in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function as CUDA's autocast calls it, where a CPU's would stay in half precision."""

    def wrapper(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(tensor.float(), *args, **kwargs)

    return wrapper


def where_trained(register: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor's method that registers a hook on its gradient; where there is none it does nothing."""
    return lambda tensor, hook: register(tensor, hook) if tensor.requires_grad else mock.Mock()


def prepare(
    args: argparse.Namespace, gradient_checkpointing: bool, use_lora: bool
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The UNet, and a batch for `diffusion_loss`."""
    unet, vae_factor = build_unet("demo" if args.quick else "sd15")
    unet.train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if use_lora:
        add_adapter(unet, args.lora_rank, seed=0)
    side = args.resolution // vae_factor
    latents = torch.randn(args.batch_size, unet.config.out_channels, side, side)
    return unet, {
        "target_latents": latents,
        "image_latents": latents,
        "noise": latents,
        "timesteps": torch.zeros(args.batch_size, dtype=torch.long),
        "prompt_embeds": torch.randn(args.batch_size, 77, unet.config.cross_attention_dim),
    }


def take_step(
    unet: torch.nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | Moments, device: str
) -> None:
    with torch.autocast(device, torch.bfloat16):  # fp16 takes the same memory
        loss = diffusion_loss(unet, DDPMScheduler(), batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def computed_peak(args: argparse.Namespace, gradient_checkpointing: bool, use_8bit_adam: bool, use_lora: bool) -> int:
    """The bytes of all tensors at the peak."""
    tracker = MemTracker()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(F, "group_norm", in_float32(F.group_norm)),
        mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
        # peft moves the adapter to where its layer is; these tensors are there, and cannot be moved.
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module),
        # The tracker wants to hear of every weight's gradient, which LoRA's frozen ones do not have.
        mock.patch.object(torch.Tensor, "register_hook", where_trained(torch.Tensor.register_hook)),
        mock.patch.object(
            torch.Tensor,
            "register_post_accumulate_grad_hook",
            where_trained(torch.Tensor.register_post_accumulate_grad_hook),
        ),
    ):
        unet, batch = prepare(args, gradient_checkpointing, use_lora)
        tracker.track_external(unet)
        with tracker:
            take_step(unet, batch, Moments(unet, ADAM_8BIT if use_8bit_adam else ADAM), "cpu")
    return sum(memory["Total"] for memory in tracker.get_tracker_snapshot("peak").values())


def measured_peak(args: argparse.Namespace, gradient_checkpointing: bool, use_8bit_adam: bool, use_lora: bool) -> int:
    """The bytes that torch allocated on the GPU at the peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    unet, batch = prepare(args, gradient_checkpointing, use_lora)
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    optimizer = create_optimizer(unet.cuda(), 1e-5, use_8bit_adam)
    for _ in range(2):  # the moments are there from the first step's end on
        take_step(unet, batch, optimizer, "cuda")
    return torch.cuda.max_memory_allocated()


def main(args: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    how = f"measured on {torch.cuda.get_device_name()}" if has_gpu else "computed, not measured"
    size = "the demo's model" if args.quick else "Stable Diffusion 1.5's size"
    print(f"{size}, {args.resolution}x{args.resolution}, batch {args.batch_size}, bf16 or fp16; {how}")
    for name, (gradient_checkpointing, use_8bit_adam, use_lora) in ROWS.items():
        if has_gpu and use_8bit_adam and not find_spec("bitsandbytes"):
            print(f"{name:36}  needs bitsandbytes: pip install bitsandbytes")
            continue
        peak = (measured_peak if has_gpu else computed_peak)(args, gradient_checkpointing, use_8bit_adam, use_lora)
        print(f"{name:36}{peak / 1e9:8.2f} GB", flush=True)


if __name__ == "__main__":
    run_command(functools.partial(main, ARGS))
