"""Extract every frame of the selected videos as square PNGs, and note each video's number of frames.

    python -m data.video_loader --data_dir data/sthv2 --resolutions 96 128

reads `videos/<id>.webm` (or .mp4, .mov, .avi, .mkv) for the entries of `train_filtered.json` and `val_filtered.json`
(made by `python -m data.dataset` or `data.own_videos`), writes `frames_96x96/<id>/00000.png`, ... and
`frames_128x128/<id>/...`, and adds `num_frames` to the entries. Each video is decoded once for all sizes, one frame in
memory at a time. A video's folder exists only when it is whole, so a run can be stopped at any moment, and the next one
does what is missing.
"""

import argparse
import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path

from data import cli, files, paths
from data.cli import UserError
from data.paths import SPLITS, VIDEO_EXTENSIONS

LOG_NAME = "frames_extraction.log"


@dataclass(frozen=True)
class Result:
    """What became of a video: its number of frames, or the kind of failure and its details."""

    video_id: str
    num_frames: int | None = None
    failure: str | None = None
    details: str = ""


# What is to be done.


def count_frames(folder: Path) -> int:
    """The number of frames in a video's folder, or 0 if it does not hold exactly frames 0 to n-1."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    expected = {paths.frame_path(folder.parent, folder.name, index).name for index in range(len(names))}
    return len(names) if names == expected else 0


def plan(entries: list[dict], frames_folders: list[Path]) -> tuple[list[Result], list[str]]:
    """Split the entries into videos whose frames are all there and the ids of those that are to be decoded.

    Frames are all there when the folder of every size holds frames 0 to n-1, n being the entry's `num_frames` if it
    has one. Otherwise all sizes are written, since they must come from the same version of the video.
    """
    done, to_decode = [], []
    for entry in entries:
        counts = {count_frames(folder / entry["id"]) for folder in frames_folders}
        num_frames = entry.get("num_frames") or max(counts)
        if num_frames and counts == {num_frames}:
            done.append(Result(entry["id"], num_frames))
        else:
            to_decode.append(entry["id"])
    return done, to_decode


# The worker processes.


def start_worker() -> None:
    """Make a worker leave Ctrl-C to the parent, and end at once if the parent is killed."""

    def exit_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def extract_video(video_id: str, data_dir: Path, frames_folders: dict[int, Path]) -> Result:
    """Decode a video and write its folder of frames of each size; a video that cannot be decoded is no exception."""
    from data.video_decoder import VideoError, write_frames  # PyAV and OpenCV, which the workers alone need

    try:
        with contextlib.ExitStack() as stack:
            folders = {
                resolution: stack.enter_context(files.whole_or_absent(folder / video_id))
                for resolution, folder in frames_folders.items()
            }
            return Result(video_id, write_frames(paths.find_video(data_dir, video_id), folders))
    except VideoError as error:
        failure, details = error.args
        return Result(video_id, failure=failure, details=details)


def run_workers(
    extract: Callable[[str], Result], video_ids: list[str], num_workers: int, is_retry: bool = False
) -> Iterator[Result]:
    """Call `extract` for each video in worker processes and yield the results as they come.

    When a worker dies (out of memory, say) nobody can tell which of the videos in work it was, so each of these is
    tried once more, alone; one that ends its worker again is reported, and the others go on.
    """
    waiting = deque(video_ids)
    while waiting:
        running = {}
        pool = ProcessPoolExecutor(min(num_workers, len(waiting)), get_context("spawn"), initializer=start_worker)
        try:
            while waiting or running:
                while waiting and len(running) < 2 * num_workers:
                    future = pool.submit(extract, waiting[0])
                    running[future] = waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del running[future]
                    yield result
        except BrokenProcessPool:
            pass  # a worker has died, and with it what is in `running`
        except BaseException:  # Ctrl-C or a full disk, perhaps: the workers end at once
            for worker in active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        for video_id in running.values():
            if is_retry:
                details = "its worker process died twice, perhaps for lack of memory; try --num_workers 1"
                yield Result(video_id, failure="worker died", details=details)
            else:
                yield from run_workers(extract, [video_id], 1, is_retry=True)


# Annotations, log, and the command.


def record_num_frames(data_dir: Path, results: list[Result]) -> None:
    """Set `num_frames` in the filtered annotations; entries of failed videos stay, without it."""
    num_frames = {result.video_id: result.num_frames for result in results}
    for split in SPLITS:
        path = paths.filtered_annotations_path(data_dir, split)
        entries = paths.read_annotations(path)
        updated = [entry | {"num_frames": num_frames.get(entry["id"], entry.get("num_frames"))} for entry in entries]
        for entry in updated:
            if entry["num_frames"] is None:
                del entry["num_frames"]
        if updated != entries:
            paths.write_annotations(path, updated)


def write_log(data_dir: Path, num_selected: int, results: list[Result]) -> str:
    """Write the log: a summary and one line for each failed video. Returns the summary.

    It describes the state of the data, not this run, so it is the same however many runs it took.
    """
    failed = sorted((result for result in results if result.failure), key=lambda result: result.video_id)
    num_whole = len(results) - len(failed)
    summary = f"{num_selected} videos selected: {num_whole} have all their frames, {len(failed)} failed"
    if failed:
        kinds = sorted(Counter(result.failure for result in failed).items())
        summary += f" ({', '.join(f'{kind}: {count}' for kind, count in kinds)})"
    if len(results) < num_selected:
        summary += f", {num_selected - len(results)} not done yet"
    lines = [f"{result.video_id}: {result.failure}: {result.details}" for result in failed]
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
    selected = {entry["id"]: entry for entries in splits for entry in entries}
    with files.only_one(args.data_dir / "annotations", "extraction"):
        extract_missing(args.data_dir, list(selected.values()), args.resolutions, args.num_workers)


def extract_missing(data_dir: Path, entries: list[dict], resolutions: list[int], num_workers: int) -> None:
    """Extract the entries' videos, show a progress bar, and record the outcome, also if interrupted."""
    from tqdm import tqdm

    start = time.perf_counter()
    folders = {resolution: paths.frames_dir(data_dir, resolution) for resolution in resolutions}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
        files.remove_leftovers(folder)
    done, to_decode = plan(entries, list(folders.values()))
    if to_decode and not any(path.suffix in VIDEO_EXTENSIONS for path in (data_dir / "videos").glob("*")):
        raise UserError(f"no videos in {data_dir / 'videos'}: {paths.DOWNLOAD_HINT} and put its .webm files there")
    extract = functools.partial(extract_video, data_dir=data_dir, frames_folders=folders)
    extracted: list[Result] = []
    try:
        with contextlib.closing(run_workers(extract, to_decode, num_workers)) as finished:
            for result in tqdm(finished, total=len(entries), initial=len(done), unit="video", desc="extracting"):
                extracted.append(result)
    finally:
        for folder in folders.values():
            files.remove_leftovers(folder)
        results = done + extracted
        record_num_frames(data_dir, results)
        print(write_log(data_dir, len(entries), results))
        counts = [result.num_frames for result in extracted if result.num_frames]
        seconds = time.perf_counter() - start
        rate = f"{sum(counts)} frames in {seconds:.1f} s ({sum(counts) / seconds:.0f} frames/s)"
        print(f"This run: {len(counts)} videos extracted, {len(done)} were there already; {rate}")
        if any(result.failure for result in results):
            print(f"The failed videos, each with its reason: {data_dir / LOG_NAME}")
    if not any(result.num_frames for result in results):
        raise UserError(f"not one of {len(entries)} videos has frames; {data_dir / LOG_NAME} says why")


if __name__ == "__main__":
    cli.run_command(main)
