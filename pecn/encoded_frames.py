"""The frames and prompts of a training run, passed once through the frozen VAE and text encoder, and its batches.

Training reads nothing else: `encode_once` fills (or finds) the cache, `TrainingBatches` draws from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Array2D, Array3D, Dataset, Features
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import ImageOps

from data.layout import UserError
from data.sthv2_dataset_hf import FramePair, derive_seed, frame_pairs_dataset, swap_left_and_right
from pecn.diffusion import conditioning_dropout
from pecn.model import encode_pictures, encode_prompts, tokenize

CACHE_FORMAT = b"3"  # raise it when what the cache stores changes
ENCODING_BATCH = 8  # frame pairs, or prompts


@dataclass(frozen=True)
class EncodedPairs:
    """What the frozen models make of the frame pairs, in memory, float32; no latents are scaled.

    A row for each pair, and with mirroring one for each mirrored pair after them. `key` names all that determined
    the content.
    """

    input_latents: torch.Tensor  # (N, C, h, w), the posterior's mode
    target_moments: torch.Tensor  # (N, 2 C, h, w), its mean and log variance
    embeddings: torch.Tensor  # (P, 77, d), a row for each distinct prompt, the empty one first
    prompt_rows: list[int]  # for each of the N rows the row of its prompt
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
    prompts and the bytes of the frames (`frames_hash`, as `verify_frames` gives it).
    """
    mirrored_pairs = [replace(pair, edit_prompt=swap_left_and_right(pair.edit_prompt)) for pair in pairs]
    rows = [*pairs, *(mirrored_pairs if random_flip else [])]
    frames = frame_pairs_dataset(rows).add_column("mirrored", [row >= len(pairs) for row in range(len(rows))])
    prompts = sorted({"", *(pair.edit_prompt for pair in rows)})
    row_of_prompt = {prompt: row for row, prompt in enumerate(prompts)}
    prompt_rows = [row_of_prompt[pair.edit_prompt] for pair in rows]
    texts, tokens = Dataset.from_dict({"edit_prompt": prompts}), tokenize(pipeline, prompts)

    vae, text_encoder = pipeline.vae, pipeline.text_encoder
    frames_key = digest([CACHE_FORMAT, *module_bytes(vae), frames_hash.encode(), bytes(frames["mirrored"])])
    prompts_key = digest([CACHE_FORMAT, *module_bytes(text_encoder), tokens.numpy().tobytes()])
    channels, side = vae.config.latent_channels, frames[0]["input_image"].height // pipeline.vae_scale_factor
    latents_features = Features(
        input_latents=Array3D((channels, side, side), "float32"),
        target_moments=Array3D((2 * channels, side, side), "float32"),
    )
    embeddings_features = Features(embeddings=Array2D((tokens.shape[1], text_encoder.config.hidden_size), "float32"))
    # Then the first one of each machine, which finds nothing where machines share no files.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        cache_dir.mkdir(exist_ok=True)
        frames_file, prompts_file = cache_dir / f"frames-{frames_key}.arrow", cache_dir / f"prompts-{prompts_key}.arrow"
        latents = encode_all(pipeline, vae, encode_frames, frames, latents_features, frames_file, accelerator.device)
        embeddings = encode_all(
            pipeline, text_encoder, encode_texts, texts, embeddings_features, prompts_file, accelerator.device
        )
    key = digest([frames_key.encode(), prompts_key.encode(), json.dumps(prompt_rows).encode()])
    return EncodedPairs(**latents, **embeddings, prompt_rows=prompt_rows, num_pairs=len(pairs), key=key)


def encode_frames(pipeline: StableDiffusionInstructPix2PixPipeline, pairs: dict[str, list]) -> dict[str, torch.Tensor]:
    pictures = pairs["input_image"] + pairs["edited_image"]
    pictures = [ImageOps.mirror(p) if mirrored else p for p, mirrored in zip(pictures, pairs["mirrored"] * 2)]
    posterior, half = encode_pictures(pipeline, pictures), len(pictures) // 2
    return {"input_latents": posterior.mode()[:half], "target_moments": posterior.parameters[half:]}


def encode_texts(pipeline: StableDiffusionInstructPix2PixPipeline, texts: dict[str, list]) -> dict[str, torch.Tensor]:
    return {"embeddings": encode_prompts(pipeline, texts["edit_prompt"])}


def encode_all(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    model: torch.nn.Module,
    encode: Callable[[StableDiffusionInstructPix2PixPipeline, dict[str, list]], dict[str, torch.Tensor]],
    inputs: Dataset,
    features: Features,
    cache_file: Path,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What `encode` makes of the inputs with one of the pipeline's models on `device`, or what the cache file holds."""

    def encode_batch(batch: dict[str, list]) -> dict[str, np.ndarray]:
        encoded = encode(pipeline, batch)
        if not all(tensor.isfinite().all() for tensor in encoded.values()):
            raise UserError(f"the model's {type(model).__name__} gives numbers that are not finite; name another model")
        return {name: tensor.cpu().numpy() for name, tensor in encoded.items()}

    model.to(device)
    with torch.no_grad():  # and no mixed precision: what is kept depends on neither the device nor the options
        encoded = inputs.map(
            encode_batch,
            batched=True,
            batch_size=ENCODING_BATCH,
            remove_columns=inputs.column_names,
            features=features,
            cache_file_name=str(cache_file),
            new_fingerprint=cache_file.stem,
            desc=f"Encoding with {type(model).__name__}",
        )
    model.to("cpu")
    return encoded.with_format("torch")[:]


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


@dataclass(eq=False, kw_only=True)
class TrainingBatches(torch.utils.data.Dataset):
    """The micro-batches of a whole run, for a DataLoader: item k is the k-th pass of this process.

    Samples are drawn as one endless stream of epochs, each a new permutation. Everything random in an optimizer
    step is drawn for its whole global batch from a generator seeded by (seed, step), of which each process takes
    its share: nothing depends on how often a generator was called before, or on how the batch is divided.
    """

    encoded: EncodedPairs
    seed: int
    train_batch_size: int  # samples of one process in one pass
    gradient_accumulation_steps: int  # passes in a step
    num_train_epochs: int
    max_train_steps: int | None  # overrides num_train_epochs
    scaling_factor: float  # the VAE's, for target latents
    num_train_timesteps: int
    conditioning_dropout_prob: float = 0.0
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        self.num_samples = self.encoded.num_pairs
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
        """Which frame pairs the optimizer step (counted from 0) sees, over all processes."""
        positions = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs_and_places = [divmod(position, self.num_samples) for position in positions]
        return [order_of_epoch(self.num_samples, self.seed, epoch)[place] for epoch, place in epochs_and_places]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`target_latents` (B, C, h, w), scaled; `image_latents` (B, C, h, w), not scaled, 0 where dropped;
        `prompt_embeds` (B, 77, d); `noise` (B, C, h, w); `timesteps` (B,)."""
        step, pass_index = divmod(index, self.gradient_accumulation_steps)
        start = (pass_index * self.num_processes + self.process_index) * self.train_batch_size
        share = slice(start, start + self.train_batch_size)  # of the global batch

        shape = (self.global_batch_size, *self.encoded.input_latents.shape[1:])
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", step))
        noise = torch.randn(shape, generator=generator)[share]
        posterior_noise = torch.randn(shape, generator=generator)[share]
        timesteps = torch.randint(self.num_train_timesteps, shape[:1], generator=generator)[share]
        dropout = torch.rand(shape[:1], generator=generator)[share]
        flip = torch.rand(shape[:1], generator=generator)[share] < 0.5

        rows = self.samples_of_step(step)[share]
        if len(self.encoded.prompt_rows) > self.num_samples:  # there are mirrored pairs
            rows = [row + self.num_samples * int(flipped) for row, flipped in zip(rows, flip)]
        mean, logvar = self.encoded.target_moments[rows].chunk(2, dim=1)
        # The bounds are those of diffusers' DiagonalGaussianDistribution.
        target_latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * posterior_noise

        drop_text, drop_image = conditioning_dropout(dropout, self.conditioning_dropout_prob)
        prompt_rows = [0 if drop else self.encoded.prompt_rows[row] for row, drop in zip(rows, drop_text)]
        return {
            "target_latents": target_latents * self.scaling_factor,
            "image_latents": self.encoded.input_latents[rows] * ~drop_image[:, None, None, None],
            "prompt_embeds": self.encoded.embeddings[prompt_rows],
            "noise": noise,
            "timesteps": timesteps,
        }


@functools.lru_cache(maxsize=1)
def order_of_epoch(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch (counted from 0) sees the frame pairs."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


def load_batches(
    batches: TrainingBatches, steps_done: int, device: torch.device, num_workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches after the first `steps_done` optimizer steps, to the end, on `device`."""
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(steps_done * batches.gradient_accumulation_steps, len(batches)),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
