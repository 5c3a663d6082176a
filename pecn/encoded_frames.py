"""The frames and prompts of a training run, passed once through the frozen VAE and text encoder, and its batches.

Training reads nothing else: `encode_once` fills (or finds) the files of pecn/frame_store.py, `TrainingBatches` draws
from them. A frame is encoded once, in however many pairs it takes part.
"""

from __future__ import annotations

import functools
import json
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from data.clips import Clip, FrameChoice, derive_seed
from data.prompts import swap_left_and_right
from pecn.diffusion import conditioning_dropout
from pecn.frame_store import digest, first_rows, stored_frames, stored_prompts
from pecn.model import encode_prompts


@dataclass(frozen=True)
class EncodedClips:
    """What the frozen models make of the clips: arrays in files, float32, read as they are used."""

    clips: Sequence[Clip]
    choice: FrameChoice  # which pairs the clips offer
    moments: np.ndarray  # (N, 2 C, h, w): each frame's posterior, mean and log variance, not scaled
    first_rows: list[int]  # of each clip in `moments`
    mirrored_rows: int | None  # where the mirrored frames begin; None where there are none
    embeddings: np.ndarray | None  # (P, 77, d) of `prompts`; None where they are encoded anew in each step
    prompts: dict[str, int]  # their rows, the empty one's is 0
    key: str  # names all that determines the content

    def draw(self, index: int, for_horizon: float, for_start: float, mirrored: bool) -> tuple[int, int, str]:
        """A pair of the clip, chosen by two numbers in [0, 1): the rows of its two frames, and its prompt."""
        clip = self.clips[index]
        start, horizon = self.choice.draw(clip.frame_set, for_horizon, for_start)
        first_row = self.first_rows[index] + (self.mirrored_rows if mirrored else 0)
        rows = (first_row + clip.frames.index(frame) for frame in (start, start + horizon))
        prompt = clip.prompt(self.choice, start, horizon)
        return *rows, swap_left_and_right(prompt) if mirrored else prompt


def encode_once(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    choice: FrameChoice,
    frames_hash: str,
    random_flip: bool,
    cache_dir: Path,
    accelerator: Accelerator,
) -> EncodedClips:
    """Passes all frames of the clips through the VAE, and their prompts through the text encoder where each has one.

    What `cache_dir` holds already is not done again. With `random_flip` mirrored frames are added. Where pairs of a
    clip differ in their prompts, these are too many to keep: they are encoded as they are drawn.
    """
    prompts = [""]
    if choice.has_one_prompt:
        own = [clip.prompt(choice, *choice.draw(clip.frame_set, 0, 0)) for clip in clips]
        prompts = sorted({"", *own, *(map(swap_left_and_right, own) if random_flip else ())})
    # Then the first one of each machine, which finds nothing where machines share no files.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        moments, frames_key = stored_frames(pipeline, clips, frames_hash, random_flip, cache_dir, accelerator.device)
        embeddings, prompts_key = stored_prompts(pipeline, prompts, cache_dir, accelerator.device)
    told = [(clip.label, clip.num_frames, clip.frames, clip.estimated_progress) for clip in clips]
    contents = json.dumps([asdict(choice) | {"horizons": list(choice.horizons)}, told]).encode()
    return EncodedClips(
        clips=clips,
        choice=choice,
        moments=moments,
        first_rows=first_rows(clips),
        mirrored_rows=len(moments) // 2 if random_flip else None,
        embeddings=embeddings if choice.has_one_prompt else None,
        prompts={prompt: row for row, prompt in enumerate(prompts)},
        key=digest([frames_key.encode(), prompts_key.encode(), contents]),
    )


@dataclass(eq=False, kw_only=True)
class TrainingBatches(torch.utils.data.Dataset):
    """The micro-batches of a whole run, for a DataLoader: item k is the k-th pass of this process.

    Samples are drawn as one endless stream of epochs, each a new permutation of the clips; which of a clip's pairs is
    seen is drawn each time. Everything random in an optimizer step is drawn for its whole global batch from a generator
    seeded by (seed, step), of which each process takes its share: nothing depends on how often a generator was called
    before, or on how the batch is divided.
    """

    encoded: EncodedClips
    seed: int
    train_batch_size: int  # samples of one process in one pass
    gradient_accumulation_steps: int  # passes in a step
    num_train_epochs: int
    max_train_steps: int | None  # overrides num_train_epochs
    scaling_factor: float  # the VAE's, for target latents
    num_train_timesteps: int
    conditioning_dropout_prob: float = 0.0
    input_noise: float = 0.0  # most noise in the input frame's latents, as a standard deviation of scaled latents
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        self.num_samples = len(self.encoded.clips)
        self.global_batch_size = self.train_batch_size * self.num_processes * self.gradient_accumulation_steps
        if self.max_train_steps is None:
            self.max_train_steps = math.ceil(self.num_train_epochs * self.num_samples / self.global_batch_size)

    def __len__(self) -> int:
        return self.max_train_steps * self.gradient_accumulation_steps

    def ends_epochs(self, step: int, num_epochs: int) -> bool:
        """Whether a multiple of `num_epochs` epochs is complete with the optimizer step (counted from 1)."""
        samples_between = num_epochs * self.num_samples
        return step * self.global_batch_size // samples_between > (step - 1) * self.global_batch_size // samples_between

    def samples_of_step(self, step: int) -> list[int]:
        """Which clips the optimizer step (counted from 0) sees, over all processes."""
        positions = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs_and_places = [divmod(position, self.num_samples) for position in positions]
        return [order_of_epoch(self.num_samples, self.seed, epoch)[place] for epoch, place in epochs_and_places]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`target_latents` (B, C, h, w), scaled; `image_latents` (B, C, h, w), not scaled, 0 where dropped;
        `prompt_embeds` (B, 77, d), or the B `prompts` that are to be encoded; `noise` (B, C, h, w); `timesteps` (B,).
        """
        step, pass_index = divmod(index, self.gradient_accumulation_steps)
        start = (pass_index * self.num_processes + self.process_index) * self.train_batch_size
        share = slice(start, start + self.train_batch_size)  # of the global batch

        encoded, size = self.encoded, self.global_batch_size
        channels, *sides = encoded.moments.shape[1:]
        shape = (size, channels // 2, *sides)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", step))
        noise = torch.randn(shape, generator=generator)[share]
        posterior_noise = torch.randn(shape, generator=generator)[share]
        timesteps = torch.randint(self.num_train_timesteps, (size,), generator=generator)[share]
        dropout = torch.rand(size, generator=generator)[share]
        mirrored = (torch.rand(size, generator=generator)[share] < 0.5) & (encoded.mirrored_rows is not None)
        for_pairs = torch.rand(size, 2, generator=generator)[share]

        samples = zip(self.samples_of_step(step)[share], for_pairs.tolist(), mirrored.tolist())
        drawn = [encoded.draw(clip, *numbers, flipped) for clip, numbers, flipped in samples]
        input_rows, target_rows, prompts = zip(*drawn)
        image_latents = torch.from_numpy(encoded.moments[list(input_rows), : channels // 2])  # the posterior's mode
        posterior = DiagonalGaussianDistribution(torch.from_numpy(encoded.moments[list(target_rows)]))
        target_latents = posterior.mean + posterior.std * posterior_noise
        if self.input_noise:
            strength = self.input_noise / self.scaling_factor * torch.rand(size, 1, 1, 1, generator=generator)[share]
            image_latents = image_latents + strength * torch.randn(shape, generator=generator)[share]

        drop_text, drop_image = conditioning_dropout(dropout, self.conditioning_dropout_prob)
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, drop_text.tolist())]
        batch = {
            "target_latents": target_latents * self.scaling_factor,
            "image_latents": image_latents * ~drop_image[:, None, None, None],
            "noise": noise,
            "timesteps": timesteps,
        }
        if encoded.embeddings is None:
            return batch | {"prompts": prompts}
        rows = [encoded.prompts[prompt] for prompt in prompts]
        return batch | {"prompt_embeds": torch.from_numpy(encoded.embeddings[rows])}


@functools.lru_cache(maxsize=1)
def order_of_epoch(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch (counted from 0) sees the clips."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


def leave_sigterm_to_the_main_process(_worker: int) -> None:
    """In a worker, in place of torch's handler: a signal to all processes would end it before the step is saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_batches(
    batches: TrainingBatches,
    steps_done: int,
    device: torch.device,
    pipeline: StableDiffusionInstructPix2PixPipeline,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches after the first `steps_done` optimizer steps, to the end, on `device`.

    Prompts that are not kept encoded pass through the pipeline's text encoder here.
    """
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(steps_done * batches.gradient_accumulation_steps, len(batches)),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if num_workers else None,  # other ways would copy the files' content
        worker_init_fn=leave_sigterm_to_the_main_process,
    )
    for batch in loader:
        prompts = batch.pop("prompts", None)
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if prompts is not None:
            pipeline.text_encoder.to(device)  # a validation puts it away
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                batch["prompt_embeds"] = encode_prompts(pipeline, prompts)
        yield batch
