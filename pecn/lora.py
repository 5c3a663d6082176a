"""LoRA (Hu et al., 2021, arXiv 2106.09685): a change of low rank is learned in place of the attention's weights.

Only it and the first convolution need gradients and moments: the rest of the UNet stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict

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


def has_adapter(unet: UNet2DConditionModel) -> bool:
    return hasattr(unet, "peft_config")


def save_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the adapter alone, without the first convolution, as pytorch_lora_weights.safetensors.

    A pipeline's `load_lora_weights` loads it.
    """
    StableDiffusionInstructPix2PixPipeline.save_lora_weights(folder, get_peft_model_state_dict(unet))


@torch.no_grad()
def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy, on the CPU, of which the adapter is part: an ordinary UNet that computes the same."""
    weights = {
        name.replace(".base_layer", ""): weight for name, weight in unet.state_dict().items() if ".lora_" not in name
    }
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight("default")
    plain = type(unet).from_config(unet.config)
    plain.load_state_dict(weights)
    return plain
