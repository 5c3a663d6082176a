"""Too little memory or disk, told in one line instead of a library's traceback."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from data.layout import UserError
from pecn.checkpoints import Shortage, describe_full_disk, is_disk_full, where_training_stands


def is_out_of_memory(error: Exception) -> bool:
    """Only a GPU's allocator has an exception of its own; those of the CPU and of C++ differ in their words alone."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def shortages_in_one_line(args: argparse.Namespace) -> Iterator[None]:
    """Turns whatever a training run raises for want of memory or disk into a Shortage that says what to change."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_full(error):
            reason = " ".join(str(error).split())[:200]
            raise Shortage(
                f"the disk is full ({reason}; {describe_full_disk(args.output_dir)} for {args.output_dir});"
                f" {where_training_stands(args.output_dir)}"
            ) from error
        if is_out_of_memory(error):
            raise Shortage(
                f"out of memory: lower BATCH_SIZE (now {args.train_batch_size}) and raise GRADIENT_ACCUM (now"
                f" {args.gradient_accumulation_steps}) by as much, lower RESOLUTION (now {args.resolution}), or set"
                ' EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"'
            ) from error
        raise
