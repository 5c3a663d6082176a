"""Make a data directory of your own videos, or pairs of pictures, and a file that says what is done in each.

    python -m data.own_videos --videos my_clips --captions captions.csv --data_dir data/mine

reads a CSV file with the columns `file` (a name in `--videos`) and `caption`, and perhaps `task` and `split` ("train"
or "val"), or JSON Lines with the same keys; `input` and `target` in place of `file` are pairs of pictures. It links
videos as `videos/<id>.<extension>`, pairs as `videos/<id>/0.<extension>` and `1.<extension>`, and writes both
`*_filtered.json`, where each entry's `file` is the name that its video had. Next: `python -m data.video_loader`.
"""

import argparse
import filecmp
import hashlib
import io
import re
import shlex
import shutil
import unicodedata
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


def read_rows(captions: Path) -> list[dict]:
    """The rows of a CSV or JSON Lines file: `caption`, `task` and `split`, "" where the file says nothing, and `files`.

    These are the names of a video or of two pictures; `file` is both as one text, and `place` ("captions.csv, row 2")
    is for messages. Raises UserError where a row is not as described above.
    """
    content = captions.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        lines = io.StringIO(text, newline=None)
        # Spreadsheets may put empty lines before the header, and one that names the separator.
        header = next((line for line in lines if line.strip(",;\t \n") and not line.startswith("sep=")), "")
        if header.lstrip().startswith("{"):
            table = pd.read_json(io.StringIO(text), lines=True, dtype=False)
        else:
            options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
            options |= {"sep": max(",;\t", key=header.count), "na_values": ""}
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # values beyond the header
                table = pd.read_csv(io.StringIO(header.lower().replace(" ", "") + lines.read()), **options)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        how = 'as "CSV UTF-8" (Excel), or with the character set UTF-8 (LibreOffice)'
        raise UserError(f"{captions}, line {line}: this is not UTF-8 text; save it again {how}") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        hint = 'put a caption with commas in "double quotes"'
        raise UserError(f"{captions} cannot be read as CSV or JSON Lines ({one_line(error)}); {hint}") from None
    # Separators at the ends of lines make columns without name and values.
    named = [name for name in map(str, table) if not name.startswith("Unnamed: ") or table[name].notna().any()]
    of_files = ["input", "target"] if "input" in named else ["file"]
    if not {*of_files, "caption"} <= {*named} <= {*of_files, *COLUMNS[1:]}:
        wanted = f"{EXAMPLE_HEADER} (the last two may be left out), or input,target in place of file for two pictures"
        raise UserError(f"{captions}: the columns are {','.join(named)[:100] or 'none'}; name them {wanted}")
    rows = []
    table = table.dropna(how="all").reindex(columns=[*of_files, *COLUMNS[1:]], fill_value="").fillna("")
    for index, values in zip(table.index, table.to_dict("records")):
        row = {column: " ".join(str(values[column]).split()) for column in COLUMNS[1:]}
        row["files"] = [str(values[column]).strip() for column in of_files]
        row["file"], row["place"] = ", ".join(row["files"]), f"{captions}, row {index + 1}"
        if not row["caption"]:
            raise UserError(f"{row['place']}: the caption is empty; write what is done in {row['file'] or 'the video'}")
        if row["split"] not in ("", *SPLITS):
            raise UserError(f"{row['place']}: the split is {row['split']!r}; write train or val, or leave it empty")
        rows.append(row)
    if not rows:
        raise UserError(f"{captions} names no video; write a line for each below the header {EXAMPLE_HEADER}")
    return rows


def plain_name(name: Path | str) -> str:
    """A file's name as people write it: letters composed (NFC), and one space in place of any white space."""
    return " ".join(unicodedata.normalize("NFC", str(name)).split())


def find_sources(rows: list[dict], videos: Path) -> None:
    """Sets each row's `sources`, absolute paths. Raises UserError where one is missing, named twice, or no video."""
    places: dict[tuple[Path, ...], str] = {}
    on_disk: dict[str, Path] = {}  # by their plain names
    for row in rows:
        row["sources"] = []
        for name in row["files"]:
            source = videos / name
            if not source.is_file():
                on_disk = on_disk or {plain_name(path.relative_to(videos)): path for path in videos.rglob("*")}
                source = on_disk.get(plain_name(name), source)
            if not source.is_file():
                raise UserError(f"{row['place']}: there is no file {source}; write its name as it is in --videos")
            row["sources"].append(source.resolve())
        if len(row["sources"]) == 1 and source.suffix.lower() not in VIDEO_EXTENSIONS:
            raise UserError(f"{row['place']}: {source} is none of {', '.join(VIDEO_EXTENSIONS)}; convert it")
        first = places.setdefault(tuple(row["sources"]), row["place"])
        if first != row["place"]:
            raise UserError(f"{row['place']}: {row['file']} is named in {first} too; delete one of the lines")


def make_ids(names_of_files: list[str]) -> list[str]:
    """A safe id for each file: its name without the extension, if that has only letters, digits, "-" and "_".

    Of any other name, and where two files share one, a hash of the whole name makes the id unique.
    """
    names = [plain_name(Path(file).with_suffix("")) for file in names_of_files]
    safe_names = [re.sub(r"[^\w-]+", "_", name)[:60] for name in names]
    shared = Counter(name.lower() for name in safe_names)  # some file systems do not tell A from a
    ids = []
    for file, name, safe in zip(names_of_files, names, safe_names):
        is_unique = safe == name and shared[safe.lower()] == 1
        ids.append(safe if is_unique else f"{safe}-{hashlib.sha256(file.encode()).hexdigest()[:8]}")
    return ids


def assign_splits(rows: list[dict], val_fraction: float) -> None:
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


def check_nothing_is_lost(data_dir: Path, rows: list[dict]) -> None:
    """Raise UserError where the data directory lists other videos (SSv2's), or has another video of the same id."""
    for path in (paths.filtered_annotations_path(data_dir, split) for split in SPLITS):
        if path.is_file() and any("file" not in entry for entry in paths.read_annotations(path)):
            raise UserError(f"{path} lists other videos than your own: name another --data_dir")
    for row in rows:
        for link, source in row["links"].items():
            present = link if link.is_file() else paths.find_video(data_dir, row["id"])
            if present.is_file() and not (present.samefile(source) or filecmp.cmp(present, source, shallow=False)):
                raise UserError(f"{present} is another file than {source}: name another --data_dir, or delete this one")


def parse_args() -> argparse.Namespace:
    parser = cli.CommandParser(
        prog="python -m data.own_videos",
        description=f"Make a data directory of your own videos ({', '.join(VIDEO_EXTENSIONS)}) or pairs of pictures.",
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
    find_sources(rows, args.videos)
    for row, video_id in zip(rows, make_ids([row["file"] for row in rows])):
        row["id"] = video_id
        names = [video_id] if len(row["sources"]) == 1 else [f"{video_id}/0", f"{video_id}/1"]
        row["links"] = {
            paths.video_path(args.data_dir, name, source.suffix.lower()): source
            for name, source in zip(names, row["sources"])
        }
    assign_splits(rows, args.val_fraction)
    check_nothing_is_lost(args.data_dir, rows)

    files.make_folder(args.data_dir / "annotations")  # nothing is written before everything is known to be good
    copied = ""
    for link, source in (item for row in rows for item in row["links"].items()):
        if not link.is_file():
            files.make_folder(link.parent)
            with files.whole_or_absent(link) as partial:
                try:
                    partial.symlink_to(source)
                except OSError:  # exFAT and some network drives have no links
                    shutil.copyfile(source, partial)
                    copied = ", copied, as links cannot be made there"
    for split in SPLITS:
        entries = [
            {"id": row["id"], "label": row["caption"], "task": row["task"] or "unknown", "file": row["file"]}
            for row in rows
            if row["split"] == split
        ]
        files.write_json(paths.filtered_annotations_path(args.data_dir, split), entries)
        print(f"{split}: {len(entries)} videos in {args.data_dir}{copied}")
    print(f"Next: {paths.command('video_loader', args.data_dir)}")
    if len(rows[0]["files"]) == 2:  # a video of two frames
        variables = f"DATA_DIR={shlex.quote(str(args.data_dir))} INPUT_FRAME_IDX=0 TARGET_FRAME_IDX=1"
        print(f"Then: {variables} bash train_instruct_pix2pix.sh")


if __name__ == "__main__":
    cli.run_command(main)
