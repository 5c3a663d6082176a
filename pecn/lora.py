"""LoRA (Hu et al., 2021, arXiv 2106.09685): a change of low rank is learned in place of the attention's weights.

Only it and the first convolution need gradients and moments: the rest of the UNet stays as it is.
"""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_adapter(unet: UNet2DConditionModel, rank: int, seed: int) -> None:
    """Gives the attention layers an adapter of this rank, which changes nothing at first, and freezes the rest.

    The first convolution is trained whole: it reads the input frame, with weights that may be new. The adapter's
    first weights follow from `seed`, the same in all processes.
    """
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    # Scaled by alpha / rank, so by 1: what loads the adapter needs no other number.
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION_LAYERS))
    unet.conv_in.requires_grad_(True)


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy, on the CPU, of which the adapter is part: an ordinary UNet that computes the same."""
    plain = copy.deepcopy(unet).cpu()
    plain.fuse_lora()
    plain.unload_lora()
    return plain
