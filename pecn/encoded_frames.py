"""The frames and prompts of a training run, passed once through the frozen VAE and text encoder, and its batches.

Training reads nothing else: `encode_once` fills (or finds) the cache, `TrainingBatches` draws from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Array2D, Array3D, Dataset, Features
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import ImageOps

from data.sthv2_dataset_hf import FramePair, derive_seed, frame_pairs_dataset, swap_left_and_right
from pecn.diffusion import conditioning_dropout, draw_timesteps
from pecn.model import encode_pictures, encode_prompts, tokenize

CACHE_FORMAT = 2  # raise it when what the cache stores changes
ENCODING_BATCH = 16  # frame pairs of 128 pixels, or prompts; fewer pairs of larger frames


@dataclass(frozen=True)
class EncodedPairs:
    """What the frozen models make of the frame pairs; no latents are scaled.

    `latents`: a row for each pair, and with mirroring one for each mirrored pair after them, with `input_latents`
    (C, h, w), the posterior's mode, `target_moments` (2 C, h, w), its mean and log variance, and `edit_prompt`.
    `embeddings`: a row for each distinct prompt, with `edit_prompt` and its `embedding` (77, d).
    `key` names all that determined the content.
    """

    latents: Dataset
    embeddings: Dataset
    num_pairs: int  # without the mirrored ones
    key: str


def encode_once(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: Sequence[FramePair],
    frames_hash: str,
    random_flip: bool,
    cache_dir: Path,
    accelerator: Accelerator,
) -> EncodedPairs:
    """Passes all frames and prompts through the VAE and the text encoder, or finds that done in the cache.

    With `random_flip` mirrored pairs are added. The cache is keyed by all that determines its content: weights,
    precision, prompts and the bytes of the frames (`frames_hash`, as `verify_frames` gives it).
    """
    mirrored_pairs = [replace(pair, edit_prompt=swap_left_and_right(pair.edit_prompt)) for pair in pairs]
    rows = [*pairs, *(mirrored_pairs if random_flip else [])]
    frames = frame_pairs_dataset(rows).select_columns(["input_image", "edited_image", "edit_prompt"])
    frames = frames.add_column("mirrored", [row >= len(pairs) for row in range(len(rows))])
    prompts = sorted({"", *frames["edit_prompt"]})

    precision = f"format {CACHE_FORMAT}, {accelerator.mixed_precision} on {accelerator.device.type}".encode()
    frames_key = digest([precision, *module_bytes(pipeline.vae), bytes(frames["mirrored"]), frames_hash.encode()])
    prompts_key = digest(
        [precision, *module_bytes(pipeline.text_encoder), tokenize(pipeline, prompts).numpy().tobytes()]
    )
    with accelerator.main_process_first():
        cache_dir.mkdir(exist_ok=True)
        latents = encode_frames(pipeline, frames, cache_dir / f"frames-{frames_key}.arrow", frames_key, accelerator)
        embeddings = encode_texts(
            pipeline, prompts, cache_dir / f"prompts-{prompts_key}.arrow", prompts_key, accelerator
        )
    order = json.dumps(list(frames["edit_prompt"])).encode()  # which prompt belongs to which pair
    # The prompts are no part of what is kept: texts that give the same tokens share an embedding.
    latents = latents.add_column("edit_prompt", list(frames["edit_prompt"]))
    embeddings = embeddings.add_column("edit_prompt", prompts)
    return EncodedPairs(latents, embeddings, len(pairs), digest([frames_key.encode(), prompts_key.encode(), order]))


def digest(parts: Iterable[bytes]) -> str:
    """A short name for some bytes: equal names mean equal bytes."""
    return hashlib.blake2b(b"".join(hashlib.sha256(part).digest() for part in parts), digest_size=16).hexdigest()


def module_bytes(module: torch.nn.Module) -> Iterator[bytes]:
    """Everything that determines what a frozen model computes: its configuration and its weights."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    # Where the model was found and what wrote it down does not change what it computes.
    notes = {"transformers_version", "architectures", "dtype"}
    config = {name: value for name, value in config.items() if name[0] != "_" and name not in notes}
    yield json.dumps(config, sort_keys=True, default=str).encode()
    for name, tensor in sorted(module.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def encode_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    frames: Dataset,
    cache_file: Path,
    key: str,
    accelerator: Accelerator,
) -> Dataset:
    vae, height = pipeline.vae, frames[0]["input_image"].height
    side, channels = height // pipeline.vae_scale_factor, vae.config.latent_channels

    @torch.no_grad()
    def encode(batch: dict[str, list]) -> dict[str, Any]:
        pictures = batch["input_image"] + batch["edited_image"]
        pictures = [ImageOps.mirror(p) if mirrored else p for p, mirrored in zip(pictures, batch["mirrored"] * 2)]
        with accelerator.autocast():
            posterior = encode_pictures(pipeline, pictures)
        half = len(pictures) // 2
        return {
            "input_latents": posterior.mode()[:half].float().cpu().numpy(),
            "target_moments": posterior.parameters[half:].float().cpu().numpy(),
        }

    if not cache_file.is_file():
        vae.to(accelerator.device)
    encoded = frames.map(
        encode,
        batched=True,
        batch_size=max(1, ENCODING_BATCH * 128**2 // height**2),
        remove_columns=frames.column_names,
        features=Features(
            input_latents=Array3D((channels, side, side), "float32"),
            target_moments=Array3D((2 * channels, side, side), "float32"),
        ),
        cache_file_name=str(cache_file),
        new_fingerprint=key,
        desc="Encoding frames",
    )
    vae.to("cpu")
    return encoded


def encode_texts(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    prompts: Sequence[str],
    cache_file: Path,
    key: str,
    accelerator: Accelerator,
) -> Dataset:
    text_encoder = pipeline.text_encoder

    @torch.no_grad()
    def encode(batch: dict[str, list]) -> dict[str, Any]:
        with accelerator.autocast():
            return {"embedding": encode_prompts(pipeline, batch["edit_prompt"]).float().cpu().numpy()}

    if not cache_file.is_file():
        text_encoder.to(accelerator.device)
    shape = (pipeline.tokenizer.model_max_length, text_encoder.config.hidden_size)
    encoded = Dataset.from_dict({"edit_prompt": list(prompts)}).map(
        encode,
        batched=True,
        batch_size=ENCODING_BATCH,
        remove_columns=["edit_prompt"],
        features=Features(embedding=Array2D(shape, "float32")),
        cache_file_name=str(cache_file),
        new_fingerprint=key,
        desc="Encoding prompts",
    )
    text_encoder.to("cpu")
    return encoded


class TrainingBatches(torch.utils.data.Dataset):
    """The micro-batches of a whole run, for a DataLoader: item k is the k-th pass of this process.

    Samples are drawn as one endless stream of epochs, each a new permutation. Everything random in an optimizer
    step is drawn for its whole global batch from a generator seeded by (seed, step), of which each process takes
    its share: nothing depends on how often a generator was called before, or on how the batch is divided.
    """

    def __init__(
        self,
        encoded: EncodedPairs,
        *,
        seed: int,
        train_batch_size: int,  # samples of one process in one pass
        gradient_accumulation_steps: int,  # passes in a step
        num_train_epochs: int,
        max_train_steps: int | None,  # overrides num_train_epochs
        scaling_factor: float,  # the VAE's, for target latents
        num_train_timesteps: int,
        weights_of_timesteps: torch.Tensor | None = None,
        conditioning_dropout_prob: float = 0.0,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        row_of_prompt = {prompt: row for row, prompt in enumerate(encoded.embeddings["edit_prompt"])}
        self.prompt_rows = [row_of_prompt[prompt] for prompt in encoded.latents["edit_prompt"]]
        self.empty_prompt_row = row_of_prompt[""]
        self.latents = encoded.latents.select_columns(["input_latents", "target_moments"]).with_format("numpy")
        self.embeddings = encoded.embeddings.select_columns(["embedding"]).with_format("numpy")
        self.num_samples = encoded.num_pairs
        self.random_flip = len(encoded.latents) > encoded.num_pairs
        self.seed, self.size, self.passes = seed, train_batch_size, gradient_accumulation_steps
        self.scaling_factor, self.conditioning_dropout_prob = scaling_factor, conditioning_dropout_prob
        self.num_train_timesteps, self.weights_of_timesteps = num_train_timesteps, weights_of_timesteps
        self.num_processes, self.process_index = num_processes, process_index
        self.global_batch_size = train_batch_size * num_processes * gradient_accumulation_steps
        self.max_train_steps = max_train_steps or math.ceil(
            num_train_epochs * self.num_samples / self.global_batch_size
        )
        self.permutations: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self.max_train_steps * self.passes

    def ends_epochs(self, step: int, num_epochs: int) -> bool:
        """Whether a multiple of `num_epochs` epochs is complete with the optimizer step (counted from 1)."""
        samples_between = num_epochs * self.num_samples
        return step * self.global_batch_size // samples_between > (step - 1) * self.global_batch_size // samples_between

    def samples_of_step(self, step: int) -> list[int]:
        """Which frame pairs the optimizer step (counted from 0) sees, over all processes."""
        positions = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        return [int(self.permutation(p // self.num_samples)[p % self.num_samples]) for p in positions]

    def permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self.permutations:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self.permutations = {epoch: torch.randperm(self.num_samples, generator=generator)}
        return self.permutations[epoch]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`target_latents` (B, C, h, w), scaled; `image_latents` (B, C, h, w), not scaled, 0 where dropped;
        `prompt_embeds` (B, 77, d); `noise` (B, C, h, w); `timesteps` (B,)."""
        step, part = divmod(index, self.passes)
        start = (part * self.num_processes + self.process_index) * self.size
        mine = slice(start, start + self.size)

        shape = (self.global_batch_size, *self.latents.features["input_latents"].shape)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", step))
        noise = torch.randn(shape, generator=generator)[mine]
        posterior_noise = torch.randn(shape, generator=generator)[mine]
        timesteps = draw_timesteps(shape[0], self.num_train_timesteps, self.weights_of_timesteps, generator)[mine]
        dropout = torch.rand(shape[:1], generator=generator)[mine]
        flip = torch.rand(shape[:1], generator=generator)[mine] < 0.5

        rows = self.samples_of_step(step)[mine]
        if self.random_flip:
            rows = [row + self.num_samples * int(flipped) for row, flipped in zip(rows, flip)]
        frames = self.latents[rows]
        mean, logvar = torch.from_numpy(frames["target_moments"]).chunk(2, dim=1)
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        target_latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * posterior_noise

        drop_text, drop_image = conditioning_dropout(dropout, self.conditioning_dropout_prob)
        prompt_rows = [self.empty_prompt_row if drop else self.prompt_rows[row] for row, drop in zip(rows, drop_text)]
        image_latents = torch.from_numpy(frames["input_latents"]) * ~drop_image[:, None, None, None]
        return {
            "target_latents": target_latents * self.scaling_factor,
            "image_latents": image_latents,
            "prompt_embeds": torch.from_numpy(self.embeddings[prompt_rows]["embedding"]),
            "noise": noise,
            "timesteps": timesteps,
        }


def load_batches(
    batches: TrainingBatches, first_step: int, device: torch.device, num_workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches from optimizer step `first_step` (counted from 0) to the end, on `device`."""
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(first_step * batches.passes, len(batches)),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
