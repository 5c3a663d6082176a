"""Pre-training of the demo's UNet on the latents of frame pairs."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn.functional import avg_pool2d
from torch.utils.tensorboard import SummaryWriter

from data.clips import DEFAULT_INPUT_FRAME_IDX, derive_seed
from data.prompts import action_progress, build_prompt
from demo.pretraining.clips import Clip, StoredClips, pick_size
from demo.pretraining.stages import fast_arithmetic, memory_format, step_generator, train_stage
from demo.pretraining.text_encoder import MAX_HORIZON, TOLD
from pecn.diffusion import conditioning_dropout, diffusion_loss
from pecn.model import Pipeline, encode_prompts

CONDITIONING_DROPOUT = 0.05  # of the text alone, of both, and of the image alone
NEXT_FRAME = 0.4  # share of the pairs without a told horizon that get 1: the scripts' default, whose prompts tell none
USUAL_START = 0.5  # share of the pairs from the scripts' own start, where progress tells a clip's speed; else any start
LAST_TIMESTEP = 0.1  # share of the samples at the last timestep, all noise, where the motion is decided
WINDOW = 16  # side of the windows of latents that most steps train on
WHOLE_FRAMES = 0.25  # share of the steps that train on whole frames
GUIDANCE = 3.0  # what the UNet learns to do in one pass in the last stage, on whole frames alone


def draw_pairs(clips: Sequence[Clip], count: int, rng: np.random.Generator) -> tuple[list[int], list[int], list[str]]:
    """Frame pairs 1 to MAX_HORIZON frames apart: the rows of inputs and targets, and the prompts."""
    lengths = np.array([clip.num_frames for clip in clips])
    inputs, targets, prompts = [], [], []
    for index in rng.choice(len(clips), count, p=lengths / lengths.sum()):
        clip, tells_horizon = clips[index], rng.random() < TOLD
        next_frame = not tells_horizon and rng.random() < NEXT_FRAME
        horizon = 1 if next_frame else int(rng.integers(1, MAX_HORIZON + 1))
        last_start = clip.num_frames - horizon - 1
        usual = rng.random() < USUAL_START and last_start >= DEFAULT_INPUT_FRAME_IDX
        start = DEFAULT_INPUT_FRAME_IDX if usual else int(rng.integers(last_start + 1))
        inputs.append(clip.first_row + start)
        targets.append(clip.first_row + start + horizon)
        progress = action_progress(start, clip.num_frames) if rng.random() < TOLD else None
        prompts.append(build_prompt(clip.label, progress, horizon if tells_horizon else None))
    return inputs, targets, prompts


def moving_windows(moments: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Of each pair of frames, moments (B, 2 C, h, w), the same window (B, 2 C, WINDOW, WINDOW).

    Its place is drawn in proportion to the squared change of the latents' means in it.
    """
    input_means, target_means = (each.chunk(2, dim=1)[0] for each in moments)
    change = (target_means - input_means).square().mean(dim=1, keepdim=True)
    in_window = avg_pool2d(change, WINDOW, stride=1)
    width = in_window.shape[-1]
    places = torch.multinomial(in_window.flatten(1) + 1e-6, 1, generator=generator).flatten().tolist()
    corners = [divmod(place, width) for place in places]
    return [
        torch.stack([one[:, y : y + WINDOW, x : x + WINDOW] for one, (y, x) in zip(each, corners)]) for each in moments
    ]


def noised_batch(
    pipeline: Pipeline,
    input_moments: torch.Tensor,
    target_moments: torch.Tensor,
    prompts: Sequence[str],
    generator: torch.Generator,
    dropout: float = CONDITIONING_DROPOUT,
    last_timestep: float = LAST_TIMESTEP,
) -> dict[str, torch.Tensor]:
    """A batch for `diffusion_loss`, on the UNet's device, from moments (B, 2 C, h, w) and B prompts.

    Everything random is drawn from `generator`.
    """
    posterior = DiagonalGaussianDistribution(target_moments)
    posterior_noise, noise = torch.randn(2, *posterior.mean.shape, generator=generator)
    drop_text, drop_image = conditioning_dropout(torch.rand(len(prompts), generator=generator), dropout)
    num_timesteps = pipeline.scheduler.config.num_train_timesteps
    timesteps = torch.randint(num_timesteps, (len(prompts),), generator=generator)
    timesteps[torch.rand(len(prompts), generator=generator) < last_timestep] = num_timesteps - 1
    latents = {
        "target_latents": (posterior.mean + posterior.std * posterior_noise) * pipeline.vae.config.scaling_factor,
        "image_latents": DiagonalGaussianDistribution(input_moments).mode() * ~drop_image[:, None, None, None],
        "noise": noise,
    }
    device = pipeline.unet.device
    latents = {name: value.to(device, memory_format=memory_format(device)) for name, value in latents.items()}
    with torch.no_grad():
        told = ["" if drop else prompt for prompt, drop in zip(prompts, drop_text.tolist())]
        embeds = {"prompt_embeds": encode_prompts(pipeline, told), "empty_embeds": encode_prompts(pipeline, [""])}
        return latents | {"timesteps": timesteps.to(device)} | embeds


def unet_batch(
    pipeline: Pipeline,
    sizes: Sequence[StoredClips],
    step: int,
    seed: int,
    batch_size: int,
    whole_frames: float = WHOLE_FRAMES,
) -> dict[str, torch.Tensor]:
    """The batch of a step, of latents of one size; a pure function of seed and step."""
    rng = np.random.default_rng(derive_seed(seed, "pairs", step))
    latents = pick_size(sizes, rng)
    inputs, targets, prompts = draw_pairs(latents.training, batch_size, rng)
    moments = [torch.from_numpy(latents.rows[rows].astype(np.float32)) for rows in (inputs, targets)]
    generator = step_generator(seed, "unet", step)
    if rng.random() >= whole_frames:
        moments = moving_windows(moments, generator)
    return noised_batch(pipeline, *moments, prompts, generator)


def train_unet(
    pipeline: Pipeline,
    sizes: Sequence[StoredClips],
    args: argparse.Namespace,
    logs: SummaryWriter,
    validate: Callable[[int], None],
) -> None:
    """Trains the UNet in place, first plainly, then to guide itself; the text encoder is frozen."""
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)

    def loss_of_step(step: int, seed: int, batch_size: int, whole_frames: float, guidance: float) -> torch.Tensor:
        with fast_arithmetic(unet.device):
            batch = unet_batch(pipeline, sizes, step, seed, batch_size, whole_frames)
            return diffusion_loss(unet, scheduler, batch, guidance)

    def validate_guided(step: int) -> None:
        validate(args.unet_train_steps + step)

    options = {"weight_decay": 1e-3, "warmup_steps": 200, "depends_on": ("vae", "text")}
    if args.unet_train_steps:
        how = {"seed": args.seed, "batch_size": args.unet_batch_size, "whole_frames": WHOLE_FRAMES, "guidance": 1}
        loss = functools.partial(loss_of_step, **how)
        train_stage("unet", unet, loss, args, logs, learning_rate=7e-4, validate=validate, **options)
    if args.guided_train_steps:
        options |= {"depends_on": ("vae", "text", "unet"), "validate": validate_guided}
        how = {"batch_size": args.guided_batch_size, "whole_frames": 1, "guidance": GUIDANCE}
        loss = functools.partial(loss_of_step, seed=derive_seed(args.seed, "guided"), **how)
        train_stage("guided", unet, loss, args, logs, learning_rate=5e-4, **options)
