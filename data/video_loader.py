"""Extract every frame of the selected videos as square PNGs, and note each video's number of frames.

    python -m data.video_loader --data_dir data/sthv2 --resolutions 96 128

reads `videos/<id>.webm` for the entries of `train_filtered.json` and `val_filtered.json` (made by
`python -m data.dataset`), writes `frames_96x96/<id>/00000.png`, ... and `frames_128x128/<id>/...`, and adds
`num_frames` to the entries. Each video is decoded once for all sizes, one frame in memory at a time. A video's folder
exists only when it is whole, so a run can be stopped at any moment, and the next one does what is missing.
"""

import argparse
import contextlib
import errno
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path

from data import layout
from data.layout import SPLITS, UserError
from data.video_decoder import Job, Result, extract_video

LOG_NAME = "frames_extraction.log"


# What is to be done.


def count_frames(folder: Path) -> int:
    """The number of frames in a video's folder, or 0 if it does not hold exactly frames 0 to n-1."""
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
    except FileNotFoundError:
        return 0
    expected = {layout.frame_path(folder.parent, folder.name, index).name for index in range(len(names))}
    return len(names) if names == expected else 0


def plan(entries: list[dict], data_dir: Path, resolutions: tuple[int, ...]) -> tuple[list[Result], list[Job]]:
    """Split the entries into videos whose frames are all there and those that are to be decoded.

    Frames are all there when the folder of every size holds frames 0 to n-1, n being the entry's `num_frames` if it
    has one. If the folders contradict each other, all sizes are written again.
    """
    done, jobs = [], []
    for entry in entries:
        video_id = entry["id"]
        counts = [count_frames(layout.frames_dir(data_dir, resolution) / video_id) for resolution in resolutions]
        kept = {resolution: count for resolution, count in zip(resolutions, counts) if count}
        num_frames = entry.get("num_frames") or next(iter(kept.values()), None)
        if any(count != num_frames for count in kept.values()):
            kept = {}
        missing = tuple(resolution for resolution in resolutions if resolution not in kept)
        if missing:
            jobs.append(Job(video_id, data_dir, missing, resolutions, num_frames if kept else None))
        else:
            done.append(Result(video_id, num_frames))
    return done, jobs


def find_missing(jobs: list[Job], data_dir: Path) -> tuple[list[Job], list[Result]]:
    """Separate the jobs whose video file exists from those that have none; a misnamed file is pointed out."""
    names = layout.list_videos(data_dir) if jobs else set()
    if names is None:
        raise UserError(f"no videos in {data_dir / 'videos'}: {layout.DOWNLOAD_HINT} and put its .webm files there")
    by_stem = {Path(name).stem.casefold(): name for name in sorted(names, reverse=True)}
    present, missing = [], []
    for job in jobs:
        expected = f"{job.video_id}.webm"
        similar = by_stem.get(job.video_id.casefold()) or by_stem.get(expected.casefold())
        if expected in names:
            present.append(job)
        elif similar:
            details = f"found {similar!r}; if it is this video, in videos/: mv {similar!r} {expected!r}"
            missing.append(Result(job.video_id, None, "misnamed", details))
        else:
            missing.append(Result(job.video_id, None, "missing", f"there is no videos/{expected}"))
    return present, missing


# The worker processes.


def start_worker() -> None:
    """Make a worker leave Ctrl-C to the parent, and end at once if the parent is killed."""

    def exit_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def run_jobs(jobs: list[Job], num_workers: int, is_retry: bool = False) -> Iterator[Result]:
    """Extract videos in worker processes and yield the results as they come.

    When a worker dies (out of memory, say) nobody can tell which of the videos in work it was, so each of these is
    tried once more, alone; one that ends its worker again is reported, and the others go on.
    """
    waiting = deque(jobs)
    while waiting:
        running = {}
        pool = ProcessPoolExecutor(min(num_workers, len(waiting)), get_context("spawn"), initializer=start_worker)
        try:
            while waiting or running:
                while waiting and len(running) < 2 * num_workers:
                    future = pool.submit(extract_video, waiting[0])
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
        for job in running.values():
            if is_retry:
                details = "its worker process died twice, perhaps for lack of memory; try --num_workers 1"
                yield Result(job.video_id, failure="worker died", details=details)
            else:
                yield from run_jobs([job], 1, is_retry=True)


# Annotations, log, and the command.


def record_num_frames(data_dir: Path, results: list[Result]) -> None:
    """Set `num_frames` in the filtered annotations; entries of failed videos stay, without it."""
    num_frames = {result.video_id: result.num_frames for result in results}
    for split in SPLITS:
        path = layout.filtered_annotations_path(data_dir, split)
        entries = layout.read_annotations(path)
        updated = [entry | {"num_frames": num_frames.get(entry["id"], entry.get("num_frames"))} for entry in entries]
        for entry in updated:
            if entry["num_frames"] is None:
                del entry["num_frames"]
        if updated != entries:
            layout.write_annotations(path, updated)


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
    layout.write_file(data_dir / LOG_NAME, "\n".join([summary, *lines]) + "\n")
    return summary


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args() -> argparse.Namespace:
    parser = layout.CommandParser(
        prog="python -m data.video_loader",
        description="Extract every frame of the selected videos and add num_frames to the filtered annotations."
        f" Videos that fail are listed with a reason in {LOG_NAME} in the data directory; the exit status is 0 all the"
        " same. Run it again to do what is missing.",
    )
    size, count = layout.number(at_least=1, at_most=4096), layout.number(at_least=1)
    parser.add_argument("--data_dir", type=Path, default=layout.DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--resolutions", type=size, nargs="+", default=[96, 128], help="in pixels (default: 96 128)")
    parser.add_argument("--num_workers", type=count, default=available_cores(), help="processes (default: all cores)")
    parser.add_argument("--limit", type=count, help="only the first N entries of each split")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    resolutions = tuple(dict.fromkeys(args.resolutions))
    splits = [layout.read_filtered_annotations(args.data_dir, split)[: args.limit] for split in SPLITS]
    selected = {entry["id"]: entry for entries in splits for entry in entries}
    try:
        with layout.only_one(args.data_dir / "annotations", "extraction"):
            extract(args.data_dir, list(selected.values()), resolutions, args.num_workers)
    except OSError as error:
        hint = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot write {error.filename or args.data_dir}: {error.strerror}{hint}") from None


def extract(data_dir: Path, entries: list[dict], resolutions: tuple[int, ...], num_workers: int) -> None:
    """Extract the entries' videos, show a progress bar, and record the outcome, also if interrupted."""
    from tqdm import tqdm

    start = time.perf_counter()
    folders = [layout.frames_dir(data_dir, resolution) for resolution in resolutions]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        layout.remove_leftovers(folder)
    done, jobs = plan(entries, data_dir, resolutions)
    jobs, missing = find_missing(jobs, data_dir)
    extracted: list[Result] = []
    try:
        with contextlib.closing(run_jobs(jobs, num_workers)) as finished:
            first = len(done) + len(missing)
            for result in tqdm(finished, total=len(entries), initial=first, unit="video", desc="extracting"):
                extracted.append(result)
    finally:
        for folder in folders:
            layout.remove_leftovers(folder)
        results = [*done, *missing, *extracted]
        record_num_frames(data_dir, results)
        print(write_log(data_dir, len(entries), results))
        counts = [result.num_frames for result in extracted if result.num_frames]
        seconds = time.perf_counter() - start
        rate = f"{sum(counts)} frames in {seconds:.1f} s ({sum(counts) / seconds:.0f} frames/s)"
        print(f"This run: {len(counts)} videos extracted, {len(done)} were there already; {rate}")
        if any(result.failure for result in results):
            print(f"The failed videos, each with its reason: {data_dir / LOG_NAME}")


if __name__ == "__main__":
    layout.run_command(main)
