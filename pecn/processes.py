"""The processes of a run, one or several that work on one model, and the signals that stop it where nothing is lost."""

import argparse
import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState, utils

from data.cli import UserError

# Slurm sends the last one before a job's time limit, where it is asked to.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator that the options of train_instruct_pix2pix.py (`args`) and the launcher ask for."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if utils.parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise UserError(f"{engine} is not supported: configure accelerate for plain multi-GPU")
    on_cpu = utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    patient_group()  # which all processes have to make at the same time
    mixed_precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if mixed_precision in ("auto", "fp16") and on_cpu:
        mixed_precision = "bf16" if mixed_precision == "auto" and is_fast_in_bf16("cpu") else "no"
        hint = "OMP_NUM_THREADS=1 helps where other programs run"
        state.print(f"no GPU found: training on the CPU, mixed precision: {mixed_precision}; {hint}")
    elif mixed_precision == "auto":
        mixed_precision = "bf16" if is_fast_in_bf16("cuda") else "fp16"
    # Half the bytes between GPUs, rounded to bfloat16, where the forward pass is rounded too.
    rounded = not on_cpu and mixed_precision in ("fp16", "bf16")
    hook = utils.DDPCommunicationHookType.BF16 if rounded else utils.DDPCommunicationHookType.NO
    accelerator = Accelerator(
        cpu=on_cpu,
        # Given like this, it is not overridden by what accelerate is configured for.
        gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=utils.ProjectConfiguration(str(args.output_dir), str(args.output_dir / "logs")),
        kwargs_handlers=[utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
    )
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions have it
    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolutions are found once
    return accelerator


def is_fast_in_bf16(device_type: str) -> bool:
    """Whether it has instructions for bfloat16: GPUs since NVIDIA's Ampere, CPUs with AMX or AVX-512 BF16."""
    if device_type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def patient_group() -> Any:
    """All processes, on the CPU: asking at every step must not wait for the GPU, and encoding may take hours.

    None for a single process.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1)) if distributed else None


def describe_device(device: torch.device, unet: torch.nn.Module) -> str:
    """ "cpu", or the GPU's name, its memory, and what weights, gradients and AdamW's two moments take of it."""
    if device.type != "cuda":
        return device.type
    needed = sum(weight.numel() * (weight.element_size() + 12 * weight.requires_grad) for weight in unet.parameters())
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} ({needed / 2**30:.1f} of {gpu.total_memory / 2**30:.0f} GB for weights and optimizer)"


def on_main_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns on the main process, handed to all; its UserError, which ends all, is printed once."""
    is_main, result_and_error = PartialState().is_main_process, [None, None]
    if is_main:
        try:
            result_and_error[0] = function(*arguments)
        except UserError as error:
            result_and_error[1] = error
    if patient_group() is not None:
        torch.distributed.broadcast_object_list(result_and_error, src=0, group=patient_group())
    result, error = result_and_error
    if error:
        raise error if is_main else SystemExit(1)
    return result


def is_out_of_memory(error: Exception) -> bool:
    """Python has an exception of its own; what CUDA, PyTorch's allocators and the system raise has these words."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


class Interrupted(KeyboardInterrupt):
    """Work ended because of a signal. The message says where things stand."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number  # what a shell reports of a process that a signal ended


class StopRequest:
    """Receives STOP_SIGNALS for the process that makes it (SIGHUP only if it is not ignored, as under nohup).

    A signal raises `Interrupted` at once, except inside `deferred()`, where it is noted for `agree()` to tell. A second
    one ends the process on the spot, with nothing more saved.
    """

    AT_ONCE = 2  # seconds: what arrives within them is the same request, passed on by a launcher or sent to all

    def __init__(self) -> None:
        self.signal_number, self.received_at, self.is_deferred = 0, 0.0, False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.is_deferred:
            raise Interrupted(number)
        if not self.signal_number:
            self.signal_number, self.received_at = number, time.monotonic()
            write_error_line("stopping: this step is finished and saved first; once more stops without saving")
        elif time.monotonic() - self.received_at > self.AT_ONCE:
            write_error_line("stopped without saving; the last checkpoint remains")
            os._exit(128 + number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def agree(self) -> int:
        """The signal that any process has received (0: none): the same on all."""
        number = torch.tensor(self.signal_number)
        if patient_group() is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=patient_group())
        return int(number)


def write_error_line(text: str) -> None:
    """Writes a line to standard error past Python's buffers, which a signal handler must not enter again."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
