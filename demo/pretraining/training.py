"""Pre-training of the demo's base model on rendered clips: the VAE, the text encoder, then the UNet.

`demo.make_model` runs it; `demo.pretraining.clips` renders the clips. What a step sees follows from the seed
and the step alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm import tqdm, trange

from data.sthv2_dataset_hf import action_progress, build_prompt, derive_seed
from demo.pretraining.clips import ClipFrames, render_held_out_clips, render_training_clips
from demo.pretraining.text_encoder import train_text_encoder
from pecn.diffusion import conditioning_dropout, diffusion_loss
from pecn.model import encode_prompts

MAX_HORIZON = 10  # frames between input and target
VAE_BATCH_SIZE, VAE_LEARNING_RATE, VAE_CROP = 6, 5e-4, 64
VAE_CROPPED_SHARE = 0.85  # of the steps see crops (more pictures for the same work), the rest whole frames
KL_WEIGHT = 1e-3  # a 40th of what a variational bound gives it: enough to keep the latents bounded
UNET_BATCH_SIZE, UNET_LEARNING_RATE = 16, 1e-3
CONDITIONING_DROPOUT = 0.05  # of the text alone, of both, and of the image alone
EMA_DECAY = 0.998


@dataclass
class EncodedClip:
    """`moments`: the VAE's posterior (len(indices), 8, R / 4, R / 4), means and log variances, unscaled."""

    label: str
    num_frames: int
    indices: list[int]
    moments: torch.Tensor

    def frame_pairs(self) -> list[tuple[int, int]]:
        """Positions in `indices` of every (input, target) that lies 1 to MAX_HORIZON frames apart."""
        marks = list(enumerate(self.indices))
        return [(i, j) for i, first in marks for j, second in marks if 1 <= second - first <= MAX_HORIZON]


def to_pictures(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 where it is fast: on a GPU, and on a CPU with matrix units (AMX). Elsewhere float32."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# The VAE.


def vae_batch(clips_by_resolution: dict[int, list[ClipFrames]], step: int, seed: int, cropped: bool) -> np.ndarray:
    """Frames of one resolution, mirrored at random, cropped to VAE_CROP if `cropped`: uint8 (B, H, W, 3)."""
    rng = np.random.default_rng(derive_seed(seed, "vae batch", step))
    clips = clips_by_resolution[_pick_resolution(clips_by_resolution, rng)]
    chosen = []
    for clip_index in rng.integers(0, len(clips), VAE_BATCH_SIZE):
        clip = clips[clip_index]
        frame = clip.frames[rng.integers(len(clip.frames))]
        if cropped:
            top, left = rng.integers(0, clip.resolution - VAE_CROP + 1, 2)
            frame = frame[top : top + VAE_CROP, left : left + VAE_CROP]
        chosen.append(frame[:, ::-1] if rng.random() < 0.5 else frame)
    return np.stack(chosen)


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mean over pictures of the squared error's logarithm (so of PSNR), plus the weighted KL divergence."""
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pictures.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    squared_error = (decoded.float() - pictures).square().mean(dim=(1, 2, 3))
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    return (squared_error + 1e-5).log().mean() + KL_WEIGHT * divergence


def train_vae(vae: AutoencoderKL, clips: list[ClipFrames], steps: int, seed: int, device: torch.device) -> None:
    """Trains the VAE in place (AdamW, cosine learning rate)."""
    vae.to(device, memory_format=torch.channels_last).train()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    clips_by_resolution = group_by_resolution(clips)
    for step in (bar := trange(steps, desc="training the VAE", unit="step")):
        batch = vae_batch(clips_by_resolution, step, seed, cropped=step < VAE_CROPPED_SHARE * steps)
        pictures = to_pictures(batch, device).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            loss = vae_loss(vae, pictures, step_generator(seed, "vae noise", step))
        _update(loss, optimizer, schedule, parameters)
        # 10 / ln 10 turns a natural logarithm into dB; pictures span 2, hence 4.
        decibels = 10 * np.log10(4) - 10 / np.log(10) * loss.item()
        bar.set_postfix_str(f"about {decibels:.1f} dB", refresh=False)
    vae.eval()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, clips: list[ClipFrames]) -> float:
    """Mean over all frames of the PSNR in dB, 8-bit, of decoding the posterior's mode, in float32."""
    scores = []
    for clip in clips:
        pictures = to_pictures(clip.frames, vae.device)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        restored = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).cpu().numpy()
        squared_error = np.square(restored - clip.frames.astype(np.float32)).mean(axis=(1, 2, 3))
        scores.extend(10 * np.log10(255**2 / squared_error))
    return float(np.mean(scores))


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, clips: list[ClipFrames]) -> list[EncodedClip]:
    """Every clip's frames through the encoder, once."""
    encoded = []
    for clip in tqdm(clips, desc="encoding", unit="clip"):
        moments = vae.encode(to_pictures(clip.frames, vae.device)).latent_dist.parameters.cpu()
        encoded.append(EncodedClip(clip.label, clip.num_frames, clip.indices, moments))
    return encoded


def latent_scaling_factor(encoded: Sequence[EncodedClip]) -> float:
    """1 / the standard deviation of the latents, over all clips and channels, as in latent diffusion."""
    means = torch.cat([clip.moments.chunk(2, dim=1)[0].flatten() for clip in encoded])
    return round(1 / means.std().item(), 5)


# The UNet.


@dataclass
class PairBatch:
    """`targets`: scaled latents (B, 4, h, w); `inputs`: unscaled latents, same shape; `prompts`: B texts."""

    targets: torch.Tensor
    inputs: torch.Tensor
    prompts: list[str]


def pair_batch(
    clips_by_resolution: dict[int, list[EncodedClip]], step: int, seed: int, scaling_factor: float
) -> PairBatch:
    """Frame pairs of one resolution, half of the prompts with progress; a pure function of (seed, step)."""
    rng = np.random.default_rng(derive_seed(seed, "pairs", step))
    clips = clips_by_resolution[_pick_resolution(clips_by_resolution, rng)]
    targets, inputs, prompts = [], [], []
    for clip_index in rng.integers(0, len(clips), UNET_BATCH_SIZE):
        clip = clips[clip_index]
        pairs = clip.frame_pairs()
        source, target = pairs[rng.integers(len(pairs))]
        progress = action_progress(clip.indices[source], clip.num_frames) if rng.random() < 0.5 else None
        targets.append(clip.moments[target])
        inputs.append(clip.moments[source])
        prompts.append(build_prompt(clip.label, progress))
    posterior = DiagonalGaussianDistribution(torch.stack(targets))
    noise = torch.randn(posterior.mean.shape, generator=step_generator(seed, "posterior", step))
    modes = DiagonalGaussianDistribution(torch.stack(inputs)).mode()
    return PairBatch((posterior.mean + posterior.std * noise) * scaling_factor, modes, prompts)


def drop_conditions(batch: PairBatch, generator: torch.Generator) -> PairBatch:
    """Empties the text, the image or both of some pairs."""
    uniform = torch.rand(len(batch.prompts), generator=generator)
    drop_text, drop_image = conditioning_dropout(uniform, CONDITIONING_DROPOUT)
    prompts = ["" if drop else prompt for drop, prompt in zip(drop_text.tolist(), batch.prompts, strict=True)]
    return PairBatch(batch.targets, batch.inputs * ~drop_image.view(-1, 1, 1, 1), prompts)


def draw_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (count,), mostly late ones: the motion is decided where little but noise is seen.

    75% lie in the last tenth, 8% in the first half; drawn evenly it would be 10% and 50%.
    """
    uniform = torch.rand(count, generator=generator)
    return (num_train_timesteps * (1 - uniform**8)).long().clamp(max=num_train_timesteps - 1)


def noised_batch(
    pipeline: StableDiffusionInstructPix2PixPipeline, batch: PairBatch, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What `diffusion_loss` takes, on the UNet's device; noise and timesteps come from `generator`."""
    device = pipeline.unet.device
    noise = torch.randn(batch.targets.shape, generator=generator)
    timesteps = draw_timesteps(len(batch.targets), pipeline.scheduler.config.num_train_timesteps, generator)
    latents = {"target_latents": batch.targets, "image_latents": batch.inputs, "noise": noise}
    latents = {name: value.to(device, memory_format=torch.channels_last) for name, value in latents.items()}
    with torch.no_grad():
        prompt_embeds = encode_prompts(pipeline, batch.prompts)
    return latents | {"timesteps": timesteps.to(device), "prompt_embeds": prompt_embeds}


def train_unet(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    clips: list[EncodedClip],
    steps: int,
    seed: int,
    device: torch.device,
) -> None:
    """Trains the UNet in place (AdamW, cosine learning rate) and leaves the EMA weights; the text encoder is frozen."""
    pipeline.text_encoder.to(device).eval()
    pipeline.unet.to(device, memory_format=torch.channels_last).train()
    parameters = list(pipeline.unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=UNET_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    averaged = EMAModel(parameters, decay=EMA_DECAY, use_ema_warmup=True, power=0.75)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clips_by_resolution = group_by_resolution(clips)
    recent = None
    for step in (bar := trange(steps, desc="training the UNet", unit="step")):
        batch = pair_batch(clips_by_resolution, step, seed, pipeline.vae.config.scaling_factor)
        generator = step_generator(seed, "unet", step)
        batch = drop_conditions(batch, generator)
        with autocast(device):
            loss = diffusion_loss(pipeline.unet, scheduler, noised_batch(pipeline, batch, generator))
        _update(loss, optimizer, schedule, parameters)
        averaged.step(parameters)
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {recent:.3f}", refresh=False)
    averaged.copy_to(parameters)
    pipeline.unet.eval()


@torch.no_grad()
def validation_loss(
    pipeline: StableDiffusionInstructPix2PixPipeline, clips: list[EncodedClip], seed: int, swap_prompts: bool = False
) -> float:
    """The loss over 20 batches of held-out pairs; pairs, noise and timesteps follow from the seed.

    `swap_prompts` gives each pair the prompt of the batch's next one: a model that ignores its text loses nothing.
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clips_by_resolution = group_by_resolution(clips)
    losses = []
    for step in range(20):
        batch = pair_batch(clips_by_resolution, step, seed + 1, pipeline.vae.config.scaling_factor)
        if swap_prompts:
            batch.prompts = batch.prompts[1:] + batch.prompts[:1]
        generator = step_generator(seed, "validation", step)
        losses.append(diffusion_loss(pipeline.unet, scheduler, noised_batch(pipeline, batch, generator)).item())
    return float(np.mean(losses))


# The whole recipe.


def pretrain(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    vae_steps: int,
    text_steps: int,
    unet_steps: int,
    num_clips: int,
    seed: int,
) -> None:
    """Renders `num_clips` clips, trains the pipeline's models in place, and prints figures and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds[what] = time.monotonic() - started

    with timed("rendering"):
        held_out = render_held_out_clips(max(2, num_clips // 10))
        clips = render_training_clips(num_clips)

    with timed("VAE"):
        if vae_steps:
            train_vae(pipeline.vae, clips, vae_steps, seed, device)
        pipeline.vae.to(device).eval()
    for size, clips_of_size in group_by_resolution(held_out).items():
        psnr = reconstruction_psnr(pipeline.vae, clips_of_size)
        print(f"VAE at {size} pixels, {len(clips_of_size)} held-out clips: {psnr:.2f} dB")

    with timed("text encoder"):
        if text_steps:
            share = train_text_encoder(pipeline, text_steps, num_clips, seed, device)
            print(f"text encoder: {share:.0%} of the last batch classified correctly")

    with timed("encoding"):
        encoded = encode_clips(pipeline.vae, clips if unet_steps else clips[:100])  # 100 give the scaling factor
        encoded_held_out = encode_clips(pipeline.vae, held_out)
        if vae_steps:
            pipeline.vae.register_to_config(scaling_factor=latent_scaling_factor(encoded))

    with timed("UNet"):
        if unet_steps:
            train_unet(pipeline, encoded, unet_steps, seed, device)
            loss = validation_loss(pipeline, encoded_held_out, seed)
            swapped = validation_loss(pipeline, encoded_held_out, seed, swap_prompts=True)
            print(f"held-out loss: {loss:.4f}; with each other's sentences: {swapped:.4f}")
    spent = ", ".join(f"{what} {value:.0f} s" for what, value in seconds.items())
    print(f"on {device.type} ({torch.get_num_threads()} threads): {spent}")


def group_by_resolution(clips: Sequence[ClipFrames | EncodedClip]) -> dict[int, list]:
    """Clips by the width of their frames or latents, since a batch holds one size."""
    groups: dict[int, list] = {}
    for clip in clips:
        width = (clip.frames if isinstance(clip, ClipFrames) else clip.moments).shape[2]
        groups.setdefault(width, []).append(clip)
    return groups


def step_generator(seed: int, use: str, step: int) -> torch.Generator:
    """A generator that depends on its arguments alone: step N is the same whatever came before."""
    return torch.Generator().manual_seed(derive_seed(seed, use, step))


def _pick_resolution(groups: dict[int, list], rng: np.random.Generator) -> int:
    """One of the sizes, as often as clips have it."""
    counts = np.array([len(clips) for clips in groups.values()], float)
    return list(groups)[rng.choice(len(groups), p=counts / counts.sum())]


def _update(
    loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: object, parameters: list[torch.nn.Parameter]
) -> None:
    """One optimizer step with gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
