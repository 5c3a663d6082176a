"""Make a data directory of your own videos and a file that says what is done in each.

    python -m data.own_videos --videos my_clips --captions captions.csv --data_dir data/mine

reads a CSV file with the columns `file` (a name in `--videos`) and `caption`, and perhaps `task` and `split` ("train"
or "val"), or JSON Lines with the same keys. It links the videos as `videos/<id>.<extension>` and writes
`train_filtered.json` and `val_filtered.json`, where each entry's `file` is the name that its video had. Next:
`python -m data.video_loader`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd

from data import cli, files, paths
from data.cli import UserError, one_line
from data.clips import derive_seed
from data.paths import SPLITS, VIDEO_EXTENSIONS

COLUMNS = ("file", "caption", "task", "split")
EXAMPLE_HEADER = ",".join(COLUMNS)
SPLIT_SEED = 42

# The captions.


def read_rows(captions: Path) -> list[dict[str, str]]:
    """The rows of a CSV or JSON Lines file: each with COLUMNS, "" where the file says nothing, and its `place`.

    The place ("captions.csv, row 2") is for messages. Raises UserError where a row is not as described above.
    """
    try:
        if captions.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            table = pd.read_json(captions, lines=True, dtype=False, encoding="utf-8-sig")
        else:
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # values beyond the header
                options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
                table = pd.read_csv(captions, encoding="utf-8-sig", **options)
    except UnicodeDecodeError:
        raise UserError(f"{captions} is not UTF-8 text; save it as CSV in UTF-8") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        hint = 'put a caption with commas in "double quotes"'
        raise UserError(f"{captions} cannot be read as CSV or JSON Lines ({one_line(error)}); {hint}") from None
    if not {"file", "caption"} <= set(table.columns) <= set(COLUMNS):
        named = ",".join(map(str, table.columns))[:100] or "none"
        raise UserError(
            f"{captions}: the columns are {named}; name them {EXAMPLE_HEADER} (the last two may be left out)"
        )
    rows = []
    table = table.reindex(columns=COLUMNS, fill_value="").fillna("")
    for number, values in enumerate(table.to_dict("records"), start=1):
        row = {column: " ".join(str(value).split()) for column, value in values.items()}
        row["place"] = f"{captions}, row {number}"
        if not row["caption"]:
            raise UserError(f"{row['place']}: the caption is empty; write what is done in {row['file'] or 'the video'}")
        if row["split"] not in ("", *SPLITS):
            raise UserError(f"{row['place']}: the split is {row['split']!r}; write train or val, or leave it empty")
        rows.append(row)
    if not rows:
        raise UserError(f"{captions} names no video; write a line for each below the header {EXAMPLE_HEADER}")
    return rows


def find_sources(rows: list[dict[str, str]], videos: Path) -> list[Path]:
    """The absolute path of each row's video. Raises UserError where one is missing, named twice, or no video."""
    places: dict[Path, str] = {}
    for row in rows:
        source = videos / row["file"]
        if not source.is_file():
            raise UserError(f"{row['place']}: there is no file {source}; write its name as it is in --videos")
        if source.suffix.lower() not in VIDEO_EXTENSIONS:
            raise UserError(f"{row['place']}: {source} is none of {', '.join(VIDEO_EXTENSIONS)}; convert it")
        source = source.resolve()
        if source in places:
            raise UserError(f"{row['place']}: {row['file']} is named in {places[source]} too; delete one of the lines")
        places[source] = row["place"]
    return list(places)


# Ids and splits.


def make_ids(names_of_files: list[str]) -> list[str]:
    """A safe id for each file: its name without the extension, if that has only letters, digits, "-" and "_".

    Of any other name, and where two files share one, a hash of the whole name makes the id unique.
    """
    names = [str(Path(file).with_suffix("")) for file in names_of_files]
    safe_names = [re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60] for name in names]
    shared = Counter(name.lower() for name in safe_names)  # some file systems do not tell A from a
    return [
        safe
        if safe == name and shared[safe.lower()] == 1
        else f"{safe}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
        for file, name, safe in zip(names_of_files, names, safe_names)
    ]


def assign_splits(rows: list[dict[str, str]], val_fraction: float) -> None:
    """Sets the `split` of rows that have none: `val_fraction` of them become "val", at least one video in all.

    Which ones follows from their `id`. Raises UserError where there are several videos, but none in one of the splits.
    """
    others = sorted((row for row in rows if not row["split"]), key=lambda row: derive_seed(SPLIT_SEED, row["id"]))
    needs_one = all(row["split"] != "val" for row in rows)
    num_val = min(max(round(val_fraction * len(others)), needs_one), len(rows) - 1)
    for place, row in enumerate(others):
        row["split"] = "val" if place < num_val else "train"
    for split in SPLITS:
        if len(rows) > 1 and all(row["split"] != split for row in rows):
            raise UserError(f"no video is left for {split}: write {split} in the column split of one")


# The command.


def check_nothing_is_lost(data_dir: Path, rows: list[dict[str, str]], sources: list[Path]) -> None:
    """Raise UserError where the data directory lists other videos (SSv2's), or has another video of the same id."""
    for path in (paths.filtered_annotations_path(data_dir, split) for split in SPLITS):
        if path.is_file() and any("file" not in entry for entry in paths.read_annotations(path)):
            raise UserError(f"{path} lists other videos than your own: name another --data_dir")
    for row, source in zip(rows, sources):
        present = paths.find_video(data_dir, row["id"])
        if present.is_file() and not present.samefile(source):
            raise UserError(f"{present} is another video than {source}: name another --data_dir, or delete this one")


def parse_args() -> argparse.Namespace:
    parser = cli.CommandParser(
        prog="python -m data.own_videos",
        description=f"Make a data directory of your own videos ({', '.join(VIDEO_EXTENSIONS)}), which are linked.",
    )
    columns = f"CSV with the header {EXAMPLE_HEADER} (the last two may be left out), or JSON Lines"
    fraction, share = cli.number(float, above=0, below=1), "share for validation where no split is given"
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="the folder of your videos")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help=columns)
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="the data directory to make")
    parser.add_argument("--val_fraction", type=fraction, default=0.1, help=f"{share} (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = read_rows(args.captions)
    sources = find_sources(rows, args.videos)
    for row, video_id in zip(rows, make_ids([row["file"] for row in rows])):
        row["id"] = video_id
    assign_splits(rows, args.val_fraction)
    check_nothing_is_lost(args.data_dir, rows, sources)

    for folder in ("videos", "annotations"):  # nothing is written before everything is known to be good
        files.make_folder(args.data_dir / folder)
    for row, source in zip(rows, sources):
        link = paths.video_path(args.data_dir, row["id"], source.suffix.lower())
        if not link.is_file():
            with files.whole_or_absent(link) as partial:
                partial.symlink_to(source)
    for split in SPLITS:
        entries = [
            {"id": row["id"], "label": row["caption"], "task": row["task"] or "unknown", "file": row["file"]}
            for row in rows
            if row["split"] == split
        ]
        files.write_json(paths.filtered_annotations_path(args.data_dir, split), entries)
        print(f"{split}: {len(entries)} videos in {args.data_dir}")
    print(f"Next: {paths.command('video_loader', args.data_dir)}")


if __name__ == "__main__":
    cli.run_command(main)
