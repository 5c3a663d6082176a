"""Show some clips of a prepared data directory in one picture: a row of frames for each, under its sentence.

python -m demo.contact_sheet --data_dir data/demo --output data/demo/contact_sheet.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.layout import (
    UserError,
    extraction_command,
    filtered_annotations_path,
    frame_path,
    frames_dir,
    make_folder,
    read_annotations,
    run_command,
)

SHOWN_FRAMES = (0, 10, 20, 21, 25)  # and the last one
TITLE_HEIGHT = 20  # pixels


def clip_row(entry: dict, frames_folder: Path) -> np.ndarray:
    """One clip's frames side by side under its label, uint8 BGR; white where the clip is shorter."""
    frames = [cv2.imread(str(frame_path(frames_folder, entry["id"], index))) for index in SHOWN_FRAMES]
    frames.append(cv2.imread(str(frame_path(frames_folder, entry["id"], entry["num_frames"] - 1))))
    blank = np.full_like(frames[0], 255)
    row = np.hstack([blank if frame is None else frame for frame in frames])
    title = np.full((TITLE_HEIGHT, row.shape[1], 3), 255, np.uint8)
    words = f"{entry['label']} ({entry['num_frames']} frames)"
    cv2.putText(title, words, (3, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([title, row])


def contact_sheet(entries: Sequence[dict], frames_folder: Path) -> np.ndarray:
    """The clips' rows in two columns, uint8 BGR."""
    rows = [clip_row(entry, frames_folder) for entry in entries]
    if len(rows) % 2:
        rows.append(np.full_like(rows[0], 255))
    half = len(rows) // 2
    return np.hstack([np.vstack(rows[:half]), np.vstack(rows[half:])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Show some clips of a prepared data directory in one picture.")
    parser.add_argument("--data_dir", type=Path, default=Path("data/demo"), help="default: %(default)s")
    parser.add_argument("--resolution", type=int, default=96, help="uses frames_<R>x<R>; default: %(default)s")
    parser.add_argument("--num_clips", type=int, default=6, help="validation clips to show; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("data/demo/contact_sheet.png"), help="default: %(default)s")
    args = parser.parse_args()
    folder = frames_dir(args.data_dir, args.resolution)
    entries = read_annotations(filtered_annotations_path(args.data_dir, "val"))
    entries = [entry for entry in entries if frame_path(folder, entry["id"], 0).is_file() and "num_frames" in entry]
    if not entries or args.num_clips < 1:
        raise UserError(f"no frames to show in {folder}; extract them with: {extraction_command(folder)}")
    make_folder(args.output.parent)
    cv2.imwrite(str(args.output), contact_sheet(entries[: args.num_clips], folder), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
