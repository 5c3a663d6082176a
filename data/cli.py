"""What all commands share: errors in one line, and types of options."""

import argparse
import math
import os
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """An error the user can fix. The message is one line: what is wrong, where, and how to fix it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a UserError or the system's error ends it with one line and status 1, Ctrl-C with 130."""
    try:
        main()
    except (UserError, OSError) as error:
        traceback.clear_frames(error.__traceback__)  # ends progress bars, which would draw once more below the message
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error on process {rank}: {error}")
    except KeyboardInterrupt as interruption:
        traceback.clear_frames(interruption.__traceback__)
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted{str(interruption) or ': run the same command again'}", file=sys.stderr)
        sys.exit(getattr(interruption, "exit_status", 130))


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # on a line of its own even where there is a progress bar


def one_line(error: BaseException) -> str:
    """What a library's error says, its line breaks removed, at most 300 characters, cut between words."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def number(
    kind: type = int,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    multiple_of: int = 0,
) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` (int or float) within the bounds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not -math.inf < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
        for holds, requirement in (
            (value >= at_least, f"at least {round(at_least, 4)}"),
            (value > above, f"above {round(above, 4)}"),
            (value <= at_most, f"at most {round(at_most, 4)}"),
            (value < below, f"below {round(below, 4)}"),
            (not multiple_of or value % multiple_of == 0, f"a multiple of {multiple_of}"),
        ):
            if not holds:
                raise argparse.ArgumentTypeError(f"must be {requirement}, not {text}")
        return value

    return parse


def boolean(text: str) -> bool:
    """An argparse type: True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return text.lower() == "true"


# An option that can be written alone (`--use_lora`) or with its value (`--use_lora True`), as scripts do.
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}
