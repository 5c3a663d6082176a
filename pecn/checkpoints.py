"""Checkpoints that are whole or absent, and can prove it.

A checkpoint is the folder `<output_dir>/checkpoint-<step>`. Its manifest.json lists every other file with its size and
checksum: what a crash, a full disk or a careless deletion has damaged is noticed before it is loaded, and the newest
whole checkpoint is used instead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate import Accelerator

from data.layout import UserError, write_file

MANIFEST = "manifest.json"
CHUNK = 16 * 2**20  # bytes that one thread reads and sums at a time
MAX_THREADS = 8
HOW_TO_RESUME = "RESUME=latest (--resume_from_checkpoint latest)"


class Shortage(UserError):
    """Memory or disk ran out: on this process, and perhaps on no other of a distributed run."""


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The steps that have a checkpoint, damaged ones included, ascending."""
    names = [path.name for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(name.removeprefix("checkpoint-")) for name in names if name.removeprefix("checkpoint-").isdigit())


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, notes: Mapping[str, str], total_limit: int | None = None
) -> Path:
    """Saves all that resuming needs as `checkpoint-<step>`, whole or not at all; call it on every process.

    `notes` are texts to keep beside the state, by file name. Of the checkpoints up to this one the newest
    `total_limit` are kept. Raises UserError, with everything half-written removed, where the disk has no room.
    """
    final = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f".checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    with removed_where_the_disk_is_full(unfinished, str(final), output_dir):
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name, text in notes.items():
                write_file(unfinished / name, text)
            write_manifest(unfinished)
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        # Later ones are of a run that got further: damaged ones that were passed over, and must not count here.
        earlier = [other for other in checkpoint_steps(output_dir) if other <= step]
        for surplus in earlier[:-total_limit] if total_limit else []:
            shutil.rmtree(output_dir / f"checkpoint-{surplus}", ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a run that was killed while it saved has left behind."""
    for unfinished in output_dir.glob(".*.unfinished"):
        shutil.rmtree(unfinished, ignore_errors=True)


# The manifest


def checksum(path: Path) -> str:
    """CRC-32 of each 16 MiB chunk of a file, in hexadecimal, joined.

    The damage to be found is accidental. A CRC finds it at four times the speed of a cryptographic hash (measured),
    and chunk by chunk it runs in several threads: 10 GB of state take seconds.
    """

    def crc(start: int) -> str:
        with open(path, "rb") as file:
            file.seek(start)
            return f"{zlib.crc32(file.read(CHUNK)):08x}"

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        return "".join(threads.map(crc, range(0, path.stat().st_size, CHUNK)))


def write_manifest(folder: Path) -> None:
    """Lists the folder's files in its manifest.json: `{"files": {name: {"bytes": size, "crc32": checksum}}}`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_file(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """What `write_manifest` wrote under "files"; raises ValueError or OSError where it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        return {str(name): {"bytes": int(file["bytes"]), "crc32": str(file["crc32"])} for name, file in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} lacks {error}") from None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence that begins with its name; None where it is whole."""
    try:
        files = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (OSError, ValueError):
        return f"has an unreadable {MANIFEST}"
    try:
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"lacks {name}"
            if path.stat().st_size != expected["bytes"]:
                return f"is damaged: {name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        for name, expected in files.items():  # only now, since reading takes longer
            if checksum(checkpoint / name) != expected["crc32"]:
                return f"is damaged: the content of {name} has changed"
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and a line about each newer one that has some.

    Raises UserError where there are checkpoints, but none is whole.
    """
    passed_over = []
    for step in reversed(checkpoint_steps(output_dir)):
        checkpoint = output_dir / f"checkpoint-{step}"
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} {damage}")
    if passed_over:
        raise UserError(
            f"no checkpoint is whole ({'; '.join(passed_over)}): delete them to start from the base model, or put"
            " back what is missing"
        )
    return None, []


def find_checkpoint(output_dir: Path, asked: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume_from_checkpoint` means, and a line about each damaged one that was passed over.

    None means to start afresh: nothing was asked for, or 'latest' where there is none yet. Raises UserError where
    the one asked for is absent or damaged, or where a fresh run would mix with an earlier one.
    """
    if not asked:
        steps = checkpoint_steps(output_dir)
        if steps:
            raise UserError(
                f"{output_dir} holds checkpoints of an earlier run (checkpoint-{steps[-1]}): go on with it"
                " (RESUME=latest), delete them, or choose another OUTPUT_DIR"
            )
        return None, []
    if asked == "latest":
        return newest_whole_checkpoint(output_dir)
    checkpoint = Path(asked)
    if not checkpoint.is_dir() or not checkpoint.name.removeprefix("checkpoint-").isdigit():
        raise UserError(f"there is no checkpoint {checkpoint}; name a checkpoint-<step> directory, or 'latest'")
    damage = find_damage(checkpoint)
    if damage:
        raise UserError(f"{checkpoint} {damage}; {HOW_TO_RESUME} goes on from the newest whole checkpoint")
    return checkpoint, []


# A full disk


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused to store more: no space, no quota, or no larger file."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    # safetensors and PyTorch give the reason, or the failed write, only as text.
    signs = ("No space left", "os error 28", "Disk quota", "File too large", "file write failed", "unexpected pos")
    return any(sign in text for sign in signs)


def describe_full_disk(folder: Path, needed_bytes: int | None = None) -> str:
    """How much room there is where `folder` lies, and how much is needed, as part of a sentence."""
    while not folder.exists():
        folder = folder.parent
    free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    return f"about {needed_bytes / 1e6:,.1f} MB are needed, {free}" if needed_bytes else free


@contextlib.contextmanager
def full_disk_in_one_line(wanted: str, folder: Path) -> Iterator[None]:
    """Turns a full disk into a UserError that names what was to be written (`wanted`), and where."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the disk is full: {wanted} cannot be saved in {folder} ({describe_full_disk(folder)}); make room and run"
            " the same command again"
        ) from error


@contextlib.contextmanager
def removed_where_the_disk_is_full(unfinished: Path, wanted: str, output_dir: Path) -> Iterator[None]:
    """Turns a full disk into a UserError that names the newest whole checkpoint, and removes `unfinished`.

    Where something else fails, `unfinished` goes too: what is half-written is of no use to anybody.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, Exception) or not is_disk_full(error):
            raise
        room = describe_full_disk(output_dir, known_size(output_dir) if "checkpoint-" in unfinished.name else None)
        raise Shortage(
            f"the disk is full: {wanted} cannot be saved ({room}); {where_training_stands(output_dir)}"
        ) from error


def known_size(output_dir: Path) -> int | None:
    """The bytes that the newest listed checkpoint takes: the next one takes as many. None where there is none."""
    for step in reversed(checkpoint_steps(output_dir)):
        with contextlib.suppress(OSError, ValueError):
            return sum(int(file["bytes"]) for file in read_manifest(output_dir / f"checkpoint-{step}").values())
    return None


def where_training_stands(output_dir: Path) -> str:
    """Which checkpoint to go on from once the fault is mended, as a sentence's end."""
    try:
        checkpoint, _ = newest_whole_checkpoint(output_dir)
    except UserError:
        checkpoint = None
    if checkpoint is None:
        return "there is no whole checkpoint: make room and start again"
    return f"{checkpoint} is whole: make room and go on from it with {HOW_TO_RESUME}"
