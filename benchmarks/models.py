"""The models that are timed: the demo's and one of Stable Diffusion 1.5's size, both with random weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from demo.pretraining import untrained
from demo.pretraining.tokenizer import build_tokenizer
from pecn.model import Pipeline


def build_model(name: str) -> Pipeline:
    """The pipeline called "demo" or "sd15" (float32, CPU), the same weights each time."""
    if name == "demo":
        return untrained.build_pipeline(seed=0)
    torch.manual_seed(0)
    return build_stable_diffusion()


def build_stable_diffusion() -> Pipeline:
    """InstructPix2Pix of Stable Diffusion 1.5's size; the tokenizer is the demo's."""
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=8, out_channels=4, cross_attention_dim=768, attention_head_dim=8
    )
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return untrained.assemble_pipeline(vae, CLIPTextModel(text_config), tokenizer, unet, scheduler)
