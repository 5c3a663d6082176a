"""A data directory: where its files lie, and its annotation files."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from data.cli import UserError

DEFAULT_DATA_DIR = Path("data/sthv2")
SPLITS = ("train", "val")
VIDEO_EXTENSIONS = (".webm", ".mp4", ".mov", ".avi", ".mkv", ".m4v")
DOWNLOAD_HINT = "get Something-Something V2 from Qualcomm's developer site (developer.qualcomm.com)"


def video_path(data_dir: Path | str, video_id: str, extension: str = VIDEO_EXTENSIONS[0]) -> Path:
    """`<data_dir>/videos/<id><extension>`; without an extension that of SSv2, `.webm`."""
    return Path(data_dir) / "videos" / f"{video_id}{extension}"


def find_video(data_dir: Path | str, video_id: str) -> Path:
    """A video's file, whichever of VIDEO_EXTENSIONS it has, or a pair's folder; else a dead link, or `video_path`."""
    paths = [video_path(data_dir, video_id, extension) for extension in (*VIDEO_EXTENSIONS, "")]
    return max(paths, key=lambda path: (path.exists(), path.is_symlink()))


def hint_to_move_videos(data_dir: Path, otherwise: str) -> str:
    """How to move .webm files that lie beside or below `videos/` into it; `otherwise` where there are none."""
    videos = data_dir / "videos"
    for folder in sorted([data_dir, *data_dir.glob("*/"), *videos.glob("*/")]):
        if folder != videos and any(folder.glob("*.webm")):
            source, target = shlex.quote(f"{folder}/"), shlex.quote(f"{videos}/")
            move = f"find {source} -maxdepth 1 -name '*.webm' -exec mv -t {target} {{}} +"  # too many for `mv *.webm`
            return f"move them: mkdir -p {target} && {move}"
    return otherwise


def frames_dir(data_dir: Path | str, resolution: int) -> Path:
    """`<data_dir>/frames_<R>x<R>`, the folder of all videos' frames at `resolution` R (pixels)."""
    return Path(data_dir) / f"frames_{resolution}x{resolution}"


def command(module: str, data_dir: Path | str) -> str:
    """The shell command that runs a module of `data/` on a data directory."""
    return f"python -m data.{module} --data_dir {shlex.quote(str(data_dir))}"


def extraction_command(data_dir: Path | str, resolution: int) -> str:
    """The shell command that extracts the frames of `frames_dir`."""
    return f"{command('video_loader', data_dir)} --resolutions {resolution}"


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


# An id names files, so it may not lead outside the data directory, hide a folder, or overflow a file name.
is_safe_id = re.compile(r"[\w-][\w.-]{0,99}").fullmatch


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
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            entry["id"] = str(entry["id"])
        if problem := _find_problem(entry, seen):
            raise UserError(f"{path}: entry {position}, {repr(entry)[:100]}: {problem}")
        seen.add(entry["id"])
    return entries


def read_filtered_annotations(data_dir: Path, split: str) -> list[dict]:
    """The entries that `python -m data.dataset` has chosen for a split."""
    path = filtered_annotations_path(data_dir, split)
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with: {command('dataset', data_dir)}")
    return read_annotations(path)


def _find_problem(entry: Any, seen: set[str]) -> str | None:
    """What is wrong with an entry, or None; `seen` are the ids before it."""
    if not isinstance(entry, dict):
        return "must be an object with id and label"
    for key in ("id", "label", "template"):  # only `data.dataset` needs the template
        value = entry.get(key, "none" if key == "template" else None)
        if not isinstance(value, str) or not value.strip():
            return f"{key} is missing, blank or not a string"
    if not is_safe_id(entry["id"]):
        return "the id cannot name a file; it may have 100 letters, digits, '-', '_' and '.', and not start with '.'"
    if entry["id"] in seen:
        return "the id occurs twice in this file"
    return None
