"""Make a data directory of your own videos and a file that says what is done in each.

    python -m data.own_videos --videos my_clips --captions captions.csv --data_dir data/mine

reads a CSV file with the columns `file` (a name in `--videos`) and `caption`, and perhaps `task` and `split` ("train"
or "val"), or JSON Lines with the same keys. It links the videos as `videos/<id>.<extension>` and writes
`train_filtered.json` and `val_filtered.json`, where each entry's `file` is the name that its video had. Next:
`python -m data.video_loader`.
"""

import argparse
import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

from data import cli, files, paths
from data.cli import UserError
from data.dataset import sampling_rank
from data.paths import SPLITS, VIDEO_EXTENSIONS

COLUMNS = ("file", "caption", "task", "split")
REQUIRED_COLUMNS = {"file", "caption"}
EXAMPLE_HEADER = "file,caption,task,split"
EXAMPLE_LINE = '{"file": "clip.mp4", "caption": "pushing a cup from left to right"}'
SPLIT_SEED = 42


# The captions.


def read_rows(captions: Path) -> list[dict[str, str]]:
    """The rows of a CSV or JSON Lines file: each with COLUMNS, "" where the file says nothing, and its `place`.

    The place ("captions.csv, line 2") is for messages. Raises UserError where a row is not as described above.
    """
    try:
        text = captions.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{captions} is not UTF-8 text; save it as CSV in UTF-8") from None
    parse = parse_json_lines if text.lstrip().startswith("{") else parse_csv
    rows = [
        {column: " ".join((row.get(column) or "").split()) for column in COLUMNS} | {"place": place}
        for place, row in parse(captions, text)
    ]
    if not rows:
        raise UserError(f"{captions} names no video; write a line for each below the header {EXAMPLE_HEADER}")
    for row in rows:
        if not row["caption"]:
            raise UserError(f"{row['place']}: the caption is empty; write what is done in {row['file'] or 'the video'}")
        if row["split"] not in ("", *SPLITS):
            raise UserError(f"{row['place']}: the split is {row['split']!r}; write train or val, or leave it empty")
    return rows


def parse_csv(captions: Path, text: str) -> list[tuple[str, dict]]:
    """(place, row) of each row of a CSV text."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    rows = []
    try:
        check_columns(reader.fieldnames or [], str(captions))
        for row in reader:
            place = f"{captions}, line {reader.line_num}"
            if None in row:  # where the reader puts what has no column
                raise UserError(f'{place} has more values than columns; put a caption with commas in "double quotes"')
            rows.append((place, row))
    except csv.Error as error:
        raise UserError(f"{captions}, line {reader.line_num} is not CSV ({error}); fix it") from None
    return rows


def parse_json_lines(captions: Path, text: str) -> list[tuple[str, dict]]:
    """(place, row) of each row of a JSON Lines text."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{captions}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(value, str | None) for value in row.values()):
            raise UserError(f"{place} is not such a JSON object of strings: {EXAMPLE_LINE}")
        check_columns(list(row), place)
        rows.append((place, row))
    return rows


def check_columns(columns: list[str], place: str) -> None:
    """Raise UserError where a column is missing or unknown."""
    if not REQUIRED_COLUMNS <= set(columns) <= set(COLUMNS):
        named = ",".join(columns)[:100] or "none"
        raise UserError(f"{place}: the columns are {named}; name them {EXAMPLE_HEADER} (the last two may be left out)")


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


def make_ids(files: list[str]) -> list[str]:
    """A safe id for each file: its name without the extension, if that has only letters, digits, "-" and "_".

    Of any other name, and where two files share one, a hash of the whole name makes the id unique.
    """
    names = [str(Path(file).with_suffix("")) for file in files]
    safe_names = [re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60] for name in names]
    shared = Counter(name.lower() for name in safe_names)  # some file systems do not tell A from a
    return [
        safe
        if safe == name and shared[safe.lower()] == 1
        else f"{safe}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
        for file, name, safe in zip(files, names, safe_names)
    ]


def assign_splits(rows: list[dict[str, str]], val_fraction: float) -> dict[str, list[dict[str, str]]]:
    """The rows of each split: as their `split` says, and `val_fraction` of the others, at least one, in "val".

    Which ones follows from their `id`. Raises UserError where there are several videos, but none in one of the splits.
    """
    chosen = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    others = sorted((row for row in rows if not row["split"]), key=lambda row: sampling_rank(SPLIT_SEED, row["id"]))
    num_val = round(val_fraction * len(others))
    if not chosen["val"]:
        num_val = max(num_val, 1)
    if not chosen["train"]:
        num_val = min(num_val, len(others) - 1)
    chosen["val"] += others[:num_val]
    chosen["train"] += others[num_val:]
    for split in SPLITS:
        if len(rows) > 1 and not chosen[split]:
            raise UserError(
                f"no video is left for {split}: write {split} in the column split of one, or leave it empty"
            )
    return chosen


# The command.


def check_lists_are_own(data_dir: Path) -> None:
    """Raise UserError where the data directory lists other videos, Something-Something's, which would be lost."""
    for path in (paths.filtered_annotations_path(data_dir, split) for split in SPLITS):
        if path.is_file() and any("file" not in entry for entry in paths.read_annotations(path)):
            raise UserError(f"{path} lists other videos than your own: name another --data_dir")


def check_id_is_free(data_dir: Path, video_id: str, source: Path) -> None:
    """Raise UserError where the data directory has another video of this id, whose frames may be there too."""
    present = paths.find_video(data_dir, video_id)
    if present.is_file() and not present.samefile(source):
        raise UserError(f"{present} is another video than {source}: name another --data_dir, or delete this one")


def link_video(data_dir: Path, video_id: str, source: Path) -> None:
    """Make `videos/<id>.<extension>` a link to a video, if it is not one yet."""
    link = paths.video_path(data_dir, video_id, source.suffix.lower())
    if not link.is_file():
        with files.whole_or_absent(link) as partial:
            partial.symlink_to(source)


def to_entry(row: dict[str, str]) -> dict[str, str]:
    return {"id": row["id"], "label": row["caption"], "task": row["task"] or "unknown", "file": row["file"]}


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
    chosen = assign_splits(rows, args.val_fraction)
    check_lists_are_own(args.data_dir)
    for row, source in zip(rows, sources):
        check_id_is_free(args.data_dir, row["id"], source)

    for folder in ("videos", "annotations"):  # nothing is written before everything is known to be good
        files.make_folder(args.data_dir / folder)
    for row, source in zip(rows, sources):
        link_video(args.data_dir, row["id"], source)
    for split in SPLITS:
        path = paths.filtered_annotations_path(args.data_dir, split)
        paths.write_annotations(path, [to_entry(row) for row in chosen[split]])
    print(f"{len(chosen['train'])} videos for training and {len(chosen['val'])} for validation in {args.data_dir}")
    print(f"Next: python -m data.video_loader --data_dir {args.data_dir}")


if __name__ == "__main__":
    cli.run_command(main)
