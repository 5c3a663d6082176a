"""What is learned: the loss, its timesteps, and the added image channels."""

import pytest
import torch
from diffusers import DDPMScheduler, PNDMScheduler

from data.cli import UserError
from pecn.diffusion import add_image_channels, changed_scheduler, diffusion_loss
from tests.conftest import make_tiny_pipeline


class FixedPrediction(torch.nn.Module):
    def __init__(self, prediction: torch.Tensor) -> None:
        super().__init__()
        self.prediction = torch.nn.Parameter(prediction)

    def forward(self, unet_input, timesteps, prompt_embeds, return_dict):
        self.unet_input = unet_input
        return (self.prediction,)


def random_batch(size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, image_latents, noise = torch.randn(3, size, 4, 4, 4, generator=generator)
    timesteps = torch.tensor([10, 300, 600, 990])[:size]
    return {
        "target_latents": latents,
        "image_latents": image_latents,
        "noise": noise,
        "timesteps": timesteps,
        "prompt_embeds": torch.zeros(size, 77, 16),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_the_error_of_the_target(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    batch = random_batch()
    alpha = scheduler.alphas_cumprod[batch["timesteps"]]
    signal, sigma = (part.sqrt()[:, None, None, None] for part in (alpha, 1 - alpha))
    latents, noise = batch["target_latents"], batch["noise"]
    target = signal * noise - sigma * latents if prediction_type == "v_prediction" else noise
    unet = FixedPrediction(target + 0.5)
    assert diffusion_loss(unet, scheduler, batch).item() == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(unet.unet_input[:, :4], signal * latents + sigma * noise)
    torch.testing.assert_close(unet.unet_input[:, 4:], batch["image_latents"])


def test_added_image_channels_change_nothing_at_first():
    unet = make_tiny_pipeline(in_channels=4).unet
    noisy, embeds = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 16)
    with torch.no_grad():
        before = unet(noisy, 10, embeds).sample
        add_image_channels(unet)
        after = unet(torch.cat([noisy, torch.randn(2, 4, 4, 4)], dim=1), 10, embeds).sample
    torch.testing.assert_close(before, after)


def test_schedulers_are_changed_as_asked():
    """Stable Diffusion's own, PNDM, does not know of zero SNR."""
    base = PNDMScheduler(beta_schedule="scaled_linear")
    assert changed_scheduler(base, None, False) is base
    changed = changed_scheduler(base, "v_prediction", True)
    training = DDPMScheduler.from_config(changed.config)
    assert (training.config.prediction_type, training.alphas_cumprod[-1]) == ("v_prediction", 0)
    assert changed.config.timestep_spacing == "trailing" and changed.config.beta_schedule == "scaled_linear"
    with pytest.raises(UserError, match="add --prediction_type v_prediction"):
        changed_scheduler(base, None, True)
