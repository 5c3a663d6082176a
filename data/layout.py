"""A data directory: its paths, its annotation files, and what every command that works on one shares."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

DEFAULT_DATA_DIR = Path("data/sthv2")
SPLITS = ("train", "val")
DOWNLOAD_HINT = "get Something-Something V2 from Qualcomm's developer site (developer.qualcomm.com)"


class UserError(Exception):
    """A mistake in the input that the user can mend. The message is one line: what, where, how to mend it."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`: a UserError ends it with one line and status 1, Ctrl-C with status 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are missing. Raises UserError where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror
        raise UserError(f"the folder {path} cannot be made ({reason}); name another one") from None


def video_path(data_dir: Path | str, video_id: str) -> Path:
    """`<data_dir>/videos/<id>.webm`."""
    return Path(data_dir) / "videos" / f"{video_id}.webm"


def frames_dir(data_dir: Path | str, resolution: int) -> Path:
    """`<data_dir>/frames_<R>x<R>`, the folder of all videos' frames at `resolution` R (pixels)."""
    return Path(data_dir) / f"frames_{resolution}x{resolution}"


def extraction_command(frames_folder: Path) -> str:
    """The shell command that extracts the frames of `<data_dir>/frames_<R>x<R>`; of any other name, all its sizes."""
    command = f"python -m data.video_loader --data_dir {frames_folder.parent}"
    match = re.fullmatch(r"frames_(\d+)x\1", frames_folder.name)
    return f"{command} --resolutions {match[1]}" if match else command


def frame_path(frames_dir: Path | str, video_id: str, frame_idx: int) -> Path:
    """`<frames_dir>/<id>/<index>.png`; indices start at 0 and have 5 digits (frame 20 is `00020.png`)."""
    return Path(frames_dir) / video_id / f"{frame_idx:05d}.png"


def filtered_annotations_path(data_dir: Path | str, split: str) -> Path:
    """`<data_dir>/annotations/<split>_filtered.json`, `split` being "train" or "val"."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return Path(data_dir) / "annotations" / f"{split}_filtered.json"


def list_videos(data_dir: Path | str) -> set[str] | None:
    """The file names in `videos/`, or None if the folder is absent or empty."""
    folder = Path(data_dir) / "videos"
    try:
        return set(os.listdir(folder)) or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from None


# An id names files, so it may not lead outside the data directory, hide a folder, or overflow a file name.
_SAFE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}").fullmatch


def read_annotations(path: Path | str) -> list[dict]:
    """Read and check an annotation file: a JSON list of entries with `id`, `label` and `template`.

    All other keys are kept as they are; `task` and `num_frames`, where present, are checked too. Raises
    UserError, naming the file and the entry, if the file cannot be read or an entry is not as described: an
    id is a string of at most 100 letters, digits, "-", "_" and ".", not starting with ".", and unique in
    its file; label and template are strings that are not blank.
    """
    path = Path(path)
    entries = _load_json(path)
    if not isinstance(entries, list):
        raise UserError(f"{path}: the file must be a list of entries, but holds {_json_type(entries)}")
    seen = set()
    for index, entry in enumerate(entries):
        try:
            video_id, label, template = entry["id"], entry["label"], entry["template"]
            # One test for the usual, good entry; what exactly is wrong is worked out only for a bad one.
            good = _SAFE_ID(video_id) and video_id not in seen and label.strip() and template.strip()
        except (TypeError, KeyError, AttributeError):
            good = False
        if not good or (("num_frames" in entry or "task" in entry) and _extra_keys_problem(entry)):
            raise UserError(f"{path}: entry {index + 1}{_problem(entry, seen)}")
        seen.add(video_id)
    return entries


def _load_json(path: Path) -> object:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if not text.strip():
            raise UserError(f"{path}: the file is empty; copy it again from where it came from")
        content = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(content, ensure_ascii=False).encode()  # an escaped half of a character cannot be written again
        return content
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); make or copy it again") from None


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _problem(entry: object, seen: set[str]) -> str:
    """What is wrong with an entry, as the end of the sentence that begins "entry 5"."""
    if not isinstance(entry, dict):
        return f" must be an object with id, label and template, but is {_json_type(entry)}"
    if "id" not in entry:
        return " has no id"
    video_id = entry["id"]
    if not isinstance(video_id, str):
        return f': the id must be a string such as "74225", but is {_json_type(video_id)}'
    shown = json.dumps(video_id[:60], ensure_ascii=True)
    if not _SAFE_ID(video_id):
        return (
            f": the id {shown} cannot name a file safely; an id has at most 100 letters, digits, '-', '_' and"
            " '.' and does not start with '.'"
        )
    if video_id in seen:
        return f": the id {shown} occurs twice in this file"
    for key in ("label", "template"):
        if key not in entry:
            return f" (id {shown}) has no {key}"
        if not isinstance(entry[key], str):
            return f" (id {shown}): the {key} must be a string, but is {_json_type(entry[key])}"
        if not entry[key].strip():
            return f" (id {shown}): the {key} is blank"
    return f" (id {shown}): {_extra_keys_problem(entry)}"


def _extra_keys_problem(entry: dict) -> str | None:
    if "task" in entry and not isinstance(entry["task"], str):
        return f"the task must be a string, but is {_json_type(entry['task'])}"
    if "num_frames" in entry and (type(entry["num_frames"]) is not int or entry["num_frames"] < 1):
        return "num_frames must be a positive whole number; run python -m data.video_loader to set it"
    return None


def write_annotations(path: Path | str, entries: list[dict]) -> None:
    """Write entries as indented UTF-8 JSON: whole or not at all, and the same bytes for the same entries."""
    write_file(path, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")


def write_file(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises UserError if the disk does not let us."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())  # else a crash soon after the rename could leave an empty file
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
