"""Trains and samples a list of settings with several seeds, and compares each with the first one, pair by pair.

    python -m benchmarks.study progress
    python -m benchmarks.study horizons --seeds 0

Training and sampling are the repository's own commands. A run that is finished is not made again, so an interrupted
study goes on where it was stopped. To study something else, add it to STUDIES.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from data.cli import CommandParser, UserError, number, run_command
from data.files import make_folder, remove, write_json
from data.paths import SPLITS, filtered_annotations_path, read_filtered_annotations
from data.prompts import action_progress
from pecn.scores import compare, gain_in_words

TRAIN, SAMPLE = "train_instruct_pix2pix.py", "sample_from_pix2pix.py"
CLIP_SEED = 20_260  # of the rendered clips; 42 is demo.make_clips' own, the base model's training has another
SAMPLING_SEED = 0  # the same noise and the same starts for all settings

# What can be studied.


@dataclass(frozen=True)
class Setting:
    """What one row of a table was trained and sampled with. {estimates} and {constant} stand for files of progress."""

    name: str
    training: str  # flags of train_instruct_pix2pix.py
    sampling: str  # flags of sample_from_pix2pix.py


@dataclass(frozen=True)
class Study:
    """Settings in groups, each of which is compared with the first of its group, and the flags that all share."""

    training: str
    sampling: str
    groups: dict[str, list[Setting]]


FRAMES = {
    "20 -> 21": "--input_frame_idx 20 --horizon 1",
    "20 -> 25": "--input_frame_idx 20 --horizon 5",
    "any -> +5": "--input_frame_idx any --horizon 5",
}
PROGRESS = {"none": "False", "clip's length": "True", "estimated": "{estimates}", "constant": "{constant}"}
FROM_20, FROM_ANY = "--input_frame_idx 20 --horizon", "--input_frame_idx any --horizon"

STUDIES = {
    # Do progress prompts help? The mean of 4 predictions of a single step is the expected frame, at the least cost.
    "progress": Study(
        training="--max_train_steps 100 --train_batch_size 16 --learning_rate 3e-4 --lr_scheduler cosine",
        sampling="--num_inference_steps 1 --image_guidance_scale 1 --num_predictions 4",
        groups={
            title: [Setting(name, f"{frames} --add_progress {told}", frames) for name, told in PROGRESS.items()]
            for title, frames in FRAMES.items()
        },
    ),
    # What does training on any start give, and what does one model for ten horizons lose?
    "horizons": Study(
        training="--max_train_steps 800 --train_batch_size 8 --learning_rate 3e-4 --lr_scheduler cosine"
        " --lr_warmup_steps 30 --add_progress True --random_flip",
        sampling="--num_inference_steps 8 --scheduler euler --image_guidance_scale 1 --num_predictions 8",
        groups={
            f"20 -> {20 + horizon}": [
                Setting(f"frame 20, {horizon} ahead", f"{FROM_20} {horizon}", f"{FROM_20} {horizon}"),
                Setting(f"any start, {horizon} ahead", f"{FROM_ANY} {horizon}", f"{FROM_20} {horizon}"),
                Setting("any start, 1 to 10 ahead", f"{FROM_ANY} 1-10", f"{FROM_20} {horizon}"),
            ]
            for horizon in (1, 5, 10)
        },
    ),
}
QUICK_CLIPS, QUICK_ESTIMATION = 9, ["--max_train_steps=2"]
QUICK_TRAINING, QUICK_SAMPLING = "--max_train_steps 2 --train_batch_size 2", "--num_predictions 2"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    add, count = parser.add_argument, number(at_least=1)
    add("study", choices=list(STUDIES))
    add("--work_dir", type=Path, default=Path("outputs/study"), help="clips and runs go here (%(default)s)")
    add("--data_dir", type=Path, help="a prepared data directory, such as data/sthv2 (renders clips)")
    add("--num_train_clips", type=count, default=400, help="rendered clips to train on (%(default)s)")
    add("--num_val_clips", type=count, default=220, help="rendered clips to predict (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=96, help="side of the frames in pixels (%(default)s)")
    add("--pretrained_model_name_or_path", default="demo/base_model", help="base model (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (0 1 2)")
    more = "more flags of {}, which replace the study's, as in {}"
    add("--training_options", default="", help=more.format(TRAIN, '--training_options="--max_train_steps 50"'))
    add("--sampling_options", default="", help=more.format(SAMPLE, '--sampling_options="--num_predictions 1"'))
    add("--keep_models", action="store_true", help="keep trained models and predicted pictures, not only scores")
    add("--quick", action="store_true", help="the first group, 9 clips, 2 steps, one seed: only shows that it works")
    args = parser.parse_args(arguments)
    if args.quick:
        args.num_train_clips, args.num_val_clips, args.seeds = QUICK_CLIPS, QUICK_CLIPS, args.seeds[:1]
        args.training_options = f"{QUICK_TRAINING} {args.training_options}"
        args.sampling_options = f"{QUICK_SAMPLING} {args.sampling_options}"
    return args


# The repository's own commands.


def call(words: Sequence[object], log: Path) -> None:
    """Runs a Python command of the repository, its output in `log`. Raises UserError with its last line if it fails."""
    command = [sys.executable, *map(str, words)]
    make_folder(log.parent)
    with open(log, "a", encoding="utf-8") as file:
        print(shlex.join(command), file=file, flush=True)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file) as child:
            try:
                status = child.wait()
            except KeyboardInterrupt:  # Ctrl-C reaches the command too: training saves a checkpoint
                child.wait()
                raise
    if status:
        last_line = log.read_text(encoding="utf-8").rstrip().splitlines()[-1]
        raise UserError(f"{last_line.removeprefix('error: ')} (see {log}; the study goes on from here)")


def render_clips(args: argparse.Namespace) -> Path:
    """Renders clips, takes all that belong to the three tasks, and extracts their frames; what is there stays."""
    data_dir, log = args.work_dir / f"clips_{args.num_train_clips}_{args.num_val_clips}", args.work_dir / "clips.log"
    counts = {"train": args.num_train_clips, "val": args.num_val_clips}
    clips = [f"--num_{split}_clips={count}" for split, count in counts.items()]
    entries = [f"--{split}_samples_per_task={count}" for split, count in counts.items()]
    call(["-m", "demo.make_clips", f"--output_dir={data_dir}", f"--seed={CLIP_SEED}", *clips], log)
    call(["-m", "data.dataset", f"--data_dir={data_dir}", *entries], log)
    call(["-m", "data.video_loader", f"--data_dir={data_dir}", f"--resolutions={args.resolution}"], log)
    return data_dir


def estimate_progress(args: argparse.Namespace, data_dir: Path, path: Path) -> None:
    """Writes the estimates of all clips, each made by a network that has not seen it."""
    model = f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}"
    flags = [f"--data_dir={data_dir}", f"--output_file={path}", f"--resolution={args.resolution}", model]
    call(["-m", "pecn.progress", *flags, *(QUICK_ESTIMATION if args.quick else [])], path.with_suffix(".log"))


def write_constant(data_dir: Path, path: Path) -> None:
    """Writes a file of estimates that says the training clips' median at frame 20 for every frame of every clip."""
    entries = {split: read_filtered_annotations(data_dir, split) for split in SPLITS}
    at_20 = [action_progress(20, entry["num_frames"]) for entry in entries["train"] if entry["num_frames"] > 20]
    median = statistics.median_low(at_20)
    write_json(
        path,
        {
            split: {entry["id"]: dict.fromkeys(map(str, range(entry["num_frames"])), median) for entry in of_split}
            for split, of_split in entries.items()
        },
    )


# The runs.


@dataclass(frozen=True)
class Run:
    """One training and one sampling of its model. `folder` is named after all that shapes the model."""

    folder: Path
    training: list[str]
    sampling: list[str]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def samples(self) -> Path:
        return self.folder / f"samples_{digest(*self.sampling)}"

    @property
    def metrics(self) -> Path:
        return self.samples / "metrics.json"


def digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=5).hexdigest()


def prepare_runs(args: argparse.Namespace, data_dir: Path) -> dict[tuple[str, str], list[Run]]:
    """The runs of each (group, setting), one for each seed; makes the files of progress that they need."""
    study = STUDIES[args.study]
    base_model = Path(args.pretrained_model_name_or_path)  # or a name on the hub, which has no files here
    times = [f"{path}: {path.stat().st_mtime_ns}" for path in sorted(base_model.glob("*/*"))]
    shared = digest(
        *(filtered_annotations_path(data_dir, split).read_text(encoding="utf-8") for split in SPLITS), *times
    )
    files = {name: args.work_dir / f"{name}_{shared}.json" for name in ("estimates", "constant")}
    runs = defaultdict(list)
    for group, settings in list(study.groups.items())[: 1 if args.quick else None]:
        for setting in settings:
            if "{estimates}" in setting.training and not files["estimates"].is_file():
                print("estimating progress", flush=True)
                estimate_progress(args, data_dir, files["estimates"])
            if "{constant}" in setting.training and not files["constant"].is_file():
                write_constant(data_dir, files["constant"])
            words = shlex.split(f"--mixed_precision auto {study.training} {setting.training} {args.training_options}")
            training = [word.format(**files) for word in words]
            training += [f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}"]
            training += [f"--train_data_dir={data_dir}", f"--resolution={args.resolution}"]
            sampling = shlex.split(f"{study.sampling} {setting.sampling} {args.sampling_options}")
            sampling += [f"--data_dir={data_dir}", "--num_samples=all", f"--seed={SAMPLING_SEED}"]
            for seed in args.seeds:
                seeded = [*training, f"--seed={seed}"]
                runs[group, setting.name].append(Run(args.work_dir / digest(shared, *seeded), seeded, sampling))
    return runs


def execute(runs: Sequence[Run], keep_models: bool) -> None:
    """Trains and samples what is not finished yet; a model that several settings share is trained once."""
    of_model = defaultdict(list)
    for run in runs:
        of_model[run.folder].append(run)
    for same_model in tqdm(of_model.values(), unit="model"):
        missing = [run for run in same_model if not run.metrics.is_file()]
        first = same_model[0]
        if missing and not (first.model / "model_index.json").is_file():
            flags = ["--num_validation_images=0", "--report_to=none", "--resume_from_checkpoint=latest"]
            call([TRAIN, *first.training, f"--output_dir={first.model}", *flags], first.folder / "train.log")
        for run in missing:
            flags = [f"--model_dir={run.model}", f"--output_dir={run.samples}"]
            call([SAMPLE, *run.sampling, *flags], run.folder / "sample.log")
        if not keep_models:
            remove(first.model)
            for run in missing:
                remove(run.samples / "samples")


# Their scores.


def read_scores(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.json of the pairs in which something moves."""
    return [row for row in json.loads(run.metrics.read_text(encoding="utf-8"))["samples"] if row["moving_share"]]


def tabulate(runs: dict[tuple[str, str], list[Run]], seeds: Sequence[int]) -> str:
    """A line for each setting: its figures where something moves, and its paired difference to its group's first."""
    lines, first_gains = [], {}
    for (group, name), of_seeds in runs.items():
        scores = dict(zip(seeds, map(read_scores, of_seeds)))
        rows = [row for of_seed in scores.values() for row in of_seed]
        if not rows:
            raise UserError(f"{group}, {name}: nothing moves in any pair")
        way = "expected" if "expected" in rows[0] else "sample"
        gains = pd.DataFrame(
            {
                seed: {row["video_id"]: row[way]["psnr"] - row["copy"]["psnr"] for row in of_seed}
                for seed, of_seed in scores.items()
            }
        )
        line = {
            "": group if group not in first_gains else "",
            "setting": name,
            "pairs": len(gains),
            "sharpness": f"{statistics.median(row['sample']['sharpness'] for row in rows):.2f}",
            "good frames": f"{statistics.mean(row['sample']['good_frame'] for row in rows):.0%}",
            f"PSNR of {way} - copy": f"{gains.mean(axis=None):+.2f}",
        }
        base = first_gains.setdefault(group, gains)
        if not gains.index.equals(base.index):
            raise UserError(f"{group}, {name}: other pairs than those of the group's first setting")
        line["difference, dB"], line["each seed"] = "", ""
        if gains is not base:
            line["difference, dB"] = gain_in_words(compare(gains.mean(axis=1), base.mean(axis=1)))
            line["each seed"] = " ".join(f"{difference:+.2f}" for difference in (gains - base).mean())
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def main(args: argparse.Namespace) -> None:
    data_dir = args.data_dir or render_clips(args)
    runs = prepare_runs(args, data_dir)
    by_seed = [run for of_one_seed in zip(*runs.values()) for run in of_one_seed]  # whole comparisons come early
    execute(by_seed, args.keep_models)
    print(tabulate(runs, args.seeds))
    print(
        "where something moves; difference: pair by pair to the first setting of the group, ±: 95% interval over pairs"
    )
    print("another training can differ by more than that: compare the differences of each seed")
    if args.data_dir is None:
        print("These are rendered clips, not Something-Something V2: their actions fill the whole clip.")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
