"""The optimizer's schedule, its steps in fp16, and the moving average."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from pecn.diffusion import diffusion_loss
from pecn.optimization import (
    averaged_weights,
    compile_unet,
    create_lr_scheduler,
    create_optimizer,
    optimizer_step,
)
from tests.conftest import make_tiny_pipeline


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_every_schedule_follows_its_warm_up(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_lr_scheduler(name, optimizer, 10, 100)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert all(rate > 0.85 for rate in rates[11:])


def test_average_leaves_the_weights_as_they_were_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    ema = EMAModel(model.parameters())
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with pytest.raises(RuntimeError), averaged_weights(ema, model):
        assert all(torch.equal(now, old) for now, old in zip(model.parameters(), before))
        raise RuntimeError
    assert all(torch.equal(now, old + 1) for now, old in zip(model.parameters(), before))


@pytest.mark.parametrize(("passes", "processes", "graphs"), [(1, 1, True), (2, 1, False), (1, 2, False)])
def test_on_a_gpu_there_are_cuda_graphs_where_a_step_is_one_pass(monkeypatch, passes, processes, graphs):
    """torch refuses unknown options, so that these are known; nothing is compiled before the first call."""
    used = {}

    def torch_compile(model: torch.nn.Module, dynamic: bool, options: dict[str, bool]) -> None:
        compile_with_torch(model, dynamic=dynamic, options=options)
        used.update(options)

    compile_with_torch = torch.compile
    monkeypatch.setattr("torch.compile", torch_compile)
    gpus = {"device": torch.device("cuda"), "gradient_accumulation_steps": passes, "num_processes": processes}
    compile_unet(torch.nn.Linear(2, 2), SimpleNamespace(**gpus))
    assert used.get("triton.cudagraphs", False) == graphs
    assert used["max_autotune"] and used["force_layout_optimization"]


def test_compiled_unet_has_the_same_output_and_gradients():
    """torch 2.13's default compilation on a CPU has wrong gradients where latents are upsampled."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": None, "up_block_types": ("UpBlock2D",) * 2}
    config = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "in_channels": 8}
    outputs, gradients = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=4, cross_attention_dim=16, **config, **blocks).train()
        model = compile_unet(unet, SimpleNamespace(device=torch.device("cpu"))) if compiled else unet
        outputs.append(model(torch.randn(2, 8, 4, 4), torch.tensor([3, 500]), torch.randn(2, 77, 16)).sample)
        outputs[-1].square().mean().backward()
        gradients.append([weight.grad for weight in unet.parameters() if weight.grad is not None])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_fp16s_scaler_skips_what_is_not_finite_and_changes_no_other_step(monkeypatch):
    """Two passes a step, clipping: against plain AdamW and torch's own clipping, without a scaler."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    # What accelerate sets up for fp16, which it refuses on a CPU.
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", growth_interval=2)
    ours, theirs, scheduler = make_tiny_pipeline().unet, make_tiny_pipeline().unet, DDPMScheduler()
    optimizer = accelerator.prepare(create_optimizer(ours, 1e-3))
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-3, foreach=False, fused=False)
    for spoiled in (None, torch.inf, None, None, torch.nan, None):
        passes = [random_batch(), random_batch()]
        if spoiled:
            passes[0]["noise"][0, 0, 0, 0] = spoiled
        scale = accelerator.scaler.get_scale()
        _, norm = optimizer_step(accelerator, ours, optimizer, scheduler, iter(passes), max_grad_norm=0.1)
        assert (accelerator.scaler.get_scale() < scale) == (spoiled is not None)
        if spoiled is None:
            (sum(diffusion_loss(theirs, scheduler, batch) for batch in passes) / 2).backward()
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
            assert norm == pytest.approx(expected.item(), rel=1e-4)
            reference.step()
            reference.zero_grad()
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)


def random_batch() -> dict[str, torch.Tensor]:
    latents, image_latents, noise = torch.randn(3, 2, 4, 4, 4)
    return {
        "target_latents": latents,
        "image_latents": image_latents,
        "noise": noise,
        "timesteps": torch.randint(1000, (2,)),
        "prompt_embeds": torch.randn(2, 77, 16),
    }
