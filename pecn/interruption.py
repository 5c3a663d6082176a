"""Ctrl-C (SIGINT) and SIGTERM as requests to stop at a point where nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed


class Interrupted(KeyboardInterrupt):
    """Work ended because of a signal. The message is one line that says where things stand."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number


class StopRequest:
    """Receives SIGINT and SIGTERM for the process that makes it.

    A signal raises `Interrupted` at once, except inside `deferred()`, where it is noted for `agreed()` to tell. A
    second SIGINT then ends the process on the spot, with nothing more saved. A further SIGTERM does not: launchers
    and scripts pass on as SIGTERM what the terminal or the system has sent to all processes already.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.num_interrupts = 0
        self.is_deferred = False
        self.process = os.getpid()
        self.group = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        follow_launcher()

    def receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data loading process, which ends with the one that it serves
        if not self.is_deferred:
            raise Interrupted(number)
        self.num_interrupts += number == signal.SIGINT
        if not self.signal_number:
            self.signal_number = number
            say_in_handler("stopping: what is under way is finished and saved first; Ctrl-C again stops without saving")
        elif number == signal.SIGINT and self.num_interrupts > 1:
            say_in_handler("stopped without saving; the last whole checkpoint remains")
            os._exit(128 + number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def share(self) -> None:
        """Lets all processes of a distributed run agree; call it on each, once their process group exists."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Of its own, on the CPU: asking at every step must not wait for the GPU.
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))

    def agreed(self) -> int:
        """The signal that any process has received, the same answer on all of them; 0 where there was none."""
        if self.group is None:
            return self.signal_number

        number = torch.tensor([self.signal_number])
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(number)


def say_in_handler(text: str) -> None:
    """Writes a line to standard error past Python's buffers, which a signal handler must not enter again."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())


def follow_launcher() -> None:
    """Asks Linux for SIGTERM when `accelerate launch` ends: for one process it passes no signal on before it dies."""
    try:
        launched = b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes() and "RANK" not in os.environ
    except OSError:  # not Linux
        return
    if launched:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
