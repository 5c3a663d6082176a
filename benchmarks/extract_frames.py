"""How fast frames are extracted, side by side: a plain loader, the ffmpeg program, and `data.video_loader`.

    python -m benchmarks.extract_frames
    python -m benchmarks.extract_frames --quick

renders 240-pixel VP9 clips, then extracts all their frames at 96x96 and 128x128 with every alternative, one after
the other and the whole turn again, on all cores. It prints each one's median time, the ratios, where our own
time goes, and how far the pictures differ. It ends with an error if the alternatives did not write the same
frames.

- plain loader: what most repositories do. A thread pool; a video is decoded once for each size
  (cv2.VideoCapture), each frame resized by OpenCV and saved by Pillow with its defaults. It runs in this process,
  so its start-up costs nothing.
- ffmpeg: one process for each clip, one thread each, as many at once as there are cores; both sizes from one
  decode, resized by area averaging, PNGs with the program's defaults. Skipped where the program is absent.
- ffmpeg, fast PNGs: the same with zlib's level 1 and the cheapest filter, as somebody would tune it.
- ours: the command `python -m data.video_loader` from its start to its end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.commands import PROJECT
from data.cli import CommandParser, UserError, available_cores, number, run_command
from data.paths import (
    SPLITS,
    filtered_annotations_path,
    frame_path,
    frames_dir,
    read_annotations,
    video_path,
    write_annotations,
)

RESOLUTIONS = (96, 128)
PLAIN, FFMPEG, FFMPEG_FAST, OURS = "plain loader", "ffmpeg", "ffmpeg, fast PNGs", "ours"
# Mean over all pixels and colors, of 255. OpenCV's conversion of decoded frames alone is 1.1 too dark.
LARGEST_MEAN_DIFFERENCE = 3.0


@dataclass(frozen=True)
class Clips:
    """The clips of a run: the folder they lie in, and the filtered annotation entries of each split."""

    folder: Path
    entries: dict[str, list[dict]]

    @property
    def ids(self) -> list[str]:
        """The ids of all clips, each once."""
        return [entry["id"] for split in SPLITS for entry in self.entries[split]]

    def video(self, video_id: str) -> Path:
        """The file of one clip."""
        return video_path(self.folder, video_id)


# The alternatives. Each writes frames_96x96/ and frames_128x128/ into an empty folder.


def extract_plainly(clips: Clips, output_dir: Path, num_workers: int) -> None:
    """The plain loader: a thread for each core, a decode for each size."""
    import cv2
    from PIL import Image

    def extract(video_id: str, resolution: int) -> None:
        folder = frames_dir(output_dir, resolution)
        (folder / video_id).mkdir(parents=True)
        capture = cv2.VideoCapture(str(clips.video(video_id)))
        index = 0
        while True:
            decoded, image = capture.read()
            if not decoded:
                break
            image = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            Image.fromarray(image).save(frame_path(folder, video_id, index))
            index += 1
        capture.release()

    with ThreadPoolExecutor(num_workers) as pool:
        jobs = [pool.submit(extract, video_id, size) for video_id in clips.ids for size in RESOLUTIONS]
        for job in jobs:
            job.result()


def extract_with_ffmpeg(clips: Clips, output_dir: Path, num_workers: int, png_options: tuple[str, ...] = ()) -> None:
    """The ffmpeg program: a process for each clip, a decode for both sizes."""
    labels = [f"[size{resolution}]" for resolution in RESOLUTIONS]
    scalers = [f"[in{size}]scale={size}:{size}:flags=area[size{size}]" for size in RESOLUTIONS]
    graph = ";".join([f"split={len(labels)}" + "".join(f"[in{size}]" for size in RESOLUTIONS), *scalers])

    def extract(video_id: str) -> None:
        command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(clips.video(video_id))]
        command += ["-filter_complex_threads", "1", "-filter_complex", graph]
        for resolution, label in zip(RESOLUTIONS, labels, strict=True):
            folder = frames_dir(output_dir, resolution) / video_id
            folder.mkdir(parents=True)
            command += ["-map", label, "-threads", "1", "-fps_mode", "passthrough", *png_options]
            command += ["-start_number", "0", str(folder / "%05d.png")]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(extract, clips.ids))


def extract_with_ffmpeg_fast(clips: Clips, output_dir: Path, num_workers: int) -> None:
    """The ffmpeg program with its fastest useful PNG settings."""
    extract_with_ffmpeg(clips, output_dir, num_workers, ("-compression_level", "1", "-pred", "up"))


def extract_with_our_command(clips: Clips, output_dir: Path, num_workers: int) -> None:
    """`python -m data.video_loader` on a data directory whose videos are links to the clips."""
    (output_dir / "annotations").mkdir()
    (output_dir / "videos").symlink_to((clips.folder / "videos").resolve())
    for split in SPLITS:
        write_annotations(filtered_annotations_path(output_dir, split), clips.entries[split])
    command = [sys.executable, "-m", "data.video_loader", "--data_dir", str(output_dir), "--num_workers"]
    command += [str(num_workers), "--resolutions", *map(str, RESOLUTIONS)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)


# Where our time goes.


def time_stages(paths: list[Path], folder: Path) -> dict[str, float]:
    """Seconds that each stage of our extraction takes for some videos, one stage after the other, in one process."""
    from data.video_decoder import decode_video, encode_png, make_resizer

    seconds = dict.fromkeys(("decode", "resize", "PNG", "write"), 0.0)
    for path in paths:
        resizers = [make_resizer(resolution) for resolution in RESOLUTIONS]
        start = time.perf_counter()
        frames = list(decode_video(path))
        decoded = time.perf_counter()
        images = [resize(frame) for resize in resizers for frame in frames]
        resized = time.perf_counter()
        files = [encode_png(image) for image in images]
        encoded = time.perf_counter()
        (folder / path.stem).mkdir()
        for index, content in enumerate(files):
            with open(folder / path.stem / f"{index:05d}.png", "wb") as file:
                file.write(content)
        written = time.perf_counter()
        for stage, first, last in (
            ("decode", start, decoded),
            ("resize", decoded, resized),
            ("PNG", resized, encoded),
            ("write", encoded, written),
        ):
            seconds[stage] += last - first
    return seconds


def time_stages_on_all_cores(clips: Clips, folder: Path, num_workers: int) -> dict[str, float]:
    """Seconds of each stage, shared by all cores: each core's share of the videos, one process for each."""
    paths = [clips.video(video_id) for video_id in clips.ids]
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        shares = [pool.submit(time_stages, paths[core::num_workers], folder) for core in range(num_workers)]
        results = [share.result() for share in shares]
    return {stage: sum(result[stage] for result in results) / num_workers for stage in results[0]}


# The comparison.


def count_frames(clips: Clips, output_dir: Path) -> dict[tuple[int, str], int]:
    """The number of frames of each size and clip."""
    return {
        (size, video_id): len(list((frames_dir(output_dir, size) / video_id).glob("*.png")))
        for size in RESOLUTIONS
        for video_id in clips.ids
    }


def size_of_frames(output_dir: Path) -> int:
    """The bytes in all frames."""
    return sum(path.stat().st_size for path in output_dir.glob("frames_*/*/*.png"))


def mean_difference(clips: Clips, one: Path, other: Path) -> float:
    """The mean absolute difference (of 255) between two folders' frames: every tenth frame of every clip."""
    import cv2
    import numpy as np

    differences = []
    for size in RESOLUTIONS:
        for video_id in clips.ids:
            for path in sorted((frames_dir(one, size) / video_id).iterdir())[::10]:
                pictures = [cv2.imread(str(frames_dir(root, size) / video_id / path.name)) for root in (one, other)]
                differences.append(np.abs(pictures[0].astype(int) - pictures[1]).mean())
    return float(np.mean(differences))


def prepare_clips(folder: Path, num_clips: int, num_workers: int) -> Clips:
    """Render the clips that are missing, filter them like SSv2, and read what was selected."""
    from demo.make_clips import make_clips

    num_val = max(1, num_clips // 10)
    make_clips(folder, num_clips - num_val, num_val, 42, num_workers)
    command = [sys.executable, "-m", "data.dataset", "--data_dir", str(folder)]
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    entries = {split: read_annotations(filtered_annotations_path(folder, split)) for split in SPLITS}
    return Clips(folder, entries)


def find_alternatives() -> dict[str, Callable[[Clips, Path, int], None]]:
    """The alternatives that this machine has, by name."""
    alternatives = {PLAIN: extract_plainly}
    if shutil.which("ffmpeg"):
        alternatives |= {FFMPEG: extract_with_ffmpeg, FFMPEG_FAST: extract_with_ffmpeg_fast}
    else:
        print("The ffmpeg program is not installed here: left out.")
    return alternatives | {OURS: extract_with_our_command}


def cpu_seconds() -> float:
    """The processor time that this process and its ended children have used; other programs hardly change it."""
    return sum(os.times()[:4])


def run_rounds(
    clips: Clips, alternatives: dict[str, Callable], work_dir: Path, rounds: int, num_workers: int
) -> Iterator[tuple[str, float, float]]:
    """Run all alternatives in turn, `rounds` times, and yield each run's name, seconds and CPU seconds.

    The frames of the last round stay, in `work_dir / name`. Raises UserError if a run's frame counts differ
    from those of the first.
    """
    expected = None
    for _ in range(rounds):
        for name, extract in alternatives.items():
            output_dir = work_dir / name
            shutil.rmtree(output_dir, ignore_errors=True)
            output_dir.mkdir()
            start, cpu_start = time.perf_counter(), cpu_seconds()
            extract(clips, output_dir, num_workers)
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
            counts = count_frames(clips, output_dir)
            expected = expected or counts
            wrong = [key for key in expected if counts[key] != expected[key] or not counts[key]]
            if wrong:
                size, video_id = wrong[0]
                raise UserError(
                    f"{name} wrote {counts[wrong[0]]} frames of clip {video_id} at {size} pixels, the first"
                    f" alternative {expected[wrong[0]]}; {len(wrong)} such differences"
                )
            yield name, seconds, cpu


def print_table(runs: dict[str, list[tuple[float, float]]], num_frames: int, work_dir: Path) -> None:
    """Medians of time and processor time, rates, file sizes, and how many times as long as ours each one takes."""
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in runs.items()
    }
    print("\n| alternative | median s | of | frames/s | times ours | CPU s | times ours | MB of PNGs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (seconds, cpu) in medians.items():
        every = " ".join(f"{value:.2f}" for value, _ in runs[name])
        ratio, cpu_ratio = seconds / medians[OURS][0], cpu / medians[OURS][1]
        megabytes = size_of_frames(work_dir / name) / 1e6
        print(
            f"| {name} | {seconds:.2f} | {every} | {num_frames / seconds:.0f} | {ratio:.2f} | {cpu:.2f}"
            f" | {cpu_ratio:.2f} | {megabytes:.0f} |"
        )


def print_stages(stages: dict[str, float], ours: float, num_frames: int, num_workers: int) -> None:
    """Where our time goes; `decode` alone is the floor."""
    rest = {"start-up and the rest": ours - sum(stages.values())}
    print("\n| stage of ours, on all cores | s | share | frames/s a core |\n|---|---|---|---|")
    for stage, seconds in (stages | rest).items():
        rate = f"{num_frames / num_workers / seconds:.0f}" if stage in stages else ""
        note = " (the floor)" if stage == "decode" else ""
        print(f"| {stage}{note} | {seconds:.2f} | {seconds / ours:.0%} | {rate} |")


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m benchmarks.extract_frames",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--clips_dir", type=Path, help="folder for the clips, kept (default: a temporary one)")
    clips, count = number(at_least=4), number(at_least=1)
    parser.add_argument("--num_clips", type=clips, default=110, help="clips to render; the filter drops 1 in 20")
    parser.add_argument("--rounds", type=count, default=3, help="how often each alternative runs")
    parser.add_argument("--num_workers", type=count, default=available_cores(), help="processes or threads")
    parser.add_argument("--quick", action="store_true", help="12 clips, 2 rounds: under a minute")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.quick:
        args.num_clips, args.rounds = min(args.num_clips, 12), min(args.rounds, 2)
    with tempfile.TemporaryDirectory(prefix="extract_frames_") as temporary:
        clips = prepare_clips(args.clips_dir or Path(temporary) / "clips", args.num_clips, args.num_workers)
        compare(clips, Path(temporary), args.rounds, args.num_workers)


def compare(clips: Clips, work_dir: Path, rounds: int, num_workers: int) -> None:
    """Run everything and print the tables."""
    from tqdm import tqdm

    alternatives = find_alternatives()
    runs = {name: [] for name in alternatives}
    with tqdm(total=rounds * len(alternatives), unit="run", desc="extracting") as bar:
        for name, seconds, cpu in run_rounds(clips, alternatives, work_dir, rounds, num_workers):
            runs[name].append((seconds, cpu))
            bar.set_postfix_str(f"{name}: {seconds:.2f} s", refresh=False)
            bar.update()
    num_frames = sum(count_frames(clips, work_dir / OURS).values()) // len(RESOLUTIONS)
    print(f"{len(clips.ids)} clips, {num_frames} frames, each at {RESOLUTIONS} pixels, {num_workers} processes")
    print_table(runs, num_frames, work_dir)
    (work_dir / "stages").mkdir()
    stages = time_stages_on_all_cores(clips, work_dir / "stages", num_workers)
    print_stages(stages, statistics.median(seconds for seconds, _ in runs[OURS]), num_frames, num_workers)
    print("\nAll alternatives wrote the same number of frames of every clip. Mean difference of ours to:")
    for name in alternatives:
        if name == OURS:
            continue
        difference = mean_difference(clips, work_dir / OURS, work_dir / name)
        print(f"- {name}: {difference:.2f} of 255")
        if difference > LARGEST_MEAN_DIFFERENCE:
            raise UserError(f"the pictures of {name} differ from ours by more than {LARGEST_MEAN_DIFFERENCE} of 255")


if __name__ == "__main__":
    run_command(main)
