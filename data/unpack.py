"""Unpack Something-Something V2 (SSv2) as it is downloaded: a folder with its zip of labels and its archive's parts.

    python -m data.unpack --archives downloads --data_dir data/sthv2

writes the labels to `annotations/`, and the videos that `python -m data.dataset` has chosen to `videos/<id>.webm`.
"""

import gzip
import re
import shlex
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from data import cli, files, paths

PARTS = [f"20bn-something-something-v2-{number:02d}" for number in range(100)]
LABELS = re.compile(r"(something-something-v2-)?(train|validation|test|labels)\.json")


def find_sources(archives: Path) -> dict[str, tuple[Path | zipfile.Path, int]]:
    """{name: (where it is, its size)} of all files in a folder, its subfolders and their zips."""
    found = {}
    for path in sorted([*archives.glob("*"), *archives.glob("*/*")]):
        if zipfile.is_zipfile(path):  # not one that is cut
            for member in zipfile.ZipFile(path).infolist():
                found[Path(member.filename).name] = zipfile.Path(path, member.filename), member.file_size
        elif path.is_file():
            found[path.name] = path, path.stat().st_size
    return found


class JoinedFiles(list):
    """Open files that are read as if they were one; those that are read to their end leave the list."""

    def read(self, size: int) -> bytes:
        while not (block := self[0].read(size)) and len(self) > 1:
            self.pop(0)
        return block


def unpack_videos(sources: dict[str, tuple], data_dir: Path, missing: set[str] | None) -> None:
    """Write the videos whose ids are `missing` (None: all); those written leave it. UserError names a bad part."""
    num_parts = [name in sources for name in PARTS].index(False)  # up to the first gap
    parts, lost = [sources[name] for name in PARTS[:num_parts]], PARTS[num_parts]
    if not parts:
        raise cli.UserError(f"{lost} is not in the folder of --archives: {paths.DOWNLOAD_HINT}")
    sizes, written = [size for _, size in parts], []
    stream = JoinedFiles(path.open("rb") for path, _ in parts)
    try:
        with tqdm.wrapattr(stream, "read", total=sum(sizes), desc="unpacking") as shown:
            tar = tarfile.open(fileobj=gzip.GzipFile(fileobj=shown), mode="r|")
            while missing != set() and (member := tar.next()):
                tar.members.clear()  # tarfile would keep all 220,847
                video_id, extension = Path(member.name).stem, Path(member.name).suffix  # its folders are not used
                wanted = video_id in missing if missing else not paths.find_video(data_dir, video_id).is_file()
                if wanted and member.isfile() and extension == ".webm" and paths.is_safe_id(video_id):
                    with files.whole_or_absent(paths.video_path(data_dir, video_id)) as path, open(path, "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
                    written.append(video_id)
                    (missing or set()).discard(video_id)
            # tarfile takes a damaged header for the end, but only zeros follow the true one.
            if missing != set() and any(map(any, iter(lambda: tar.fileobj.read(tarfile.RECORDSIZE), b""))):
                raise tarfile.ReadError
        print(f"{len(written)} videos were unpacked")
        return
    except EOFError:
        gap = any(name in sources for name in PARTS[num_parts:])
        problem = f"{lost} is missing" if gap else f"{PARTS[num_parts - 1]} is cut, or {lost} is missing"
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error):
        short = [name for name, size in zip(PARTS, sizes[:-1]) if size < max(sizes) - num_parts]  # split makes equals
        problem = f"{short[0]} is cut" if short else f"{PARTS[num_parts - len(stream)]} or the one before is damaged"
        if written:
            files.remove(paths.video_path(data_dir, written.pop()))  # its damage may show only in what follows
    raise cli.UserError(f"{problem}; {len(written)} videos were unpacked: download it and repeat this command")


def main() -> None:
    parser = cli.CommandParser(prog="python -m data.unpack", description="Unpack SSv2's labels and chosen videos.")
    parser.add_argument("--archives", type=Path, required=True, metavar="DIR", help="the folder of what you downloaded")
    parser.add_argument("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="every video, not only those that data.dataset has chosen")
    args = parser.parse_args()
    sources, annotations = find_sources(args.archives), args.data_dir / "annotations"
    if not sources:
        raise cli.UserError(f"there is nothing in {args.archives}: name the folder of what you downloaded")
    for folder in (annotations, args.data_dir / "videos"):
        files.make_folder(folder)
    for name in filter(LABELS.fullmatch, sources):
        if not (annotations / name).exists():
            files.write_file(annotations / name, sources[name][0].read_text(encoding="utf-8"))
    if not args.all and not paths.filtered_annotations_path(args.data_dir, "train").exists():
        again = f"{paths.command('unpack', args.data_dir)} --archives {shlex.quote(str(args.archives))}"
        print(f"No videos are chosen yet. Next: {paths.command('dataset', args.data_dir)} && {again}")
        return
    splits = [] if args.all else [paths.read_filtered_annotations(args.data_dir, split) for split in paths.SPLITS]
    ids = {entry["id"] for entries in splits for entry in entries}
    missing = {video_id for video_id in ids if not paths.find_video(args.data_dir, video_id).is_file()}
    if args.all or missing:
        unpack_videos(sources, args.data_dir, missing or None)
    print(f"{len(missing)} chosen videos are still missing. Next: {paths.command('video_loader', args.data_dir)}")


if __name__ == "__main__":
    cli.run_command(main)
