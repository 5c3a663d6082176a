"""Show some clips of a prepared data directory in one picture: a row of frames for each, under its sentence.

    python -m demo.contact_sheet --data_dir data/demo --output data/demo/contact_sheet.png

`demo/clips.png`, the picture in demo/README.md, is made like this.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.cli import CommandParser, UserError, number, run_command
from data.files import make_folder
from data.paths import extraction_command, filtered_annotations_path, frame_path, frames_dir, read_annotations

if TYPE_CHECKING:
    import numpy as np

SHOWN_FRAMES = (0, 10, 20, 21, 25)  # and the last one
TITLE_HEIGHT = 20  # pixels


def contact_sheet(entries: Sequence[dict], frames_folder: Path) -> np.ndarray:
    """The clips in two columns, each a row of frames under its label, uint8 BGR; white where a clip is shorter."""
    import cv2
    import numpy as np

    rows = []
    for entry in entries:
        indices = (*SHOWN_FRAMES, entry["num_frames"] - 1)
        frames = [cv2.imread(str(frame_path(frames_folder, entry["id"], index))) for index in indices]
        blank = np.full_like(frames[0], 255)
        row = np.hstack([blank if frame is None else frame for frame in frames])
        title = np.full((TITLE_HEIGHT, row.shape[1], 3), 255, np.uint8)
        words = f"{entry['label']} ({entry['num_frames']} frames)"
        cv2.putText(title, words, (3, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        rows.append(np.vstack([title, row]))
    if len(rows) % 2:
        rows.append(np.full_like(rows[0], 255))
    half = len(rows) // 2
    return np.hstack([np.vstack(rows[:half]), np.vstack(rows[half:])])


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="python -m demo.contact_sheet", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("data/demo"), help="default: %(default)s")
    add("--resolution", type=number(at_least=1), default=96, help="uses frames_<R>x<R>; default: %(default)s")
    add("--num_clips", type=number(at_least=1), default=6, help="validation clips to show; default: %(default)s")
    add("--output", type=Path, help="a PNG file; default: contact_sheet.png in --data_dir")
    args = parser.parse_args()
    args.output = args.output or args.data_dir / "contact_sheet.png"
    if args.output.suffix.lower() != ".png":
        parser.error(f"--output must name a .png file, not {args.output}")
    return args


def main() -> None:
    args = parse_args()
    folder = frames_dir(args.data_dir, args.resolution)
    entries = read_annotations(filtered_annotations_path(args.data_dir, "val"))
    entries = [entry for entry in entries if frame_path(folder, entry["id"], 0).is_file() and "num_frames" in entry]
    if not entries:
        raise UserError(f"no frames to show in {folder}; extract them with: {extraction_command(folder)}")

    import cv2

    make_folder(args.output.parent)
    sheet = contact_sheet(entries[: args.num_clips], folder)
    if not cv2.imwrite(str(args.output), sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9]):
        raise UserError(f"cannot write {args.output}; name another --output")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
