"""Pre-training of the demo's VAE, and the latents of all frames."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

from data.clips import derive_seed
from demo.pretraining.clips import StoredClips, pick_size
from demo.pretraining.stages import fast_arithmetic, memory_format, step_generator, train_stage
from pecn.encoded_frames import stored_array
from pecn.model import digest, module_bytes

CROP = 64  # pixels
CROPPED_SHARE = 0.85  # of the steps train on crops, the last ones on whole frames
KL_WEIGHT = 1e-3  # enough to keep the latents bounded
ENCODING_BATCH = 64


def to_pictures(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    pictures = torch.from_numpy(np.array(frames)).to(device).permute(0, 3, 1, 2)
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=memory_format(device))


def vae_batch(sizes: Sequence[StoredClips], step: int, seed: int, batch_size: int, cropped: bool) -> np.ndarray:
    """Training frames of one size, mirrored half of the time, cropped to CROP if `cropped`: uint8 (B, H, W, 3)."""
    rng = np.random.default_rng(derive_seed(seed, "vae batch", step))
    stored = pick_size(sizes, rng)
    training = stored.training_rows
    frames = stored.rows[rng.integers(training.start, training.stop, batch_size)]
    if cropped:
        top, left = rng.integers(0, frames.shape[1] - CROP + 1, 2)
        frames = frames[:, top : top + CROP, left : left + CROP]
    return frames[:, :, ::-1] if rng.random() < 0.5 else frames


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean over pictures of the squared error's logarithm (so of PSNR), plus the weighted KL divergence."""
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pictures.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    squared_error = (decoded.float() - pictures).square().mean(dim=(1, 2, 3))
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return (squared_error + 1e-5).log().mean() + KL_WEIGHT * divergence


def train_vae(vae: AutoencoderKL, sizes: Sequence[StoredClips], args: argparse.Namespace, logs: SummaryWriter) -> None:
    """Trains the VAE in place."""

    def loss_of_step(step: int) -> torch.Tensor:
        cropped = step < CROPPED_SHARE * args.vae_train_steps
        pictures = to_pictures(vae_batch(sizes, step, args.seed, args.vae_batch_size, cropped), vae.device)
        with fast_arithmetic(vae.device):
            return vae_loss(vae, pictures, step_generator(args.seed, "vae noise", step))

    train_stage("vae", vae, loss_of_step, args, logs, learning_rate=1e-3, weight_decay=1e-4, warmup_steps=100)


def encoded_clips(vae: AutoencoderKL, frames: StoredClips, args: argparse.Namespace) -> StoredClips:
    """The latents of all frames; encoded if the work folder does not have those of this VAE."""
    device, num_frames, side = vae.device, *frames.rows.shape[:2]
    weights = digest(module_bytes(vae.to("cpu")))
    side_of_latents = side // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (num_frames, 2 * vae.config.latent_channels, side_of_latents, side_of_latents)
    path = args.work_dir / f"latents-{side}-of-{args.num_clips}-clips-{weights}.npy"
    return replace(frames, rows=stored_array(path, np.float16, shape, encode_all(vae.to(device), frames.rows)))


@torch.no_grad()
def encode_all(vae: AutoencoderKL, frames: np.ndarray) -> Iterator[np.ndarray]:
    """The posterior's means and log variances of uint8 frames (N, H, W, 3), batch by batch."""
    for start in trange(0, len(frames), ENCODING_BATCH, desc=f"encoding at {frames.shape[1]} pixels", unit="batch"):
        pictures = to_pictures(frames[start : start + ENCODING_BATCH], vae.device)
        yield vae.encode(pictures).latent_dist.parameters.cpu().numpy()


def latent_scaling_factor(sizes: Sequence[StoredClips]) -> float:
    """1 / the standard deviation of the training clips' latents, over all channels, as in latent diffusion."""
    some = [stored.rows[stored.training_rows.start :: 37] for stored in sizes]  # neighbors are nearly the same
    means = np.concatenate([rows[:, : rows.shape[1] // 2].astype(np.float32).ravel() for rows in some])
    return round(1 / float(means.std()), 5)
