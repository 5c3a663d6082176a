"""What the frozen VAE and text encoder make of frames and prompts, in files that are read as they are used.

A file's name says all that determines its content, and a run that is stopped while it writes goes on from there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image, ImageOps
from tqdm import tqdm

from data.cli import UserError
from data.clips import Clip
from data.stored_array import stored_array
from pecn.model import encode_pictures, encode_prompts, tokenize
from pecn.processes import is_first_process

STORE_FORMAT = b"4"  # raise it when what the files hold changes
ENCODING_BATCH = 16  # frames, or prompts

Input = TypeVar("Input")


def encoded_cache(data_dir: Path, output_dir: Path) -> Path:
    """The folder for what is encoded: in the data directory, if that can be written to."""
    folder = data_dir / "encoded_cache"
    if not os.access(folder if folder.is_dir() else data_dir, os.W_OK):
        folder = output_dir / "encoded_cache"
        if is_first_process():
            print(f"{data_dir} cannot be written to: what is encoded is kept in {folder}")
    return folder


def first_rows(clips: Sequence[Clip]) -> list[int]:
    """The row of each clip's first frame in what `stored_frames` returns."""
    return [0, *itertools.accumulate(len(clip.frames) for clip in clips)][:-1]


def stored_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: Sequence[Clip],
    frames_hash: str,
    mirrored: bool,
    cache_dir: Path,
    device: torch.device,
) -> tuple[np.ndarray, str]:
    """The VAE's posterior of all frames of the clips, one after the other: mean and log variance, not scaled.

    Returns a float32 array (N, 2 C, h, w), a file in `cache_dir` that is written where it is missing, and its name.
    With `mirrored` the mirrored frames follow all others. `frames_hash` is that of `verify_frames`.
    """
    vae = pipeline.vae
    frames = [
        (path, flip) for flip in ([False, True] if mirrored else [False]) for clip in clips for path in clip.paths
    ]
    key = digest([STORE_FORMAT, *module_bytes(vae), frames_hash.encode(), bytes([mirrored])])
    with Image.open(frames[0][0]) as first:
        side = first.width // pipeline.vae_scale_factor

    def encode(batch: Sequence[tuple[Path, bool]]) -> torch.Tensor:
        pictures = [Image.open(path).convert("RGB") for path, _ in batch]
        pictures = [ImageOps.mirror(picture) if flip else picture for picture, (_, flip) in zip(pictures, batch)]
        return encode_pictures(pipeline, pictures).parameters

    def rows_from(done: int) -> Iterator[np.ndarray]:
        return encode_all(vae, encode, frames[done:], device)

    shape = (len(frames), 2 * vae.config.latent_channels, side, side)
    return stored_array(cache_dir / f"frames-{key}.npy", np.float32, shape, rows_from), key


def stored_prompts(
    pipeline: StableDiffusionInstructPix2PixPipeline, prompts: Sequence[str], cache_dir: Path, device: torch.device
) -> tuple[np.ndarray, str]:
    """The text encoder's states of the prompts, float32 (P, 77, d), and the name of their file, as `stored_frames`."""
    text_encoder, tokens = pipeline.text_encoder, tokenize(pipeline, prompts)
    key = digest([STORE_FORMAT, *module_bytes(text_encoder), tokens.numpy().tobytes()])

    def rows_from(done: int) -> Iterator[np.ndarray]:
        return encode_all(text_encoder, functools.partial(encode_prompts, pipeline), prompts[done:], device)

    shape = (*tokens.shape, text_encoder.config.hidden_size)
    return stored_array(cache_dir / f"prompts-{key}.npy", np.float32, shape, rows_from), key


def encode_all(
    model: torch.nn.Module,
    encode: Callable[[Sequence[Input]], torch.Tensor],
    inputs: Sequence[Input],
    device: torch.device,
) -> Iterator[np.ndarray]:
    """What `encode` makes of the inputs with one of a pipeline's models on `device`, some at a time."""
    model.to(device)
    with torch.no_grad():  # and no mixed precision: what is kept is float32, whatever training uses
        name = type(model).__name__
        with tqdm(total=len(inputs), desc=f"Encoding with {name}", unit="input") as bar:
            for start in range(0, len(inputs), ENCODING_BATCH):
                batch = inputs[start : start + ENCODING_BATCH]
                encoded = encode(batch)
                if not encoded.isfinite().all():
                    raise UserError(f"the model's {name} gives numbers that are not finite; name another model")
                yield encoded.float().cpu().numpy()
                bar.update(len(batch))
    model.to("cpu")


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
