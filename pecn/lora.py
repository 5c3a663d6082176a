"""LoRA (Hu et al., 2021, arXiv 2106.09685): a change of low rank is learned in place of the attention's weights.

Only it needs gradients and moments, and the first convolution where that was widened: the rest of the UNet stays as it
is.
"""

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_adapter(unet: UNet2DConditionModel, rank: int, seed: int, train_conv_in: bool) -> None:
    """Gives the attention layers an adapter of this rank, which changes nothing at first, and freezes the rest.

    With `train_conv_in` the first convolution, whose weights for the input frame are new, is trained as well. The
    adapter's first weights follow from `seed`, the same in all processes.
    """
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    # Scaled by alpha / rank, so by 1: what loads the adapter needs no other number.
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION_LAYERS))
    unet.conv_in.requires_grad_(train_conv_in)


def trained_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name."""
    return {name: weight.detach() for name, weight in unet.named_parameters() if weight.requires_grad}


def keep_trained(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], output_dir: str) -> None:
    """A hook of accelerate's `save_state`: a checkpoint has the trained weights alone."""
    weights[0] = trained_state(models[0])


def merge(unet: UNet2DConditionModel, trained: dict[str, torch.Tensor]) -> None:
    """Puts `trained_state` into a base UNet with an untrained adapter, and makes an ordinary UNet of it."""
    unet.load_state_dict(trained, strict=False)
    unet.fuse_lora()
    unet.unload_lora()
