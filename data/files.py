"""Files and folders that are whole or absent, and the lock of a folder."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.cli import UserError

PARTIAL_SUFFIX = ".partial"  # `.<name>.partial`: being written


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing. Raises UserError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise UserError(f"the folder {path} cannot be made ({reason}); name another one") from None


def remove(path: Path) -> None:
    """Delete a file or a folder with its content, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what commands that were killed while they wrote into `folder` have left behind."""
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        remove(path)


def partial_path(final: Path) -> Path:
    """The temporary name under which `whole_or_absent` has `final` written."""
    return final.with_name(f".{final.name}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def whole_or_absent(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that takes the place of `final` once the block has ended well.

    Where the block fails, what it has written is removed and a former `final` stays as it was.
    """
    partial = partial_path(final)
    remove(partial)
    try:
        yield partial
        if final.is_dir():  # which os.replace would refuse to replace
            remove(final)
        os.replace(partial, final)
    finally:
        remove(partial)


@contextlib.contextmanager
def parts_replaced(folder: Path, last: str) -> Iterator[Path]:
    """Yield a new folder whose files and folders replace those of the same names in `folder` once the block ends well.

    The part named `last`, by which a reader knows that all are there, leaves first and arrives last.
    """
    new = folder / f".new{PARTIAL_SUFFIX}"
    remove(new)
    new.mkdir(parents=True)
    try:
        yield new
        remove(folder / last)
        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            remove(folder / path.name)
            os.rename(path, folder / path.name)
    finally:
        remove(new)


def write_file(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_or_absent(Path(path)) as partial, open(partial, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())  # else a crash soon after the rename could leave an empty file


def write_json(path: Path | str, content: Any) -> None:
    """Write `content` as indented UTF-8 JSON: whole or not at all, and the same bytes for the same content."""
    write_file(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def only_one(folder: Path, work: str) -> Iterator[None]:
    """Refuse to run beside another process that does `work` ("training") in `folder`. Any exit frees the lock."""
    try:
        with FileLock(folder / f".{work}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another {work} is running in {folder}; wait for its end, or name another") from None
