"""Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP) as requests to stop at a point where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType

import torch


class Interrupted(KeyboardInterrupt):
    """Work ended because of a signal. The message is one line that says where things stand."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number  # what a shell reports of a process that a signal ended


class StopRequest:
    """Receives SIGINT, SIGTERM and SIGHUP for the process that makes it; the last only if it is not ignored (nohup).

    A signal raises `Interrupted` at once, except inside `deferred()`, where it is noted for `agree()` to tell. After
    a SIGINT another one, or a SIGTERM, ends the process on the spot, with nothing more saved: torch's launcher passes
    the first Ctrl-C on as SIGINT and the second as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.is_deferred = False
        self.process = os.getpid()
        # `accelerate launch` of a single process passes no signal on: that it has ended is treated as SIGTERM.
        launched_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
        self.launcher = os.getppid() if launched_alone else None
        # A group of its own, on the CPU: asking at every step must not wait for the GPU.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1)) if distributed else None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data loading process, which ends with the one that it serves
        if not self.is_deferred:
            raise Interrupted(number)
        if self.signal_number != signal.SIGINT:
            self.signal_number = number
            write_error_line("stopping: this step is finished and saved first; Ctrl-C again stops without saving")
        elif number != signal.SIGHUP:
            write_error_line("stopped without saving; the last complete checkpoint remains")
            os._exit(128 + signal.SIGINT)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def agree(self, save: bool) -> tuple[int, bool]:
        """The signal that any process has received (0: none) and whether any wants to `save`: the same on all."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.signal_number = self.signal_number or signal.SIGTERM
        if self.group is None:
            return self.signal_number, save
        wishes = torch.tensor([self.signal_number, save])
        torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX, group=self.group)
        number, save = wishes.tolist()
        return number, bool(save)


def write_error_line(text: str) -> None:
    """Writes a line to standard error past Python's buffers, which a signal handler must not enter again."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several machines Ctrl-C reaches one
        os.write(2, f"\n{text}\n".encode())
