"""Training for prediction in one step: a discriminator judges the decoded pictures, beside their distance to the truth.

The UNet is asked at the last timestep alone, where its input is all noise, and its estimate of the clean latents is
decoded. Its loss is `lambda_l1` times the mean absolute error of the picture (levels in [-1, 1]) plus `lambda_gan`
times the hinge loss of a discriminator that sees 32 x 32 pixel patches beside the input frame (Isola et al., 2017,
arXiv 1611.07004; spectral normalization: Miyato et al., 2018, arXiv 1802.05957). Parmar et al., 2024 (arXiv 2403.12036)
fine-tune one-step diffusion models with such a loss.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from data.layout import UserError

DISCRIMINATOR = "discriminator"  # folder of a model that comes with one
LEARNING_RATE, BETAS = 4e-4, (0.5, 0.99)  # of the discriminator's Adam


class PatchDiscriminator(ModelMixin, ConfigMixin):
    """Tells true frames from predicted ones, given the input frame: (B, 3, H, W) twice to (B, 1, H / 8, W / 8)."""

    @register_to_config
    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        widths = (6, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:]):
            layers += [spectral_norm(nn.Conv2d(narrow, wide, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, input_frames: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([input_frames, frames], dim=1))


def new_discriminator(seed: int) -> PatchDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator()


def load_discriminator(model: Path, seed: int) -> PatchDiscriminator:
    """The discriminator that a model was trained with, or a new one of this seed."""
    if (model / DISCRIMINATOR).is_dir():
        return PatchDiscriminator.from_pretrained(model, subfolder=DISCRIMINATOR)
    return new_discriminator(seed)


def predict_in_one_step(unet: torch.nn.Module, noise_scheduler: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Clean latents (B, C, h, w), scaled, that a velocity-predicting UNet sees in the noise of the last timestep."""
    noise, last = batch["noise"], noise_scheduler.config.num_train_timesteps - 1
    unet_input = torch.cat([noise, batch["image_latents"]], dim=1)
    velocity = unet(unet_input, torch.full_like(batch["timesteps"], last), batch["prompt_embeds"], return_dict=False)[0]
    signal = noise_scheduler.alphas_cumprod[last].item()
    return math.sqrt(signal) * noise - math.sqrt(1 - signal) * velocity.float()


class AdversarialLoss:
    """The loss of a batch for `optimizer_step`; the discriminator makes its own step on the same batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: PatchDiscriminator,
        vae: AutoencoderKL,
        noise_scheduler: Any,
        lambda_gan: float,
        lambda_l1: float,
    ) -> None:
        """Raises UserError where the UNet cannot predict in one step, or the processes share out the models."""
        if noise_scheduler.config.prediction_type != "v_prediction":
            raise UserError(
                "--lambda_gan predicts in one step, for which a model has to predict velocity; the scheduler of this"
                f" one says prediction_type {noise_scheduler.config.prediction_type}"
            )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UserError("--lambda_gan trains two models, which FSDP and DeepSpeed are not set up for: leave it out")
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS, fused=True)
        self.prepared, self.optimizer = accelerator.prepare(discriminator.train(), optimizer)
        self.accelerator, self.discriminator = accelerator, discriminator
        self.vae, self.noise_scheduler = vae.requires_grad_(False), noise_scheduler
        self.lambda_gan, self.lambda_l1 = lambda_gan, lambda_l1

    def __call__(self, unet: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The UNet's loss for a batch of `TrainingBatches`, float32. True frames are the targets' latents, decoded."""
        with self.accelerator.autocast():
            with torch.no_grad():
                input_frames, frames = self.decode(batch["image_latents"]), self.decode_scaled(batch["target_latents"])
            predicted = self.decode_scaled(predict_in_one_step(unet, self.noise_scheduler, batch))
        self.train_discriminator(input_frames, frames, predicted.detach())
        deceived = self.discriminator.requires_grad_(False)(input_frames, predicted).mean()
        self.discriminator.requires_grad_(True)
        return self.lambda_l1 * F.l1_loss(predicted, frames) - self.lambda_gan * deceived

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.to(latents.device).decode(latents).sample.float()

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decode(latents / self.vae.config.scaling_factor)

    def train_discriminator(self, input_frames: torch.Tensor, frames: torch.Tensor, predicted: torch.Tensor) -> None:
        """A pass with the hinge loss: 2 where frames and predictions cannot be told apart, 0 where all can."""
        # In one forward pass, since that is what data parallelism expects before a backward pass.
        scores = self.prepared(torch.cat([input_frames, input_frames]), torch.cat([frames, predicted]))
        of_frames, of_predictions = scores.float().chunk(2)
        loss = F.relu(1 - of_frames).mean() + F.relu(1 + of_predictions).mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
