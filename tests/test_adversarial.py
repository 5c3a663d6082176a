"""Training for one step with a discriminator."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline

from data.layout import UserError
from pecn.adversarial import AdversarialLoss, PatchDiscriminator, predict_in_one_step
from pecn.sampling import denoise
from pecn.sampling_options import SamplingOptions
from tests.conftest import SIDE, make_tiny_pipeline, scalars
from tests.test_train import final_weights, train

GAN = ("--lambda_gan", 1, "--num_validation_images", 0)


@pytest.fixture
def pipeline():
    return make_tiny_pipeline(prediction_type="v_prediction")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("velocity")
    make_tiny_pipeline(prediction_type="v_prediction").save_pretrained(folder)
    return folder


def random_batch(count: int = 2) -> dict[str, torch.Tensor]:
    target, image, noise = torch.randn(3, count, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    embeddings = torch.zeros(count, 77, 16)
    timesteps = torch.zeros(count, dtype=torch.long)
    return dict(target_latents=target, image_latents=image, noise=noise, prompt_embeds=embeddings, timesteps=timesteps)


def adversarial_loss(pipeline, lambda_gan=1.0, lambda_l1=30.0) -> AdversarialLoss:
    torch.manual_seed(0)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return AdversarialLoss(Accelerator(cpu=True), PatchDiscriminator(8), pipeline.vae, scheduler, lambda_gan, lambda_l1)


def test_one_step_of_training_is_the_one_step_of_sampling(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = torch.cat([torch.randn(1, 4, 4, 4, generator=generator) for generator in generators])
    batch = random_batch() | {"noise": noise, "prompt_embeds": pipeline.text_encoder(torch.zeros(2, 77).long())[0]}
    options = SamplingOptions(1, guidance_scale=1, image_guidance_scale=1, scheduler="euler")
    again = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with torch.no_grad():
        sampled = denoise(pipeline, batch["image_latents"], batch["prompt_embeds"], again, options)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        predicted = predict_in_one_step(pipeline.unet, scheduler, batch)
    factor = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(predicted / factor, sampled, rtol=0, atol=0.02 / factor)  # the noise is as good as all


def test_unet_comes_nearer_to_the_frames_and_the_discriminator_tells_them_apart(pipeline):
    loss, batch, unet = adversarial_loss(pipeline), random_batch(), pipeline.unet
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)

    def error_and_scores() -> tuple[float, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            frames = loss.decode_scaled(batch["target_latents"])
            predicted = loss.decode_scaled(predict_in_one_step(unet, loss.noise_scheduler, batch))
            inputs = loss.decode(batch["image_latents"])
            error = (predicted - frames).abs().mean().item()
            return error, loss.discriminator(inputs, frames).mean(), loss.discriminator(inputs, predicted).mean()

    before = error_and_scores()[0]
    for _ in range(30):
        loss(unet, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    error, of_frames, of_predictions = error_and_scores()
    assert error < 0.8 * before and of_frames > of_predictions


def test_unets_loss_leaves_the_discriminator_alone(pipeline):
    """It is trained by its own loss only, and the UNet by the discriminator's judgement too."""
    gradients = []
    for lambda_gan in (1.0, 0.5):
        loss = adversarial_loss(pipeline, lambda_gan, lambda_l1=0.0)
        loss(pipeline.unet, random_batch()).backward()
        assert all(parameter.grad is None for parameter in loss.discriminator.parameters())
        gradients.append(pipeline.unet.conv_in.weight.grad.clone())
        pipeline.unet.zero_grad()
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


def test_a_model_of_the_noise_is_refused():
    with pytest.raises(UserError, match="prediction_type epsilon"):
        adversarial_loss(make_tiny_pipeline(prediction_type="epsilon"))


def test_resumed_run_ends_with_the_same_bits_and_a_later_one_takes_its_discriminator(data_dir, model, tmp_path):
    train(data_dir, model, tmp_path / "whole", *GAN)
    train(data_dir, model, tmp_path / "parts", *GAN, "--max_train_steps", 3)
    train(data_dir, model, tmp_path / "parts", *GAN, "--resume_from_checkpoint", "latest")
    assert final_weights(tmp_path / "parts") == final_weights(tmp_path / "whole")
    one, other = (PatchDiscriminator.from_pretrained(tmp_path / run / "discriminator") for run in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "whole")
    assert pipeline.unet.config.sample_size == SIDE // 8 and not hasattr(pipeline, "discriminator")

    train(data_dir, tmp_path / "whole", tmp_path / "next", *GAN, "--max_train_steps", 1)
    later = PatchDiscriminator.from_pretrained(tmp_path / "next" / "discriminator")
    drift = max((a - b).abs().max().item() for a, b in zip(one.parameters(), later.parameters()))
    assert 0 < drift < 1e-2  # a new one would differ by far more


def test_two_processes_train_as_one(data_dir, model, tmp_path):
    train(data_dir, model, tmp_path / "one", *GAN)
    train(data_dir, model, tmp_path / "two", *GAN, processes=2)
    one, two = (scalars(tmp_path / run / "logs", "train/loss") for run in ("one", "two"))
    assert two == pytest.approx(one, rel=0.01)
    one, two = (PatchDiscriminator.from_pretrained(tmp_path / run / "discriminator") for run in ("one", "two"))
    for a, b in zip(one.parameters(), two.parameters()):
        assert (a - b).abs().mean() < 5e-4  # Adam's first steps enlarge what rounding changes
