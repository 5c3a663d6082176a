"""The processes of a run: one, or several that work on one model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)

from data.cli import UserError


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator that the options of train_instruct_pix2pix.py (`args`) and the launcher ask for.

    Raises UserError where they do not go together.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))  # the other processes wait while one encodes
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if mixed_precision in ("auto", "fp16") and on_cpu:
        mixed_precision = "bf16" if mixed_precision == "auto" and is_fast_in_bf16("cpu") else "no"
        state.print(f"no GPU found: training on the CPU, mixed precision: {mixed_precision}")
    elif mixed_precision == "auto":
        mixed_precision = "bf16" if is_fast_in_bf16("cuda") else "fp16"
    accelerator = Accelerator(
        cpu=on_cpu,
        # Given like this, it is not overridden by what accelerate is configured for.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # one copy of the gradients
    )
    for option in ("use_ema", "use_lora"):
        if getattr(args, option) and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UserError(f"--{option} does not go together with FSDP or DeepSpeed: leave it out")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage not in (1, 2):  # 0 has no master weights to save; 3 shares out the text encoder too
            raise UserError(f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported: set zero_stage to 1 or 2")
        # DeepSpeed takes the first two from the DataLoader that is prepared, which ours is not, and clips by itself.
        config = plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        config["gradient_clipping"] = args.max_grad_norm
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolutions are found once
    return accelerator


def is_fast_in_bf16(device_type: str) -> bool:
    """Whether it has instructions for bfloat16: GPUs since NVIDIA's Ampere, CPUs with AMX or AVX-512 BF16."""
    if device_type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def on_main_process(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `function` returns on the main process, handed to all; its UserError, which ends all, is printed once."""
    result_and_error = [None, None]
    if accelerator.is_main_process:
        try:
            result_and_error[0] = function(*arguments, **options)
        except UserError as error:
            result_and_error[1] = error
    result, error = broadcast_object_list(result_and_error)
    if error:
        raise error if accelerator.is_main_process else SystemExit(1)
    return result


def is_out_of_memory(error: Exception) -> bool:
    """Python has an exception of its own; what CUDA, PyTorch's allocators and the system raise has these words."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)
