"""Render clips of a hand acting on household objects, in Something-Something V2's layout.

    python -m demo.make_clips

writes `data/demo/annotations/train.json`, `validation.json` and `videos/<id>.webm`: VP9, 320 x 240, 12 frames per
second, 24 to 72 frames. Then `python -m data.dataset --data_dir data/demo` filters them like SSv2.

The same command writes the same bytes with the same library versions. A second run renders only missing clips. How
hands and objects move is described at the top of `demo/renderer/actions.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from data.cli import CommandParser, UserError, available_cores, number, run_command
from data.dataset import TASK_TEMPLATES, match_tasks
from data.files import make_folder, only_one, remove_leftovers, write_json
from data.paths import filtered_annotations_path, read_annotations, video_path
from data.video_loader import extract_missing
from demo.renderer.clip import clip_id, plan_clip
from demo.renderer.video import render_to_files

RENDERER_VERSION = 3  # raised whenever the pictures change, so that old and new clips never mix in one folder
ANNOTATION_NAMES = {"train": "train.json", "val": "validation.json"}
SETTINGS_NAME = "rendered_clips.json"


def make_clips(output_dir: Path, num_train_clips: int, num_val_clips: int, seed: int, num_workers: int) -> None:
    """Render the clips that are missing in `output_dir`, then write the annotations of all asked for."""
    claim_folder(output_dir, seed)
    with only_one(output_dir, "rendering"):
        remove_leftovers(output_dir / "videos")
        counts = {"train": num_train_clips, "val": num_val_clips}
        wanted = [(split, index) for split, count in counts.items() for index in range(count)]
        missing = [clip for clip in wanted if not video_path(output_dir, clip_id(*clip)).is_file()]
        rendered = render_to_files(output_dir, seed, missing, num_workers)
        for _ in tqdm(rendered, total=len(missing), desc="rendering", unit="clip", disable=not missing):
            pass
        for split, count in counts.items():
            entries = [plan_clip(seed, split, index).annotation for index in range(count)]
            write_json(output_dir / "annotations" / ANNOTATION_NAMES[split], entries)
    print(
        f"{len(missing)} clips rendered, {len(wanted) - len(missing)} were there already: {output_dir} now "
        f"lists {num_train_clips} training and {num_val_clips} validation clips.\n"
        f"Next: python -m data.dataset --data_dir {output_dir}"
    )


def make_validation_clips(data_dir: Path, count: int, seed: int, resolution: int) -> Path:
    """Make a data directory of validation clips alone, with their frames, and return it."""
    make_clips(data_dir, 0, count, seed, available_cores())
    entries = match_tasks(read_annotations(data_dir / "annotations" / ANNOTATION_NAMES["val"]), list(TASK_TEMPLATES))
    for split, chosen in (("train", []), ("val", entries)):
        write_json(filtered_annotations_path(data_dir, split), chosen)
    extract_missing(data_dir, [[], entries], [resolution], available_cores())
    return data_dir


def claim_folder(output_dir: Path, seed: int) -> None:
    """Make `output_dir`. Raises UserError where it holds anything but clips of this seed and renderer."""
    settings_path = output_dir / SETTINGS_NAME
    settings = {"seed": seed, "renderer_version": RENDERER_VERSION}
    if output_dir.exists() and not settings_path.is_file():
        if not output_dir.is_dir() or any(output_dir.iterdir()):
            raise UserError(f"{output_dir} was not made by this command: choose another --output_dir")
    elif settings_path.is_file() and json.loads(settings_path.read_bytes()) != settings:
        raise UserError(f"{output_dir} holds clips of another --seed or version: choose another --output_dir")
    for folder in ("annotations", "videos"):
        make_folder(output_dir / folder)
    write_json(settings_path, settings)


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m demo.make_clips",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    clips = number(at_least=0, at_most=999_999)
    add("--output_dir", type=Path, default=Path("data/demo"), help="data directory to make")
    add("--num_train_clips", type=clips, default=240, help="number of training clips")
    add("--num_val_clips", type=clips, default=60, help="number of validation clips")
    add("--seed", type=number(at_least=0, at_most=2**63), default=42, help="other seeds give other clips")
    workers = number(at_least=1, at_most=1024)
    add("--num_workers", type=workers, default=available_cores(), help="processes that render")
    return parser.parse_args()


def main() -> None:
    make_clips(**vars(parse_args()))


if __name__ == "__main__":
    run_command(main)
