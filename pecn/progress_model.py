"""The progress estimator: what it sees of a clip, its network, its file, and estimates for the prompts of pairs.

It sees what a viewer sees while the action is going on: frames up to the input, the sentence, and the input's index.
The oracle's progress, which prompts have otherwise, takes the length of the whole clip.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from data.cli import UserError, one_line
from data.clips import Clip, FrameChoice, verify_frames
from data.files import make_folder, parts_replaced_together
from data.paths import extracted_frames
from data.prompts import progress_percent, swap_left_and_right
from pecn.frame_store import digest, first_rows, module_bytes, stored_frames, stored_prompts
from pecn.model import tokenize

WEIGHTS, CONFIG = "progress_estimator.safetensors", "progress_estimator.json"
NUM_SEEN = 6  # frames, spread from the first one to the input
WIDTH = 32  # channels of the first convolution
ESTIMATING_BATCH = 256  # cuts

Cut = tuple[int, int]  # which clip, and the index of its last frame that is seen


# What is seen.


def seen_frames(frames: Sequence[int], cut: int) -> list[int]:
    """NUM_SEEN of the sorted frames up to `cut`, evenly spread, the last one being `cut`; few frames repeat."""
    so_far = [frame for frame in frames if frame <= cut]
    return [so_far[round(place)] for place in np.linspace(0, len(so_far) - 1, NUM_SEEN).tolist()]


@dataclass(frozen=True)
class SeenClips:
    """Clips as the estimator sees them: each frame's latents, and the sentences."""

    clips: Sequence[Clip]  # whose frames are those encoded
    extracted: Sequence[Sequence[int]]  # all frames of each clip, of which cuts show NUM_SEEN
    moments: np.ndarray  # (N, 2 C, h, w) of all clips' frames, as `stored_frames` returns it
    first_rows: Sequence[int]  # of each clip in `moments`
    sentences: torch.Tensor  # (clips, d): the text encoder's states of each label, averaged over its tokens
    mirrored_sentences: torch.Tensor  # the same with left and right swapped
    scaling_factor: float  # the VAE's

    def show(self, cuts: Sequence[Cut], mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The scaled latents (B, NUM_SEEN, C, h, w), sentence (B, d) and index of the last frame (B,) of B cuts.

        The latents of mirrored frames are not quite the mirrored latents, but near enough to learn from.
        """
        rows = []
        for index, cut in cuts:
            frames = self.clips[index].frames
            rows += [self.first_rows[index] + frames.index(frame) for frame in seen_frames(self.extracted[index], cut)]
        latents = torch.from_numpy(self.moments[rows, : self.moments.shape[1] // 2]) * self.scaling_factor
        latents = latents.reshape(len(cuts), NUM_SEEN, *latents.shape[1:])
        sentences = (self.mirrored_sentences if mirrored else self.sentences)[[index for index, _ in cuts]]
        indices = torch.tensor([float(cut) for _, cut in cuts])
        return latents.flip(-1) if mirrored else latents, sentences, indices


def encode_clips(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    resolution: int,
    cache_dir: Path,
    device: torch.device,
) -> SeenClips:
    """Passes all frames of the clips through the VAE and their labels through the text encoder, as training does it."""
    frames_hash = verify_frames(clips, resolution)
    moments, _ = stored_frames(pipeline, clips, frames_hash, False, cache_dir, device)
    own, mirrored = ([change(clip.label) for clip in clips] for change in (str, swap_left_and_right))
    labels = sorted({*own, *mirrored})
    states, _ = stored_prompts(pipeline, labels, cache_dir, device)
    is_word = (tokenize(pipeline, labels) != pipeline.tokenizer.pad_token_id).numpy()
    # One label at a time: the states of all would be gigabytes.
    pooled = {label: torch.from_numpy(state[words]).mean(dim=0) for label, state, words in zip(labels, states, is_word)}
    return SeenClips(
        clips=clips,
        extracted=[sorted(extracted_frames(clip.folder)) for clip in clips],
        moments=moments,
        first_rows=first_rows(clips),
        sentences=torch.stack([pooled[label] for label in own]),
        mirrored_sentences=torch.stack([pooled[label] for label in mirrored]),
        scaling_factor=pipeline.vae.config.scaling_factor,
    )


# The network and its file.


class ProgressNetwork(torch.nn.Module):
    """A small convolutional network over the seen latents, told the sentence and the last frame's index.

    Until it is trained it says `constant`, a share in 0..1, whatever it sees.
    """

    def __init__(self, latent_channels: int, text_width: int, constant: float) -> None:
        super().__init__()
        widths = [NUM_SEEN * latent_channels, WIDTH, 2 * WIDTH, 4 * WIDTH]
        layers: list[torch.nn.Module] = []
        for stride, inputs, outputs in zip((1, 2, 2), widths, widths[1:]):
            layers += [
                torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1),
                torch.nn.GroupNorm(8, outputs),
                torch.nn.SiLU(),
            ]
        self.look = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())
        # Few clips are easily memorized, above all by their sentences.
        self.read = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(text_width, 2 * WIDTH))
        self.count = torch.nn.Linear(2, 2 * WIDTH)
        self.join = torch.nn.Sequential(
            torch.nn.Dropout(0.5),
            torch.nn.Linear((9 * 4 + 4) * WIDTH, 4 * WIDTH),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.5),
        )
        self.say = torch.nn.Linear(4 * WIDTH, 1)
        torch.nn.init.zeros_(self.say.weight)
        torch.nn.init.constant_(self.say.bias, math.log(constant / (1 - constant)))

    def forward(self, latents: torch.Tensor, sentence: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
        """The share of the action that is done (B,), 0..1, of what `SeenClips.show` returns."""
        changes = latents[:, -1:] - latents[:, :-1]
        looked = self.look(torch.cat([latents[:, -1:], changes], dim=1).flatten(1, 2))
        counted = self.count(torch.stack([cut / 50, cut.log1p() / 4], dim=1))
        return self.say(self.join(torch.cat([looked, self.read(sentence), counted], dim=1)))[:, 0].sigmoid()


@dataclass(frozen=True)
class ProgressEstimator:
    """A network and its config: `resolution`, `latent_channels`, `text_width` and `hash_of_vae_and_text_encoder`, which
    it must meet again; `training_median` and `medians_by_start`, {start: share}, which it is compared with.
    """

    network: ProgressNetwork
    config: dict[str, Any]

    def estimate(self, seen: SeenClips, cuts: Sequence[Cut]) -> np.ndarray:
        """The share of the action done at each cut (N,), 0..1. On the CPU: the same for the same latents."""
        self.network.eval()
        with torch.no_grad():
            batches = [cuts[start : start + ESTIMATING_BATCH] for start in range(0, len(cuts), ESTIMATING_BATCH)]
            return torch.cat([self.network(*seen.show(batch)) for batch in batches]).numpy()


def hash_of_models(pipeline: StableDiffusionInstructPix2PixPipeline) -> str:
    return digest([*module_bytes(pipeline.vae), *module_bytes(pipeline.text_encoder)])


def save_estimator(estimator: ProgressEstimator, folder: Path) -> None:
    """Writes both files of an estimator, or neither."""
    make_folder(folder)
    with parts_replaced_together(folder, last=CONFIG) as new:
        save_file(estimator.network.state_dict(), new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(estimator.config, indent=1) + "\n", encoding="utf-8")


def load_estimator(
    folder: Path | str | None, pipeline: StableDiffusionInstructPix2PixPipeline, resolution: int
) -> ProgressEstimator:
    """Reads an estimator for frames of `resolution`, encoded by the pipeline's VAE and text encoder.

    Raises UserError where there is none, where its files are damaged, and where it was trained for others.
    """
    how_to_train = f"train one with: python -m pecn.progress train --resolution {resolution} --output_dir DIR"
    if folder is None:
        raise UserError(f"estimated progress needs an estimator (--progress_estimator DIR); {how_to_train}")
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no progress estimator (no {CONFIG}); {how_to_train}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        fits = config["resolution"] == resolution
        fits = fits and config["hash_of_vae_and_text_encoder"] == hash_of_models(pipeline)
        network = ProgressNetwork(config["latent_channels"], config["text_width"], config["training_median"])
        network.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:  # the list of what damaged files make the libraries raise is long
        raise UserError(f"the progress estimator {folder} is damaged ({one_line(error)}); {how_to_train}") from error
    if not fits:
        raise UserError(
            f"the progress estimator {folder} was trained for other frames ({config['resolution']} pixels wide, not"
            f" {resolution}), or another VAE or text encoder than this model's; {how_to_train}"
            " --pretrained_model_name_or_path MODEL"
        )
    return ProgressEstimator(network, config)


# Estimates for prompts.


def with_estimates(
    clips: Sequence[Clip],
    choice: FrameChoice,
    seed: int | None,
    folder: Path | str | None,
    pipeline: StableDiffusionInstructPix2PixPipeline,
    device: torch.device,
    cache_dir: Path | None = None,
) -> list[Clip]:
    """The clips with the progress that the estimator in `folder` sees, for the prompts of the pair that `seed` draws of
    each, or of all their pairs (None).

    With a `cache_dir` the latents are kept there, of all frames of the clips where these include what is seen.
    Raises UserError as `load_estimator` does, and where a frame that is seen cannot be read.
    """
    if not clips:
        return []
    with Image.open(clips[0].paths[0]) as image:
        resolution = image.width
    estimator = load_estimator(folder, pipeline, resolution)
    starts = [clip.starts(choice) if seed is None else {clip.drawn_pair(choice, seed)[0]} for clip in clips]
    shown = []
    for clip, cuts in zip(clips, starts):
        extracted = sorted(extracted_frames(clip.folder))
        needed = {frame for cut in cuts for frame in seen_frames(extracted, cut)}
        shown.append(clip if cache_dir and needed <= clip.frame_set else replace(clip, frames=tuple(sorted(needed))))
    temporary = contextlib.nullcontext(cache_dir) if cache_dir else tempfile.TemporaryDirectory()
    with temporary as store:
        seen = encode_clips(pipeline, shown, resolution, Path(store), device)
        all_cuts = [(index, cut) for index, cuts in enumerate(starts) for cut in sorted(cuts)]
        estimates = estimator.estimate(seen, all_cuts)
    progress: list[dict[int, int]] = [{} for _ in clips]
    for (index, cut), share in zip(all_cuts, estimates.tolist()):
        progress[index][cut] = progress_percent(share)
    return [replace(clip, estimated_progress=told) for clip, told in zip(clips, progress)]
