"""Files and folders that are whole or absent, and the lock of a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data.cli import UserError

# Files and folders that are whole or absent.

PARTIAL_SUFFIX = ".partial"  # `.<name>.partial`: being written

OUTDATED_SUFFIX = ".outdated"  # `.<name>.outdated`: replaced, about to be deleted


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
    """Delete what runs that were killed while they wrote into `folder` have left behind."""
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith((PARTIAL_SUFFIX, OUTDATED_SUFFIX)):
            remove(folder / name)


def partial_path(final: Path) -> Path:
    """The temporary name under which `whole_or_absent` has `final` written."""
    return final.with_name(f".{final.name}{PARTIAL_SUFFIX}")


@contextlib.contextmanager
def whole_or_absent(final: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that takes the place of `final` once the block has ended well.

    Where the block fails, what it has written is removed and a former `final` stays as it was.
    """
    partial, outdated = partial_path(final), final.with_name(f".{final.name}{OUTDATED_SUFFIX}")
    remove(partial)
    try:
        yield partial
        if final.is_dir():  # which os.replace would refuse to replace
            remove(outdated)
            os.rename(final, outdated)
        os.replace(partial, final)
        remove(outdated)
    finally:
        remove(partial)


@contextlib.contextmanager
def parts_replaced_together(folder: Path, last: str) -> Iterator[Path]:
    """Yield a new folder whose files and folders go into `folder` once the block has ended well.

    They replace those of the same names there, which come back where that fails. The part named `last`, by which a
    reader knows that all are there, leaves first and arrives last: even a kill never leaves old and new ones mixed.
    """
    new, former = folder / f".new{PARTIAL_SUFFIX}", folder / f".former{PARTIAL_SUFFIX}"
    for path in (new, former):
        remove(path)
        path.mkdir(parents=True)
    try:
        yield new
        names = sorted(os.listdir(new), key=lambda name: name == last)
        moves = [(folder / name, former / name) for name in reversed(names) if (folder / name).exists()]
        moves += [(new / name, folder / name) for name in names]
        with contextlib.ExitStack() as moves_back:
            for source, target in moves:
                os.rename(source, target)
                moves_back.callback(os.rename, target, source)
            moves_back.pop_all()  # all went well
    finally:
        for path in (new, former):
            remove(path)


def write_file(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_or_absent(Path(path)) as partial, open(partial, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())  # else a crash soon after the rename could leave an empty file


@contextlib.contextmanager
def only_one(folder: Path, work: str) -> Iterator[None]:
    """Refuse to run beside another process that does `work` ("training") in `folder`. Any exit frees the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another {work} is running in {folder}; wait for its end, or name another") from None
        yield
    finally:
        os.close(descriptor)
