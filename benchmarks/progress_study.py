"""Does it help to tell the model how much of an action is done, and does it take an oracle?

    python -m benchmarks.progress_study

fine-tunes without progress prompts and with those of each source on the same clips, for the same steps, with the same
seeds: the `oracle` knows each clip's length, the `constant` is the training median for every clip, and `estimated` is
what pecn.progress sees in the frames so far. For frame 20 -> 21, 20 -> 25, and any frame to that 5 later it predicts
held-out clips and compares the sources pair by pair. It renders its clips itself, with a seed that neither
`demo.make_clips` nor the base model's training uses. On Something-Something V2:

    python -m benchmarks.progress_study --data_dir data/sthv2 --resolution 128 --max_train_steps 3750 \
        --learning_rate 5e-6 --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --training_options="--mixed_precision fp16"

Training and sampling are the repository's own commands. A run that is finished is not repeated, so an interrupted
study goes on where it stopped. The table is printed; `results.json` in the work directory has every pair's scores.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shlex
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.commands import SAMPLE, TRAIN, call, render_clips
from data.cli import CommandParser, UserError, number, run_command
from data.clips import (
    ANY,
    DEFAULT_INPUT_FRAME_IDX,
    ESTIMATED,
    NO_PROGRESS,
    ORACLE,
    FrameChoice,
    choose_samples,
    describe_left_out,
    load_frame_pairs,
)
from data.files import make_folder, write_file
from data.paths import filtered_annotations_path, frames_dir, read_annotations
from pecn.sampling_options import add_sampling_options, number_of_samples, sampling_options

DEMO_MODEL = Path("demo/base_model")
CLIP_SEED = 20_260  # of the rendered clips; 42 is demo.make_clips' own, the base model's training has another
SPLIT_SEED = 0  # of choosing held-out pairs, and of sampling, which draws the starts
CONSTANT = "constant"
SOURCES = [NO_PROGRESS, ORACLE, CONSTANT, ESTIMATED]
ENOUGH_PAIRS = 200
# For the demo's base model: the mean of 4 predictions of a single step is the expected frame, at the least cost.
DEMO_OPTIONS = {
    "training_options": "--lr_scheduler cosine",
    "num_inference_steps": 1,
    "image_guidance_scale": 1.0,
    "num_predictions": 4,
}
QUICK = {
    "work_dir": Path("outputs/progress_study_quick"),
    "target_frame_idx": [25],
    "any_start_horizon": [5],
    "estimator_steps": 4,
    "seeds": [0],
    "num_train_clips": 6,
    "num_val_clips": 6,
    "max_train_steps": 4,
    "train_batch_size": 4,
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.progress_study",
        usage="%(prog)s [options]",
        description="Measure whether progress prompts help.",
    )
    add, count, index = parser.add_argument, number(at_least=1), number(at_least=0)
    add("--quick", action="store_true", help="a small run that only shows that everything works")
    add("--work_dir", type=Path, default=Path("outputs/progress_study"), help="runs and results go here (%(default)s)")
    add("--pretrained_model_name_or_path", default=str(DEMO_MODEL), help="base model (%(default)s)")
    add("--data_dir", type=Path, help="a prepared data directory, such as data/sthv2 (renders clips)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=96, help="side of the frames in pixels (%(default)s)")
    add("--num_train_clips", type=count, default=400, help="rendered clips to train on (%(default)s)")
    add("--num_val_clips", type=count, default=220, help="rendered clips to evaluate on (%(default)s)")
    add("--num_samples", type=number_of_samples, help="held-out pairs to evaluate on, or 'all' (all)")
    add("--input_frame_idx", type=index, default=DEFAULT_INPUT_FRAME_IDX, help="frame that is given (%(default)s)")
    add("--target_frame_idx", type=index, nargs="+", default=[21, 25], help="frames to predict, one study each (21 25)")
    any_help = "frames to predict later than any start, one study each (5)"
    add("--any_start_horizon", type=count, nargs="*", default=[5], help=any_help)
    sources_help = f"of the progress in prompts; all are compared with the first ({' '.join(SOURCES)})"
    add("--sources", choices=SOURCES, nargs="+", default=SOURCES, help=sources_help)
    add("--estimator_steps", type=count, default=1000, help="optimizer steps of the progress estimator (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (0 1 2)")
    add("--max_train_steps", type=count, default=100, help="optimizer steps of each run (%(default)s)")
    add("--train_batch_size", type=count, default=16, help="(%(default)s)")
    add("--learning_rate", type=number(float, at_least=0), default=3e-4, help="(%(default)s)")
    add(
        "--training_options",
        type=shlex.split,
        default="",
        metavar="FLAGS",
        help='more flags of train_instruct_pix2pix.py: --training_options="--mixed_precision fp16" (none; for the'
        f' demo\'s base model "{DEMO_OPTIONS["training_options"]}")',
    )
    add("--keep_models", action="store_true", help="keep trained models and predicted pictures, not only scores")
    add_sampling_options(parser)
    given = parser.parse_args(arguments)
    if given.quick:
        parser.set_defaults(**QUICK)
    if Path(given.pretrained_model_name_or_path) == DEMO_MODEL:
        parser.set_defaults(**DEMO_OPTIONS)
    args = parser.parse_args(arguments)
    for name in ("seeds", "target_frame_idx", "any_start_horizon", "sources"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if min(args.target_frame_idx) <= args.input_frame_idx:
        parser.error("each --target_frame_idx must come after --input_frame_idx")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

from tqdm import tqdm

from benchmarks.progress_comparison import ALL_TASKS, answer, compare_all, format_table, how_to_read

# The data.


@dataclass(frozen=True)
class Frames:
    """Which frames one study predicts."""

    start: int | None  # the input frame; None: any
    horizon: int

    @property
    def choice(self) -> FrameChoice:
        return FrameChoice(self.start, (self.horizon,), progress_source=ORACLE)

    @property
    def flags(self) -> list[str]:
        if self.start is None:
            return [f"--input_frame_idx={ANY}", f"--horizon={self.horizon}"]
        return [f"--input_frame_idx={self.start}", f"--target_frame_idx={self.start + self.horizon}"]

    def __str__(self) -> str:
        return f"any -> +{self.horizon}" if self.start is None else f"{self.start} -> {self.start + self.horizon}"


def all_frames(args: argparse.Namespace) -> list[Frames]:
    given = [Frames(args.input_frame_idx, target - args.input_frame_idx) for target in args.target_frame_idx]
    return given + [Frames(None, horizon) for horizon in args.any_start_horizon]


def choose_held_out(args: argparse.Namespace, data_dir: Path, frames: Frames) -> Path:
    """Writes the annotations of the held-out pairs of one study, the same for all its runs; returns the file."""
    pairs, left_out = load_frame_pairs(data_dir, "val", args.resolution, frames.choice)
    if left_out:
        print(f"held-out clips: {describe_left_out(left_out)}")
    chosen = {pair.video_id for pair in choose_samples(pairs, args.num_samples, SPLIT_SEED)}
    if not chosen:
        raise UserError(
            f"no held-out video of {data_dir} has both frames ({frames}); look at:"
            f" python -m data.sthv2_dataset_hf --data_dir {data_dir} --resolution {args.resolution}"
        )
    if len(chosen) < ENOUGH_PAIRS:
        print(f"only {len(chosen)} held-out pairs for {frames}: small differences need {ENOUGH_PAIRS} or more")
    entries = [entry for entry in read_annotations(filtered_annotations_path(data_dir, "val")) if entry["id"] in chosen]
    content = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
    name = f"held_out_{file_name(frames)}_{digest(content)}.json"
    make_folder(args.work_dir)
    write_file(args.work_dir / name, content)
    return args.work_dir / name


def file_name(frames: Frames) -> str:
    return str(frames).replace(" -> ", "_to_").replace("+", "plus_")


# The estimators.


def estimator_folder(args: argparse.Namespace, data_dir: Path, source: str) -> Path:
    """Where the estimator of a source lies, named after all it depends on."""
    annotations = filtered_annotations_path(data_dir, "train").read_text(encoding="utf-8")
    key = digest(annotations, model_files(args), *estimator_flags(args, data_dir, source))
    return args.work_dir / "estimators" / f"{source}_{key}"


def estimator_flags(args: argparse.Namespace, data_dir: Path, source: str) -> list[str]:
    return [
        f"--data_dir={data_dir}",
        f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}",
        f"--resolution={args.resolution}",
        f"--max_train_steps={0 if source == CONSTANT else args.estimator_steps}",
    ]


def train_estimators(args: argparse.Namespace, data_dir: Path) -> None:
    """Trains the estimators of the sources that need one; without a step it says the training median."""
    for source in (source for source in args.sources if source in (CONSTANT, ESTIMATED)):
        folder = estimator_folder(args, data_dir, source)
        if not (folder / "progress_estimator.json").is_file():
            flags = estimator_flags(args, data_dir, source)
            call(["-m", "pecn.progress", "train", f"--output_dir={folder}", *flags])


def prompt_flags(args: argparse.Namespace, data_dir: Path, source: str) -> list[str]:
    """How training is told what its prompts tell; sampling finds it with the model."""
    flags = [f"--add_progress={source != NO_PROGRESS}"]
    if source in (CONSTANT, ESTIMATED):
        folder = estimator_folder(args, data_dir, source)
        flags += [f"--progress_source={ESTIMATED}", f"--progress_estimator={folder}"]
    return flags


# The runs.


@dataclass(frozen=True)
class Run:
    """One training and the prediction of all held-out pairs. `folder` is named after all settings of both."""

    frames: Frames
    source: str  # of the progress in prompts
    seed: int
    folder: Path
    training: list[str]
    sampling: list[str]

    @property
    def metrics(self) -> Path:
        return self.folder / "samples" / "metrics.json"

    def __str__(self) -> str:
        return f"{self.frames}, progress {self.source}, seed {self.seed}"


def plan_runs(args: argparse.Namespace, data_dir: Path) -> list[Run]:
    """All runs, in an order that gives whole comparisons early: all sources of a seed, then the next seed."""
    held_out = {frames: choose_held_out(args, data_dir, frames) for frames in all_frames(args)}
    # The commands' defaults are settings, too: where a script changes, results of before it do not count.
    files = (filtered_annotations_path(data_dir, "train"), TRAIN, SAMPLE)
    shared = digest(*(path.read_text(encoding="utf-8") for path in files), model_files(args))
    return [
        plan_run(args, data_dir, held_out[frames], frames, source, seed, shared)
        for seed in args.seeds
        for frames in held_out
        for source in args.sources
    ]


def plan_run(
    args: argparse.Namespace,
    data_dir: Path,
    held_out: Path,
    frames: Frames,
    source: str,
    seed: int,
    shared: str,  # a hash of what all runs have in common
) -> Run:
    training = [
        f"--pretrained_model_name_or_path={args.pretrained_model_name_or_path}",
        f"--train_data_dir={data_dir}",
        f"--resolution={args.resolution}",
        *frames.flags,
        *prompt_flags(args, data_dir, source),
        f"--max_train_steps={args.max_train_steps}",
        f"--train_batch_size={args.train_batch_size}",
        f"--learning_rate={args.learning_rate}",
        f"--seed={seed}",
        f"--checkpointing_steps={args.max_train_steps + 1}",  # none, unless it is interrupted
        "--resume_from_checkpoint=latest",
        "--num_validation_images=0",
        "--report_to=none",
    ]
    taken = {"--output_dir", *(word.split("=")[0] for word in training)}
    for word in args.training_options:
        if word.split("=")[0] in taken:
            raise UserError(f"--training_options may not hold {word}: the study sets it itself")
    training = [*args.training_options, *training]
    sampling = [
        f"--frames_dir={frames_dir(data_dir, args.resolution)}",
        f"--val_annotations={held_out}",
        *frames.flags,
        "--num_samples=all",
        f"--seed={SPLIT_SEED}",
        *(f"--{name}={value}" for name, value in vars(sampling_options(args)).items()),
    ]
    key = digest(shared, *training, *sampling)
    name = f"{file_name(frames)}_progress_{source}_seed_{seed}_{key}"
    return Run(frames, source, seed, args.work_dir / "runs" / name, training, sampling)


def model_files(args: argparse.Namespace) -> str:
    """Names, sizes and times of a base model's files; empty for a model on the hub."""
    folder = Path(args.pretrained_model_name_or_path)
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return str([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()])


def digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=5).hexdigest()


def execute(runs: Sequence[Run], keep_models: bool) -> None:
    """Trains and samples what is not finished yet, with one progress bar over the runs."""
    with tqdm(total=len(runs), unit="run") as progress_bar:
        for run in runs:
            progress_bar.set_description_str(f"training {run}")
            model, samples = run.folder / "model", run.folder / "samples"
            if not run.metrics.is_file() and not (model / "model_index.json").is_file():
                words = [TRAIN, f"--output_dir={model}", *run.training]
                call(words, run.folder / "train.log")
            progress_bar.set_description_str(f"sampling {run}")
            if not run.metrics.is_file():
                words = [SAMPLE, f"--model_dir={model}", f"--output_dir={samples}"]
                call([*words, *run.sampling], run.folder / "sample.log")
            if not keep_models:
                shutil.rmtree(model, ignore_errors=True)
                shutil.rmtree(samples / "samples", ignore_errors=True)
            progress_bar.update()


# Their scores.


def collect_pairs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The PSNR of one study's held-out pairs, from its runs' metrics: of the expected frame where one was made.

    Returns one dictionary a pair: `video_id`, `task`, and for each of MEASURES {"copy": dB, source: [dB for each seed]}
    with all sources; `moving_psnr` is None where nothing moves.
    """
    pairs: dict[str, dict[str, Any]] = {}
    for run in runs:
        samples = {sample["video_id"]: sample for sample in read_metrics(run)["samples"]}
        if pairs and samples.keys() != pairs.keys():
            raise UserError(f"{run.metrics} has other videos than the runs before it; delete {run.folder}")
        for video_id, sample in samples.items():
            pair = pairs.setdefault(video_id, {"video_id": video_id, "task": sample["task"]})
            moving = sample["moving"] and sample["moving"]["psnr"]
            for measure, scores in (("psnr", sample["psnr"]), ("moving_psnr", moving)):
                if scores is None:
                    pair[measure] = None
                    continue
                cells = pair.setdefault(measure, {"copy": scores["copy"]})
                cells.setdefault(run.source, []).append(scores.get("expected", scores["sample"]))
    return list(pairs.values())


def read_metrics(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run.metrics} cannot be read ({error}); delete {run.folder} to repeat the run") from error


# The study.


def main(args: argparse.Namespace) -> None:
    if args.pretrained_model_name_or_path == str(DEMO_MODEL) and not (DEMO_MODEL / "model_index.json").is_file():
        raise UserError(
            f"there is no {DEMO_MODEL}; run this in the project's folder, or name a base model with"
            " --pretrained_model_name_or_path (python -m demo.make_model makes one)"
        )
    counts = (args.num_train_clips, args.num_val_clips)
    data_dir = args.data_dir or render_clips(args.work_dir / "clips", args.resolution, CLIP_SEED, *counts)
    runs = plan_runs(args, data_dir)
    train_estimators(args, data_dir)
    execute(runs, args.keep_models)

    comparisons, scores = {}, {}
    for frames in all_frames(args):
        scores[str(frames)] = collect_pairs([run for run in runs if run.frames == frames])
        comparisons[str(frames)] = compare_all(scores[str(frames)], args.sources)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"data": "rendered clips" if args.data_dir is None else str(args.data_dir)}
    results = {"settings": settings, "comparisons": comparisons, "pairs": scores}
    write_file(args.work_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    rows = [row for rows in comparisons.values() for row in rows]
    print(format_table(comparisons))
    for frames, compared in comparisons.items():
        for row in compared:
            if row["task"] == ALL_TASKS:
                print(answer(frames, row))
    print(how_to_read(len(rows), len(args.seeds), rendered=args.data_dir is None))
    print(f"every pair's scores: {args.work_dir / 'results.json'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, ends a run in an orderly way
    run_command(functools.partial(main, ARGS))
