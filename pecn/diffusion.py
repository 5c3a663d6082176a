"""What is learned: the loss of a batch, how dropped conditions are drawn, the image channels, the schedule of noise."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import EulerAncestralDiscreteScheduler, UNet2DConditionModel

from data.cli import UserError

GUIDED_TIMESTEPS = 0.25, 0.95  # shares of the timesteps between which guidance is learned: they decide place and looks


def diffusion_loss(
    unet: torch.nn.Module, noise_scheduler: Any, batch: dict[str, torch.Tensor], guidance: float = 1.0
) -> torch.Tensor:
    """Mean squared error of the UNet's prediction of the noise (or the velocity, as the scheduler says), float32.

    `batch` is one of `TrainingBatches`. With a `guidance` above 1 the UNet learns to predict in one pass what guidance
    of this scale would make of its predictions v with both conditions and u with none. The guided prediction
    g = u + guidance (v - u) is also v + (1 - 1 / guidance) (g - u): the target of v is known, and g and u are the
    UNet's own (after Tang et al., 2025, arXiv 2502.12154).
    """
    latents, noise, timesteps = batch["target_latents"], batch["noise"], batch["timesteps"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    unet_input = torch.cat([noisy_latents, batch["image_latents"]], dim=1)
    prediction = unet(unet_input, timesteps, batch["prompt_embeds"], return_dict=False)[0].float()
    velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    if guidance != 1:
        first, last = (share * noise_scheduler.config.num_train_timesteps for share in GUIDED_TIMESTEPS)
        guided = ((timesteps >= first) & (timesteps <= last)).nonzero()[:, 0]
        if len(guided):
            unet_input = torch.cat([noisy_latents[guided], torch.zeros_like(noisy_latents[guided])], dim=1)
            no_text = batch["empty_embeds"].expand_as(batch["prompt_embeds"][guided])
            eager = getattr(unet, "_orig_mod", unet)  # torch would compile anew for each number of samples
            with torch.no_grad():
                unconditional = eager(unet_input, timesteps[guided], no_text, return_dict=False)[0].float()
            target = target.index_add(0, guided, prediction.detach()[guided] - unconditional, alpha=1 - 1 / guidance)
    return F.mse_loss(prediction, target)


def changed_scheduler(scheduler: Any, prediction_type: str | None, rescale_betas_zero_snr: bool) -> Any:
    """A pipeline's scheduler with what is to be predicted, and whether nothing is left of the signal in the end.

    A prediction of the noise cannot give the frame in one step: at the last timestep its error is multiplied by 14.6,
    and where no signal is left it says nothing. A prediction of the velocity can. What it is already changes nothing.
    """
    changes = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    changes = {name: value for name, value in changes.items() if value and scheduler.config.get(name) != value}
    if not changes:
        return scheduler
    # InstructPix2Pix's own, since not every scheduler knows these; "trailing" begins at the last timestep.
    changed = EulerAncestralDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing", **changes)
    if changed.config.rescale_betas_zero_snr and changed.config.prediction_type == "epsilon":
        raise UserError("--rescale_betas_zero_snr needs a velocity model: add --prediction_type v_prediction")
    return changed


def conditioning_dropout(uniform: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples lose their text and which their image, as masks, given uniform numbers in [0, 1).

    Text alone, both, and image alone each with `probability` (Brooks et al., 2023, arXiv 2211.09800).
    """
    drop_text = uniform < 2 * probability
    drop_image = (uniform >= probability) & (uniform < 3 * probability)
    return drop_text, drop_image


def add_image_channels(unet: UNet2DConditionModel) -> None:
    """Doubles a text-to-image UNet's input channels: the input frame's come after the noisy ones and start at zero."""
    old = unet.conv_in
    new = torch.nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)
