"""Calls a command in this process, which takes a fraction of the time that a new one takes."""

import contextlib
import io
import subprocess
import sys
from types import ModuleType

import pytest

from data import cli


def call(module: ModuleType, *words: object) -> subprocess.CompletedProcess:
    """`python -m <module> <words>`: exit status, output and errors."""
    words, output, errors, status = [str(word) for word in words], io.StringIO(), io.StringIO(), None
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.setattr(sys, "argv", [module.__name__, *words])
        try:
            cli.run_command(module.main)
        except SystemExit as exit_:
            status = exit_.code
    if isinstance(status, str):
        errors.write(f"{status}\n")
        status = 1
    return subprocess.CompletedProcess(words, status or 0, output.getvalue(), errors.getvalue())


def error_line(done: subprocess.CompletedProcess, status: int = 1) -> str:
    """The one line with which a command has refused to run."""
    assert done.returncode == status and not done.stdout, (done.stdout, done.stderr)
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line
