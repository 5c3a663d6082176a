"""What does training on any start give, and what does one model for all horizons lose?

    python -m benchmarks.horizon_study

fine-tunes the demo's base model six times, for the same number of steps: from frame 20 alone and from any start, for
one horizon each, and for all horizons from 1 to 10 at once. All predict the same held-out clips from frame 20, and the
table compares two models at a time, pair by pair, where something moves. It renders its clips itself; the held-out ones
have a seed that nothing was trained on. A model that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.commands import PROJECT, SAMPLE, TRAIN, call, render_clips
from data.cli import CommandParser, number, run_command
from data.paths import filtered_annotations_path, frames_dir

TRAINING_SEED, UNSEEN_SEED = 42, 777  # of the clips
ALL_HORIZONS = "1-10"
RESOLUTION = 96
# Two models (input frame, horizons) that are compared, and the horizon at which they are.
COMPARISONS = {
    "frame 20 alone, any start": [((20, "1"), ("any", "1"), 1), ((20, "5"), ("any", "5"), 5)],
    "a model for each horizon, one for all": [
        (("any", horizon), ("any", ALL_HORIZONS), int(horizon)) for horizon in ("1", "5", "10")
    ],
}
# As the quick test trains and, but for its STRENGTH of 0.9, samples.
TRAINING = ["--learning_rate=3e-4", "--lr_scheduler=cosine", "--lr_warmup_steps=30", "--add_progress", "--random_flip"]
SAMPLING = "--num_inference_steps=8 --scheduler=dpmsolver++karras --image_guidance_scale=1 --num_predictions=8".split()
ROW = "{:>3}  {:<22}{:>9}{:>9}{:>17}{:>17}{:>28}"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m benchmarks.horizon_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count = parser.add_argument, number(at_least=1)
    add("--work_dir", type=Path, default=Path("outputs/horizon_study"), help="clips, models, scores (%(default)s)")
    add("--model", type=Path, default=PROJECT / "demo/base_model", help="base model (%(default)s)")
    add("--num_train_clips", type=count, default=400, help="(%(default)s)")
    add("--num_val_clips", type=count, default=240, help="held out (%(default)s)")
    add("--max_train_steps", type=count, default=800, help="of 8 samples, for each model (%(default)s)")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace, start: int | str, horizons: str) -> Path:
    """The folder of a trained model."""
    settings = repr((str(args.model), args.num_train_clips, args.max_train_steps)).encode()
    key = hashlib.blake2b(settings, digest_size=4).hexdigest()
    folder = args.work_dir / f"from_{start}_horizon_{horizons}_{key}"
    if not (folder / "model_index.json").is_file():
        print(f"training from {'frame 20 alone' if start == 20 else 'any start'}, horizon {horizons}", flush=True)
        frames = [f"--input_frame_idx={start}", f"--horizon={horizons}"]
        model = [f"--pretrained_model_name_or_path={args.model}", f"--output_dir={folder}"]
        steps = [f"--max_train_steps={args.max_train_steps}", "--train_batch_size=8", "--num_validation_images=0"]
        data = [f"--train_data_dir={args.work_dir / 'clips'}", f"--resolution={RESOLUTION}"]
        call([TRAIN, *data, *model, *frames, *steps, *TRAINING, "--report_to=none", "--resume_from_checkpoint=latest"])
    return folder


def predict(args: argparse.Namespace, model: Path, horizon: int) -> list[dict[str, Any]]:
    """The scores of the held-out pairs from frame 20, `horizon` frames ahead."""
    from pecn.pictures import read_scores

    unseen, folder = args.work_dir / "unseen", model / f"{args.num_val_clips}_unseen_20_to_{20 + horizon}"
    if not (folder / "metrics.json").is_file():
        frames = [f"--frames_dir={frames_dir(unseen, RESOLUTION)}", "--input_frame_idx=20", f"--horizon={horizon}"]
        annotations = f"--val_annotations={filtered_annotations_path(unseen, 'val')}"
        where = [f"--model_dir={model}", f"--output_dir={folder}", "--num_samples=all", "--batch_size=16"]
        call([SAMPLE, *where, *frames, annotations, *SAMPLING])
    return read_scores(folder)


def expected_as_sample(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same scores with those of the expected frame in place of the sample's."""
    scores = copy.deepcopy(scores)
    for row in scores:
        for table in (row, row["moving"] or {}):
            for figures in table.values():
                if isinstance(figures, dict) and "expected" in figures:
                    figures["sample"] = figures["expected"]
    return scores


def table_rows(names: Sequence[str], horizon: int, both: Sequence[list[dict[str, Any]]]) -> list[str]:
    """A line for each of two models, the second one's with its difference to the first."""
    from pecn.scores import paired_difference, summarize, with_spread

    differences = [paired_difference(expected_as_sample(both[1]), expected_as_sample(both[0])), None]
    rows = []
    for name, scores, difference in zip(names, both, reversed(differences)):
        moving = summarize(scores)["moving"]
        gains = [with_spread(moving["psnr"][way], "gain", "+.2f") for way in ("sample", "expected")]
        paired = with_spread(difference["moving"]["psnr"]["sample"], "gain", "+.2f") if difference else ""
        rows.append(
            ROW.format(
                horizon,
                name,
                f"{moving['sharpness']['sample']['median']:.2f}",
                f"{moving['frames']['sample']['share']:.0%}",
                *gains,
                paired,
            )
        )
    return rows


def main() -> None:
    args = parse_args()
    render_clips(args.work_dir / "clips", RESOLUTION, TRAINING_SEED, args.num_train_clips, num_val=1)
    render_clips(args.work_dir / "unseen", RESOLUTION, UNSEEN_SEED, 1, args.num_val_clips)
    lines = []
    for title, comparisons in COMPARISONS.items():
        names = title.split(", ")
        lines += ["", f"{title}: {args.max_train_steps} steps of 8 each; dB above copying, where something moves"]
        lines.append(ROW.format("", "", "sharp", "frames", "sample", "expected", "expected, paired difference"))
        for *models, horizon in comparisons:
            both = [predict(args, train(args, *model), horizon) for model in models]
            lines += table_rows(names, horizon, both)
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
