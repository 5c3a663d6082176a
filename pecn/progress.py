"""Progress without knowing how long a clip is: estimates how much of the action is done at each frame.

    python -m pecn.progress --data_dir data/sthv2 --output_file data/sthv2/progress.json

writes {split: {video id: {frame: percent}}}, which training and sampling take as `--add_progress FILE`. A small network
sees what a viewer sees while the action is going on: NUM_SEEN frames up to the input, the sentence, and the input's
index. Each training clip is estimated by a network that has not seen it (FOLDS folds); the validation clips by one
trained on all training clips. Its errors are printed beside those of two constants, which see no frame.
"""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import trange

from data import paths
from data.cli import CommandParser, UserError, number, run_command
from data.clips import DEFAULT_INPUT_FRAME_IDX, FrameChoice, find_clips
from data.files import make_folder, write_json
from data.prompts import progress_percent, swap_left_and_right
from pecn.encoded_frames import encoded_cache, stored_frames, stored_prompts
from pecn.model import Pipeline, find_model, load_pipeline, tokenize
from pecn.scores import half_width

NUM_SEEN = 6  # frames, spread from the first one to the input
FOLDS = 4
WIDTHS = (32, 64, 128)  # channels of the convolutions
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 64, 1e-3, 0.05


@dataclass(frozen=True)
class Cuts:
    """Every frame of a split's clips, and what is seen at it."""

    table: pd.DataFrame  # a line each: video_id, frame, label, and the true share of the clip that lies before, 0..1
    rows: np.ndarray  # (N, NUM_SEEN): of the frames that are seen, in `moments`
    moments: np.ndarray  # of all frames, as `stored_frames` returns them
    sentences: dict[str, torch.Tensor]  # of each label and its mirror image (d,): the mean of its tokens' states
    scaling_factor: float  # the VAE's

    def show(self, cuts: np.ndarray, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The scaled latents (B, NUM_SEEN, C, h, w) at B cuts, and what else is told: sentence and frame (B, d + 2).

        The latents of mirrored frames are not quite the mirrored latents, but near enough to learn from.
        """
        latents = torch.from_numpy(self.moments[self.rows[cuts].ravel(), : self.moments.shape[1] // 2])
        latents = latents.reshape(len(cuts), NUM_SEEN, *latents.shape[1:]) * self.scaling_factor
        labels, frames = self.table.label.iloc[cuts], self.table.frame.iloc[cuts].to_numpy(np.float32)
        told = torch.stack([self.sentences[swap_left_and_right(label) if mirrored else label] for label in labels])
        when = torch.from_numpy(np.stack([frames / 50, np.log1p(frames) / 4], axis=1))
        return latents.flip(-1) if mirrored else latents, torch.cat([told, when], dim=1)


def load_cuts(pipeline: Pipeline, args: argparse.Namespace, split: str) -> Cuts:
    """All cuts of the clips of a split, encoded as training does it."""
    clips, _ = find_clips(args.data_dir, split, args.resolution, FrameChoice(start=None))
    if len(clips) < 2:
        raise UserError(f"{args.data_dir} has {len(clips)} {split} videos with frames of {args.resolution} pixels")
    cache_dir = encoded_cache(args.data_dir, args.output_file.parent)
    moments, _ = stored_frames(pipeline, clips, False, cache_dir)
    labels = sorted({told for clip in clips for told in (clip.label, swap_left_and_right(clip.label))})
    states, _ = stored_prompts(pipeline, labels, cache_dir)
    is_word = (tokenize(pipeline, labels) != pipeline.tokenizer.pad_token_id).numpy()
    sentences = {
        name: torch.from_numpy(state[words].mean(axis=0)) for name, state, words in zip(labels, states, is_word)
    }
    lines, rows, first_row = [], [], 0
    for clip in clips:
        for place, frame in enumerate(clip.frames):
            rows.append(first_row + np.linspace(0, place, NUM_SEEN).round().astype(int))
            lines.append((clip.video_id, frame, clip.label, frame / (clip.frames[-1] + 1)))
        first_row += len(clip.frames)
    table = pd.DataFrame(lines, columns=["video_id", "frame", "label", "share"])
    return Cuts(table, np.stack(rows), moments, sentences, pipeline.vae.config.scaling_factor)


class ProgressNetwork(torch.nn.Module):
    """A small convolutional network over the last seen frame and the changes since the others, told the sentence."""

    def __init__(self, latent_channels: int, num_told: int) -> None:
        super().__init__()
        widths = (NUM_SEEN * latent_channels, *WIDTHS)
        layers: list[torch.nn.Module] = []
        for stride, inputs, outputs in zip((1, 2, 2), widths, widths[1:]):
            convolution = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1)
            layers += [convolution, torch.nn.GroupNorm(8, outputs), torch.nn.SiLU()]
        self.look = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())
        # Few clips are easily memorized, above all by their sentences.
        self.read = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(num_told, 128))
        hidden = [torch.nn.Dropout(0.5), torch.nn.Linear(9 * WIDTHS[-1] + 128, 128), torch.nn.SiLU()]
        self.say = torch.nn.Sequential(*hidden, torch.nn.Dropout(0.5), torch.nn.Linear(128, 1), torch.nn.Sigmoid())

    def forward(self, latents: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """The share of the action that is done (B,), 0..1, of what `Cuts.show` returns."""
        changes = latents[:, -1:] - latents[:, :-1]
        looked = self.look(torch.cat([latents[:, -1:], changes], dim=1).flatten(1, 2))
        return self.say(torch.cat([looked, self.read(told)], dim=1))[:, 0]


def train_network(cuts: Cuts, chosen: np.ndarray, args: argparse.Namespace, name: str) -> ProgressNetwork:
    """Minimizes the mean absolute error over the cuts `chosen`, drawn at random, half of the steps mirrored."""
    device = PartialState().device
    torch.manual_seed(args.seed)
    latents, told = cuts.show(chosen[:1])
    network = ProgressNetwork(latents.shape[2], told.shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = args.max_train_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(20, steps), pct_start=0.1)
    rng = np.random.default_rng(args.seed)
    for step in trange(steps, desc=f"Training, {name}", unit="step"):
        drawn = rng.choice(chosen, BATCH_SIZE)
        truth = torch.from_numpy(cuts.table.share.to_numpy(np.float32)[drawn]).to(device)
        shown = cuts.show(drawn, mirrored=step % 2 == 1)
        loss = (network(*(tensor.to(device) for tensor in shown)) - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.cpu().eval()


@torch.no_grad()
def estimate(network: ProgressNetwork, cuts: Cuts, chosen: np.ndarray) -> np.ndarray:
    """The share of the action that is done at the cuts `chosen`, 0..1."""
    batches = np.array_split(chosen, -(-len(chosen) // BATCH_SIZE))
    return np.concatenate([network(*cuts.show(batch)).numpy() for batch in batches])


def describe_errors(cuts: pd.DataFrame, train: pd.DataFrame) -> str:
    """Mean errors in points, each clip counting alike, of the `estimate` and of constants from the training clips."""
    by_frame = train.groupby("frame").share.median()
    frames = cuts.frame.clip(upper=by_frame.index.max())
    said = pd.DataFrame({"estimator": cuts.estimate, "training median": train.share.median()}, index=cuts.index)
    said["training median at that frame"] = by_frame.reindex(frames, method="ffill").to_numpy()
    errors = 100 * said.sub(cuts.share, axis=0).abs().groupby(cuts.video_id).mean()
    difference = errors.estimator - errors[errors.drop(columns="estimator").mean().idxmin()]
    figures = ", ".join(f"{name} {value:.1f}" for name, value in errors.mean().items())
    spread = f"{difference.mean():+.1f} ± {half_width(difference):.1f}"
    return f"mean error in points: {figures}; estimator - better constant: {spread} (95% interval; above 0: worse)"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m pecn.progress", description="Estimate how much of each action is done.")
    add = parser.add_argument
    add("--data_dir", type=Path, default=paths.DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
    add("--output_file", type=Path, required=True, help="JSON file of the estimates")
    base_model = "timbrooks/instruct-pix2pix"
    add("--pretrained_model_name_or_path", default=base_model, help="whose VAE and text encoder (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
    add("--max_train_steps", type=number(at_least=0), default=1000, help="of each network (%(default)s)")
    add("--seed", type=int, default=42, help="(%(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    make_folder(args.output_file.parent)
    pipeline = load_pipeline(find_model(args.pretrained_model_name_or_path))
    train, val = (load_cuts(pipeline, args, split) for split in paths.SPLITS)
    fold_of, everything = pd.factorize(train.table.video_id)[0] % FOLDS, np.arange(len(train.table))
    for fold in np.unique(fold_of):
        network = train_network(train, everything[fold_of != fold], args, f"fold {fold + 1}")
        train.table.loc[fold_of == fold, "estimate"] = estimate(network, train, everything[fold_of == fold])
    network = train_network(train, everything, args, "all clips")
    val.table["estimate"] = estimate(network, val, np.arange(len(val.table)))
    written = {}
    for split, cuts in zip(paths.SPLITS, (train.table, val.table)):
        at_default = cuts[cuts.frame == DEFAULT_INPUT_FRAME_IDX]
        for where, some in (("any frame", cuts), (f"frame {DEFAULT_INPUT_FRAME_IDX}", at_default)):
            if len(some):
                print(f"{split}, {where}, {describe_errors(some, train.table)}")
        percent = cuts.estimate.map(progress_percent)
        by_video = percent.groupby([cuts.video_id, cuts.frame], sort=False).first()
        written[split] = {name: {str(f): int(p) for (_, f), p in of.items()} for name, of in by_video.groupby(level=0)}
    write_json(args.output_file, written)
    print(f"{args.output_file} has the estimates; train with: PROGRESS={shlex.quote(str(args.output_file))}")


if __name__ == "__main__":
    run_command(main)
