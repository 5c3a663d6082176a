"""LoRA's adapter: what it trains, and that nothing is lost when it becomes part of the weights."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from pecn.checkpoints import save_pipeline
from pecn.lora import add_adapter, merge, trained_state
from pecn.optimization import create_optimizer, trained_weights
from tests.conftest import make_tiny_pipeline


def random_input() -> tuple[torch.Tensor, int, torch.Tensor]:
    return torch.randn(2, 8, 4, 4), 10, torch.randn(2, 77, 16)


def test_an_adapter_changes_nothing_at_first_and_little_is_trained():
    unet, rank = make_tiny_pipeline().unet, 4
    inputs = random_input()
    with torch.no_grad():
        before = unet(*inputs).sample
        add_adapter(unet, rank, seed=0, train_conv_in=True)
        torch.testing.assert_close(unet(*inputs).sample, before)
    unet(*inputs).sample.square().mean().backward()
    names = {name for name, weight in unet.named_parameters() if weight.requires_grad}
    assert {name for name, weight in unet.named_parameters() if weight.grad is not None} == names
    assert {name for name in names if ".lora_" not in name} == {"conv_in.weight", "conv_in.bias"}
    layers = {name.split(".lora_")[0].partition("attn")[2][2:] for name in names if ".lora_" in name}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(trained_weights(unet)) == len(names)
    assert len(create_optimizer(unet, 1e-4).param_groups[0]["params"]) == len(names)
    again = make_tiny_pipeline().unet
    torch.rand(3)
    add_adapter(again, rank, seed=0, train_conv_in=True)
    assert all(torch.equal(one, other) for one, other in zip(unet.parameters(), again.parameters()))


def test_merged_and_loaded_adapters_compute_what_was_trained(tmp_path):
    pipeline, inputs = make_tiny_pipeline(), random_input()
    unet = pipeline.unet
    add_adapter(unet, rank=4, seed=0, train_conv_in=False)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".lora_" in name:
                weight += 0.1 * torch.randn_like(weight)
        trained, merged = unet(*inputs).sample, make_tiny_pipeline()
        add_adapter(merged.unet, rank=4, seed=0, train_conv_in=False)
        merge(merged.unet, trained_state(unet))
        torch.testing.assert_close(merged.unet(*inputs).sample, trained)
        assert not hasattr(merged.unet, "peft_config")
        assert list(merged.unet.state_dict()) == list(make_tiny_pipeline().unet.state_dict())

        save_pipeline(merged, tmp_path, {}, get_peft_model_state_dict(unet))
        saved = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path)
        torch.testing.assert_close(saved.unet(*inputs).sample, trained)
        assert {name.partition(".")[0] for name in load_file(tmp_path / "pytorch_lora_weights.safetensors")} == {"unet"}
        base = make_tiny_pipeline()
        assert (base.unet(*inputs).sample - trained).abs().max() > 1e-3
        stock = StableDiffusionInstructPix2PixPipeline(**base.components, requires_safety_checker=False)
        stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(stock.unet(*inputs).sample, trained)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_adapters_train_with_gradient_checkpointing(gradient_checkpointing):
    unet = make_tiny_pipeline().unet.train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    add_adapter(unet, rank=4, seed=0, train_conv_in=False)
    unet(*random_input()).sample.square().mean().backward()
    assert all(weight.grad is not None for weight in trained_weights(unet))
