"""Progress without an oracle: trains and evaluates an estimator of how much of an action is done.

    python -m pecn.progress train --data_dir data/sthv2 --output_dir outputs/progress_estimator
    python -m pecn.progress evaluate --data_dir data/sthv2 --output_dir outputs/progress_estimator

`evaluate` asks of the validation clips whether it is nearer to the truth than two constants, which see no frame: the
training median, and the training median given the input's index. That is not to be taken for granted.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import cli, paths
from data.cli import UserError, number
from data.clips import DEFAULT_INPUT_FRAME_IDX, ORACLE, Clip, FrameChoice, derive_seed, describe_left_out, load_clips

EVERY_CUT = FrameChoice(start=None, progress_source=ORACLE)  # every frame but the last, which none follows
WITHIN = 8  # points; the share of estimates that are nearer to the truth is told


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.CommandParser(prog="python -m pecn.progress", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate")
    train_parser = commands.add_parser("train", help="train an estimator on the training clips")
    evaluate_parser = commands.add_parser("evaluate", help="compare it with constants on the validation clips")
    for command in (train_parser, evaluate_parser):
        add = command.add_argument
        add("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
        base_model = "timbrooks/instruct-pix2pix"
        add("--pretrained_model_name_or_path", default=base_model, help="whose VAE and text encoder (%(default)s)")
        side = number(at_least=8, multiple_of=8)
        add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
        output_dir = Path("outputs/progress_estimator")
        add("--output_dir", type=Path, default=output_dir, help="of the estimator (%(default)s)")
    add, count = train_parser.add_argument, number(at_least=0)
    add("--max_train_steps", type=count, default=1000, help="0: it says the training median (%(default)s)")
    add("--train_batch_size", type=number(at_least=1), default=64, help="cuts a step (%(default)s)")
    add("--learning_rate", type=number(float, at_least=0), default=1e-3, help="falls to 0 (%(default)s)")
    add("--seed", type=int, default=42, help="(%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from pecn.frame_store import encoded_cache
from pecn.model import find_model, load_pipeline
from pecn.progress_model import (
    Cut,
    ProgressEstimator,
    ProgressNetwork,
    SeenClips,
    encode_clips,
    hash_of_models,
    load_estimator,
    save_estimator,
)
from pecn.scores import bootstrap_intervals

# The cuts and their truth.


def find_all_frames(args: argparse.Namespace, split: str) -> list[Clip]:
    """The clips of a split, with all their frames. Raises UserError where there are none."""
    clips, left_out = load_clips(args.data_dir, split, args.resolution, EVERY_CUT)
    if left_out:
        print(f"{split}: {describe_left_out(left_out)}")
    if not clips:
        frames = paths.frames_dir(args.data_dir, args.resolution)
        raise UserError(f"no {split} video has frames in {frames}; {paths.extraction_command(frames)} extracts them")
    return clips


def cuts_of(clip: Clip) -> list[int]:
    """Every frame of a clip that can be an input."""
    return EVERY_CUT.starts(clip.frame_set, EVERY_CUT.horizons[0])


def true_share(clip: Clip, cut: int) -> float:
    """The share of the clip that lies before the cut, 0..1."""
    return cut / clip.num_frames


def constants(clips: Sequence[Clip]) -> dict[str, Any]:
    """`training_median`: of the share done, over all cuts of the clips; `medians_by_start`: over those at one frame."""
    shares: dict[int, list[float]] = {}
    for clip in clips:
        for cut in cuts_of(clip):
            shares.setdefault(cut, []).append(true_share(clip, cut))
    every_share = [share for of_start in shares.values() for share in of_start]
    by_start = {str(start): float(np.median(of_start)) for start, of_start in sorted(shares.items())}
    return {"training_median": float(np.median(every_share)), "medians_by_start": by_start}


def median_given(medians_by_start: dict[str, float], cut: int) -> float:
    """The training median at a frame, or at the nearest one that a training clip has."""
    return medians_by_start[min(medians_by_start, key=lambda start: abs(int(start) - cut))]


# Training.


def train(args: argparse.Namespace) -> None:
    """Trains an estimator on any cut of every training clip, and saves it."""
    clips = find_all_frames(args, "train")
    pipeline = load_pipeline(find_model(args.pretrained_model_name_or_path))
    seen = encode_clips(
        pipeline, clips, args.resolution, encoded_cache(args.data_dir, args.output_dir), PartialState().device
    )
    config = {
        "resolution": args.resolution,
        "hash_of_vae_and_text_encoder": hash_of_models(pipeline),
        "latent_channels": pipeline.vae.config.latent_channels,
        "text_width": pipeline.text_encoder.config.hidden_size,
        **constants(clips),
    }
    torch.manual_seed(args.seed)
    network = ProgressNetwork(config["latent_channels"], config["text_width"], config["training_median"])
    fit(network, seen, args)
    save_estimator(ProgressEstimator(network.cpu(), config), args.output_dir)
    same = f"--data_dir {args.data_dir} --resolution {args.resolution} --output_dir {args.output_dir}"
    print(
        f"the progress estimator is in {args.output_dir}; compare it with constants: python -m pecn.progress evaluate"
        f" {same} --pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    )


def fit(network: ProgressNetwork, seen: SeenClips, args: argparse.Namespace) -> None:
    """Minimizes the mean absolute error over cuts drawn at random, of clips drawn at random, half of them mirrored."""
    device = PartialState().device
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=max(20, args.max_train_steps), pct_start=0.1
    )
    cuts = [cuts_of(clip) for clip in seen.clips]
    with tqdm(total=args.max_train_steps, desc="Training", unit="step") as progress_bar:
        for step in range(args.max_train_steps):
            rng = np.random.default_rng(derive_seed(args.seed, "cuts", step))
            drawn = [(index, rng.choice(cuts[index])) for index in rng.integers(len(cuts), size=args.train_batch_size)]
            truth = torch.tensor([true_share(seen.clips[index], cut) for index, cut in drawn], dtype=torch.float32)
            shown = seen.show(drawn, mirrored=rng.random() < 0.5)
            shares = network(*(tensor.to(device) for tensor in shown))
            loss = (shares - truth.to(device)).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress_bar.update()
            if step % 10 == 0:
                progress_bar.set_postfix(error=f"{100 * loss.item():.1f} points")


# Evaluation.

WAYS = ("estimator", "training median", "training median at that frame")


def score(estimator: ProgressEstimator, seen: SeenClips, cuts: Sequence[Cut]) -> np.ndarray:
    """(clips, WAYS, 2): each way's mean error in points, and share within WITHIN points, over a clip's `cuts`.

    Clips without a cut are left out. The clip is the statistical unit: its cuts are alike.
    """
    truth = np.array([true_share(seen.clips[index], cut) for index, cut in cuts])
    at_frame = [median_given(estimator.config["medians_by_start"], cut) for _, cut in cuts]
    training_median = np.full(len(cuts), estimator.config["training_median"])
    said = np.stack([estimator.estimate(seen, cuts), training_median, at_frame], axis=1)
    errors = 100 * np.abs(said - truth[:, None])
    of_cuts = np.stack([errors, errors <= WITHIN], axis=2)
    clip_of_cut = np.array([index for index, _ in cuts])
    return np.stack([of_cuts[clip_of_cut == index].mean(axis=0) for index in np.unique(clip_of_cut)])


def format_table(scores: np.ndarray) -> str:
    """A row for each way, and for the estimator's difference to each constant, with 95% bootstrap intervals."""
    lines = [f"  {'':<44}{'mean error, points':>26}{f'within {WITHIN} points':>26}"]
    rows = dict(zip(WAYS, scores.transpose(1, 0, 2)))
    rows |= {f"{WAYS[0]} - {name}": rows[WAYS[0]] - rows[name] for name in WAYS[1:]}
    for name, values in rows.items():
        sign = "+" if " - " in name else ""
        cells = []
        for mean, interval, form in zip(values.mean(axis=0), bootstrap_intervals(values), (f"{sign}.2f", f"{sign}.0%")):
            ends = f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else ""
            cells.append(f"{f'{mean:{form}}{ends}':>26}")
        lines.append(f"  {name:<44}{''.join(cells)}")
    return "\n".join(lines)


def verdict(scores: np.ndarray) -> str:
    """One sentence: whether the estimator's error is below that of the better constant."""
    errors = scores[:, :, 0]
    best = 1 + int(errors.mean(axis=0)[1:].argmin())
    differences = errors[:, [0]] - errors[:, [best]]
    [interval] = bootstrap_intervals(differences)
    low, high = interval or (-np.inf, np.inf)
    verb = "beats" if high < 0 else "is worse than" if low > 0 else "does not clearly beat"
    return (
        f"the estimator {verb} the better constant (the {WAYS[best]}): an error of {errors[:, 0].mean():.2f} against"
        f" {errors[:, best].mean():.2f} points"
    )


def evaluate(args: argparse.Namespace) -> None:
    """Prints the estimator's errors on the validation clips, beside those of the constants."""
    clips = find_all_frames(args, "val")
    pipeline = load_pipeline(find_model(args.pretrained_model_name_or_path))
    estimator = load_estimator(args.output_dir, pipeline, args.resolution)
    seen = encode_clips(
        pipeline, clips, args.resolution, encoded_cache(args.data_dir, args.output_dir), PartialState().device
    )
    every_cut = [(index, cut) for index, clip in enumerate(clips) for cut in cuts_of(clip)]
    at_default = [(index, cut) for index, cut in every_cut if cut == DEFAULT_INPUT_FRAME_IDX]
    for title, cuts in ((f"cuts at frame {DEFAULT_INPUT_FRAME_IDX}", at_default), ("any cut", every_cut)):
        if not cuts:
            print(f"{title}: no validation video has one")
            continue
        scores = score(estimator, seen, cuts)
        print(f"{title}: {len(cuts)} of {len(scores)} clips\n{format_table(scores)}\n{title}: {verdict(scores)}")


def main() -> None:
    {"train": train, "evaluate": evaluate}[ARGS.command](ARGS)


if __name__ == "__main__":
    cli.run_command(main)
