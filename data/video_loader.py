"""Extract every frame of the selected videos as square PNGs, and note each video's number of frames.

    python -m data.video_loader --data_dir data/sthv2 --resolutions 96 128

reads `videos/<id>.webm` (.mp4, .m4v, .mov, .avi, .mkv) for the entries of `train_filtered.json` and `val_filtered.json`
(made by `python -m data.dataset` or `data.own_videos`), writes `frames_96x96/<id>/00000.png`, ... and
`frames_128x128/<id>/...`, and adds `num_frames` to the entries. Each video is decoded once for all sizes, one frame in
memory at a time. A video's folder exists only when it is whole, so a run can be stopped at any moment, and the next one
does what is missing.
"""

import argparse
import contextlib
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from data import cli, files, paths
from data.cli import UserError
from data.paths import SPLITS, VIDEO_EXTENSIONS
from data.video_decoder import VideoError, write_frames

LOG_NAME = "frames_extraction.log"


def count_frames(folder: Path) -> int:
    """The number of frames in a video's folder, or 0 if it does not hold exactly frames 0 to n-1."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    expected = {paths.frame_path(folder.parent, folder.name, index).name for index in range(len(names))}
    return len(names) if names == expected else 0


def count_present(entries: list[dict], frames_folders: list[Path]) -> dict[str, int]:
    """{id: number of frames} of the videos whose frames are all there.

    They are when the folder of every size holds frames 0 to n-1, n being the entry's `num_frames` if it has one.
    Otherwise all sizes are written, since they must come from the same version of the video.
    """
    present = {}
    for entry in entries:
        counts = {count_frames(folder / entry["id"]) for folder in frames_folders}
        num_frames = entry.get("num_frames") or max(counts)
        if num_frames and counts == {num_frames}:
            present[entry["id"]] = num_frames
    return present


def extract_video(video_id: str, data_dir: Path, frames_folders: dict[int, Path]) -> tuple[int, set[str]]:
    """Decode a video and write its folder of frames of each size; returns and raises what `write_frames` does."""
    with contextlib.ExitStack() as stack:
        folders = {
            resolution: stack.enter_context(files.whole_or_absent(folder / video_id))
            for resolution, folder in frames_folders.items()
        }
        return write_frames(paths.find_video(data_dir, video_id), folders)


def record_num_frames(data_dir: Path, counts: dict[str, int], failures: dict[str, tuple[str, str]]) -> None:
    """Set `num_frames` in the filtered annotations; entries of failed videos stay, without it."""
    for split in SPLITS:
        path = paths.filtered_annotations_path(data_dir, split)
        entries = paths.read_annotations(path)
        for entry in entries:
            if entry["id"] in counts:
                entry["num_frames"] = counts[entry["id"]]
            elif entry["id"] in failures:
                entry.pop("num_frames", None)
        files.write_json(path, entries)


def write_log(data_dir: Path, num_selected: int, num_whole: int, failures: dict[str, tuple[str, str]]) -> str:
    """Write the log: a summary and one line for each failed video. Returns the summary.

    It describes the state of the data, not this run, so it is the same however many runs it took.
    """
    num_of_kind = Counter(kind for kind, _ in failures.values())
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(num_of_kind.items()))
    summary = f"{num_selected} videos selected: {num_whole} have all their frames, {len(failures)} failed"
    summary += f" ({kinds})" if failures else ""
    if not_done := num_selected - num_whole - len(failures):
        summary += f", {not_done} not done yet"
    lines = [f"{video_id}: {kind}: {details}" for video_id, (kind, details) in sorted(failures.items())]
    files.write_file(data_dir / LOG_NAME, "\n".join([summary, *lines]) + "\n")
    return summary


def parse_args() -> argparse.Namespace:
    parser = cli.CommandParser(
        prog="python -m data.video_loader",
        description="Extract every frame of the selected videos and add num_frames to the filtered annotations."
        f" Videos that fail are listed with a reason in {LOG_NAME} in the data directory; the exit status is 0 unless"
        " all fail. Run it again to do what is missing.",
    )
    size, count = cli.number(at_least=1, at_most=4096), cli.number(at_least=1)
    parser.add_argument("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--resolutions", type=size, nargs="+", default=[96, 128], help="in pixels (default: 96 128)")
    parser.add_argument("--num_workers", type=count, default=cli.available_cores(), help="default: all cores")
    parser.add_argument("--limit", type=count, help="only the first N entries of each split")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    splits = [paths.read_filtered_annotations(args.data_dir, split)[: args.limit] for split in SPLITS]
    with files.only_one(args.data_dir / "annotations", "extraction"):
        extract_missing(args.data_dir, splits, args.resolutions, args.num_workers)


def extract_missing(data_dir: Path, splits: list[list[dict]], resolutions: list[int], num_workers: int) -> None:
    """Extract the videos of both splits' entries, show a progress bar, record the outcome, also if interrupted."""
    start = time.perf_counter()
    entries = list({entry["id"]: entry for split in splits for entry in split}.values())
    folders = {resolution: paths.frames_dir(data_dir, resolution) for resolution in resolutions}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
        files.remove_leftovers(folder)
    present = count_present(entries, list(folders.values()))
    missing = [entry["id"] for entry in entries if entry["id"] not in present]
    videos = {path.name for path in (data_dir / "videos").glob("*")}
    kinds = (*VIDEO_EXTENSIONS, "")  # a pair of pictures is a folder
    found = {id_: [id_ + extension for extension in kinds if id_ + extension in videos] for id_ in missing}
    absent = {id_ for id_ in missing if not found[id_]}
    if absent and len(absent) == len(entries):
        hint = paths.hint_to_move_videos(data_dir, f"{paths.DOWNLOAD_HINT} and unpack it (data.unpack)")
        raise UserError(f"no videos in {data_dir / 'videos'}: {hint}")
    if len(absent) > len(entries) / 10:
        hint = paths.hint_to_move_videos(data_dir, f"choose from the others: {paths.command('dataset', data_dir)}")
        cli.warn(f"{len(absent)} of {len(entries)} chosen videos are not in {data_dir / 'videos'}; {hint}")
    if all(entry["id"] in absent for entry in splits[1]):
        cli.warn(f"not one validation video is in {data_dir / 'videos'}: training will have none to validate on")
    if several := [names for names in found.values() if len(names) > 1]:
        cli.warn(f"{len(several)} ids have several videos: {several[0][0]} is used, not {', '.join(several[0][1:])}")
    counts: dict[str, int] = {}
    failures: dict[str, tuple[str, str]] = {}  # kind and details
    remarks: dict[str, set[str]] = {}
    pool = ThreadPoolExecutor(num_workers)  # FFmpeg and OpenCV leave Python's lock to others while they work
    try:
        futures = {pool.submit(extract_video, video_id, data_dir, folders): video_id for video_id in missing}
        with tqdm(total=len(entries), initial=len(present), unit="video", desc="extracting") as bar:
            for future in as_completed(futures):
                try:
                    counts[futures[future]], remarks[futures[future]] = future.result()
                except VideoError as error:
                    failures[futures[future]] = error.args
                except UserError as error:  # of a picture
                    failures[futures[future]] = ("unreadable", str(error))
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        record_num_frames(data_dir, present | counts, failures)
        print(write_log(data_dir, len(entries), len(present) + len(counts), failures))
        num_frames, seconds = sum(counts.values()), time.perf_counter() - start
        rate = f"{num_frames} frames in {seconds:.1f} s ({num_frames / seconds:.0f} frames/s)"
        print(f"This run: {len(counts)} videos extracted, {len(present)} were there already; {rate}")
        for remark in sorted(set().union(*remarks.values())):
            ids = sorted(video_id for video_id, said in remarks.items() if remark in said)
            print(f"{remark}: {len(ids)} of them ({', '.join(ids[:5])}{', …' if ids[5:] else ''})")
        if failures:
            print(f"The failed videos, each with its reason: {data_dir / LOG_NAME}")
    if not present and not counts:
        raise UserError(f"not one of {len(entries)} videos has frames; {data_dir / LOG_NAME} says why")


if __name__ == "__main__":
    cli.run_command(main)
