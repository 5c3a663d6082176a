"""The parts of the demo's base model before any training, and the pipeline that holds them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo.pretraining.tokenizer import MAX_TOKENS, build_tokenizer
from demo.pretraining.vae_start import start_as_resizing

LATENT_CHANNELS, TEXT_WIDTH = 4, 128


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of 2 layers, `TEXT_WIDTH` wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    # With CLIP's own 0.02, words and their order are small compared with what the layers add.
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.embeddings.position_embedding):
            embedding.weight *= 0.3 / embedding.weight.std()
    return model


def build_vae() -> AutoencoderKL:
    """A VAE from RGB in [-1, 1] of side S to LATENT_CHANNELS of side S / 4, as `start_as_resizing` starts it."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # the start needs it: more groups lose the picture's mean color
        mid_block_add_attention=False,  # convolutions alone: what is learned on crops holds for any size
        sample_size=128,
        scaling_factor=1.0,
    )
    start_as_resizing(vae)
    return vae


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet for latents of side 24 or 32: the noisy channels, then as many of the input frame.

    It has attention at a half and a quarter of the latents' resolution. A summary of the sentence is added to the
    timestep's embedding as well.
    """
    return UNet2DConditionModel(
        sample_size=24,
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 128, 160),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def build_pipeline(seed: int) -> StableDiffusionInstructPix2PixPipeline:
    """The untrained base model (float32, on the CPU); the same `seed` gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder, vae, unet = build_text_encoder(tokenizer), build_vae(), build_unet()
    scheduler = EulerAncestralDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",  # its loss also counts where all is noise, where the motion is decided
        timestep_spacing="trailing",  # starts at the last timestep for any number of steps
        rescale_betas_zero_snr=True,  # sampling begins with noise alone, so training has to (Lin et al., 2024)
    )
    return assemble_pipeline(vae, text_encoder, tokenizer, unet, scheduler)


def assemble_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: EulerAncestralDiscreteScheduler,
) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline of these parts, ready to predict, without a safety checker."""
    return StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def count_parameters(pipeline: StableDiffusionInstructPix2PixPipeline) -> int:
    """The number of weights of UNet, VAE and text encoder together."""
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return sum(parameter.numel() for model in models for parameter in model.parameters())
