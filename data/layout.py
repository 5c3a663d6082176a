"""What all commands share: errors, types of options, files that are whole or absent, a data directory's layout."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_DATA_DIR = Path("data/sthv2")
SPLITS = ("train", "val")
VIDEO_EXTENSIONS = (".webm", ".mp4", ".mov", ".avi", ".mkv")
DOWNLOAD_HINT = "get Something-Something V2 from Qualcomm's developer site (developer.qualcomm.com)"


# Commands and their errors.


class UserError(Exception):
    """A mistake in the input that the user can mend. The message is one line: what, where, how to mend it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: a UserError or the system's error ends it with one line and status 1, Ctrl-C with 130.

    An error of a process that is not a distributed run's first names the process.
    """
    rank = os.environ.get("RANK", "0")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while libraries were loading, see the scripts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (UserError, OSError) as error:
        traceback.clear_frames(error.__traceback__)  # ends progress bars, which would draw once more below the message
        print(f"error: {error}" if rank == "0" else f"error on process {rank}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interruption:
        traceback.clear_frames(interruption.__traceback__)
        where = f" {interruption}" if str(interruption) else ": run the same command again"
        if rank == "0":
            print(f"interrupted{where}", file=sys.stderr)
        sys.exit(getattr(interruption, "exit_status", 130))


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warn(message: str) -> None:
    from tqdm import tqdm  # here, since a command's --help loads no library

    tqdm.write(f"warning: {message}", file=sys.stderr)  # on a line of its own even where there is a progress bar


def one_line(error: BaseException) -> str:
    """What a library's error says, its line breaks removed, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose refusals take one line."""

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


# An option that can be written alone (`--residual`) or with its value (`--residual True`), as scripts do.
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}


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


# Paths.


def video_path(data_dir: Path | str, video_id: str, extension: str = VIDEO_EXTENSIONS[0]) -> Path:
    """`<data_dir>/videos/<id><extension>`; without an extension that of SSv2, `.webm`."""
    return Path(data_dir) / "videos" / f"{video_id}{extension}"


def find_video(data_dir: Path | str, video_id: str) -> Path:
    """The file of a video, whichever of VIDEO_EXTENSIONS it has; else a link to one that is gone, or `video_path`."""
    paths = [video_path(data_dir, video_id, extension) for extension in VIDEO_EXTENSIONS]
    return max(paths, key=lambda path: (path.is_file(), path.is_symlink()))


def frames_dir(data_dir: Path | str, resolution: int) -> Path:
    """`<data_dir>/frames_<R>x<R>`, the folder of all videos' frames at `resolution` R (pixels)."""
    return Path(data_dir) / f"frames_{resolution}x{resolution}"


def extraction_command(frames_folder: Path) -> str:
    """The shell command that extracts the frames of `<data_dir>/frames_<R>x<R>`; of any other name, all its sizes."""
    command = f"python -m data.video_loader --data_dir {shlex.quote(str(frames_folder.parent))}"
    match = re.fullmatch(r"frames_(\d+)x\1", frames_folder.name)
    return f"{command} --resolutions {match[1]}" if match else command


def frame_path(frames_dir: Path | str, video_id: str, frame_idx: int) -> Path:
    """`<frames_dir>/<id>/<index>.png`; indices start at 0 and have 5 digits (frame 20 is `00020.png`)."""
    return Path(frames_dir) / video_id / f"{frame_idx:05d}.png"


def extracted_frames(folder: Path) -> set[int]:
    """The indices of the frames in one video's folder; none where there is no folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(name[:-4]) for name in names if name.endswith(".png") and name[:-4].isdecimal()}


def filtered_annotations_path(data_dir: Path | str, split: str) -> Path:
    """`<data_dir>/annotations/<split>_filtered.json`, `split` being "train" or "val"."""
    return Path(data_dir) / "annotations" / f"{split}_filtered.json"


# Annotations.

# An id names files, so it may not lead outside the data directory, hide a folder, or overflow a file name.
_is_safe_id = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}").fullmatch


def read_annotations(path: Path | str) -> list[dict]:
    """Read an annotation file: a JSON list of entries with `id`, `label` and perhaps `template`; other keys stay.

    Raises UserError, naming the file and the entry, if the file is not JSON or an entry is not as described.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); make or copy it again") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: the file must be a list of entries")
    seen: set[str] = set()
    for position, entry in enumerate(entries, start=1):
        if problem := _find_problem(entry, seen):
            raise UserError(f"{path}: entry {position}, {repr(entry)[:100]}: {problem}")
        seen.add(entry["id"])
    return entries


def read_filtered_annotations(data_dir: Path, split: str) -> list[dict]:
    """The entries that `python -m data.dataset` has chosen for a split."""
    path = filtered_annotations_path(data_dir, split)
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with: python -m data.dataset --data_dir {data_dir}")
    return read_annotations(path)


def _find_problem(entry: Any, seen: set[str]) -> str | None:
    """What is wrong with an entry, or None; `seen` are the ids before it."""
    if not isinstance(entry, dict):
        return "must be an object with id and label"
    for key in ("id", "label", "template"):
        if key == "template" and key not in entry:
            continue  # only `data.dataset` needs it
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            return f"{key} is missing, blank or not a string"
    if not _is_safe_id(entry["id"]):
        return "the id cannot name a file; it may have 100 letters, digits, '-', '_' and '.', and not start with '.'"
    if entry["id"] in seen:
        return "the id occurs twice in this file"
    return None


def write_annotations(path: Path | str, entries: list[dict]) -> None:
    """Write entries as indented UTF-8 JSON: whole or not at all, and the same bytes for the same entries."""
    write_file(path, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
