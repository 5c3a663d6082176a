"""What a run leaves for what comes after it: going on, sampling from any of its states, its card, its best model."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch._dynamo.testing import CompileCounter

from data.cli import UserError
from data.clips import FramePair
from data.video_decoder import load_picture
from pecn import evaluation, sampling
from pecn.diffusion import diffusion_loss
from pecn.model import load_pipeline, read_training_config
from pecn.optimization import StepLog
from pecn.processes import is_fast_in_bf16
from pecn.sampling import predict_pairs
from tests.conftest import (
    PROJECT,
    STEPS,
    last_line,
    make_tiny_pipeline,
    read_events,
    run,
    run_forked,
    sampling_command,
    scalars,
    train,
    training_command,
    unet_file,
)

RESUME = ("--resume_from_checkpoint", "latest")


def sampled(data_dir, model, output_dir, *options):
    done = run_forked(sampling_command(data_dir, model, output_dir, "--num_samples", 3, *options))
    assert not done.returncode, done.stderr
    rows = json.loads((output_dir / "metrics.json").read_text())["samples"]
    return {row["video_id"]: row for row in rows}, {
        row["video_id"]: load_picture(output_dir / "samples" / row["video_id"] / "prediction.png") for row in rows
    }


def test_a_finished_run_can_be_prolonged(trained, data_dir, tiny_model, tmp_path):
    train(data_dir, tiny_model, tmp_path, "--add_progress", "--max_train_steps", 4)
    assert (tmp_path / "checkpoint-4").is_dir() and unet_file(tmp_path).read_bytes() != unet_file(trained).read_bytes()
    train(data_dir, tiny_model, tmp_path, "--add_progress", *RESUME)
    assert unet_file(tmp_path).read_bytes() == unet_file(trained).read_bytes()


@pytest.mark.parametrize("options", [(), ("--use_ema",), ("--use_lora", "--lora_rank", 4, "--use_ema")])
def test_a_checkpoint_draws_what_the_model_saved_after_it_draws(options, data_dir, tiny_model, tmp_path):
    """With the moving average, and with LoRA merged, where they were trained."""
    model = tmp_path / "model"
    train(data_dir, tiny_model, model, *options)
    _, saved = sampled(data_dir, model, tmp_path / "saved")
    _, drawn = sampled(data_dir, model / f"checkpoint-{STEPS}", tmp_path / "drawn")
    assert saved.keys() == drawn.keys() and all(np.abs(saved[k].astype(int) - drawn[k]).max() <= 1 for k in saved)


def test_validation_and_sampling_score_the_same(trained, data_dir, tmp_path):
    rows, _ = sampled(data_dir, trained, tmp_path, "--num_inference_steps", 1)
    validated = scalars(trained / "logs", "validation/whole_psnr")  # the last run's value: the VAE's ceiling
    assert np.mean([row["vae_ceiling"]["whole_psnr"] for row in rows.values()]) == pytest.approx(
        validated[STEPS], abs=0.01
    )
    [folder] = {path.parent for path in (trained / "logs").rglob("sample/events*")}
    drawn = scalars(folder, "validation/whole_psnr")[STEPS]
    assert np.mean([row["sample"]["whole_psnr"] for row in rows.values()]) == pytest.approx(drawn, abs=0.01)


@pytest.mark.skipif(not is_fast_in_bf16("cpu"), reason="a CPU that is slow in bfloat16 samples in float32")
def test_validation_and_sampling_score_the_same_in_bf16(data_dir, tiny_model, tmp_path):
    model, options = tmp_path / "model", ("--num_validation_images", 3, "--validation_epochs", 99)
    train(data_dir, tiny_model, model, "--mixed_precision", "bf16", *options)
    rows, _ = sampled(data_dir, model, tmp_path / "drawn", "--num_inference_steps", 1)
    [folder] = {path.parent for path in (model / "logs").rglob("sample/events*")}
    drawn = scalars(folder, "validation/whole_psnr")[STEPS]
    assert np.mean([row["sample"]["whole_psnr"] for row in rows.values()]) == pytest.approx(drawn, abs=0.01)


@pytest.mark.parametrize("fast", [False, True])
def test_a_model_that_does_not_say_is_in_bf16_where_the_cpu_is_fast(tiny_model, monkeypatch, fast):
    monkeypatch.setattr(evaluation, "is_fast_in_bf16", lambda device_type: fast)
    with evaluation.loaded_model(str(tiny_model)) as pipeline:
        assert torch.is_autocast_enabled("cpu") == fast
        assert pipeline.unet.conv_in.weight.dtype == (torch.bfloat16 if fast else torch.float32)


def test_every_model_has_a_card_with_its_prompt_and_scores(trained):
    card = (trained / "README.md").read_text()
    assert "library_name: diffusers" in card and "from_pretrained" in card and "- seed: 42" in card
    assert (
        "And 60% of the action has been completed." in card and "Held-out loss 0." in card and "hub_token" not in card
    )


def test_the_best_model_is_kept_beside_the_last(data_dir, tiny_model, tmp_path):
    options = ("--save_best", "--num_validation_images", 1, "--validation_epochs", 2, "--learning_rate", 0.3)
    train(data_dir, tiny_model, tmp_path, *options)
    loss_of_step = {
        event.step: event.value
        for file in (tmp_path / "logs").rglob("held_out/events*")  # in any order
        for event in read_events(file).Scalars("train/loss")
    }
    _, *losses = (loss_of_step[step] for step in sorted(loss_of_step))  # the first is the base model's
    assert len(losses) == 3
    assert read_training_config(tmp_path / "best")["held_out_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert len(load_pipeline(tmp_path / "best").unet.state_dict())


def test_the_held_out_loss_depends_on_the_weights_alone(data_dir, tiny_model, tmp_path):
    options = ("--num_validation_images", 1, "--validation_epochs", 2, "--learning_rate", 0)
    train(data_dir, tiny_model, tmp_path, *options)
    files = (tmp_path / "logs").rglob("held_out/events*")
    losses = [event.value for file in files for event in read_events(file).Scalars("train/loss")]
    assert len(losses) == 4 and len(set(losses)) == 1


def test_the_users_own_cache_is_respected(tmp_path):
    def cache(**variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_H")} | variables
        code = "import pecn; from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
        words = [sys.executable, "-c", code]
        return subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True).stdout.strip()

    assert cache() == str(PROJECT / ".cache/huggingface/hub")
    assert cache(HF_HOME=str(tmp_path)) == str(tmp_path / "hub")
    assert cache(HF_HUB_CACHE=str(tmp_path / "here")) == str(tmp_path / "here")


def test_a_prediction_that_is_not_finite_is_named_and_the_others_are_kept(monkeypatch, trained, data_dir, capsys):
    pictures = sorted((data_dir / "frames_32x32").glob("val*/00020.png"))[:3]
    pairs = [FramePair(str(path), None, "a sentence", path.parent.name, "task") for path in pictures]
    decode = sampling.decode_latents

    def spoiled(pipeline, latents):
        decoded = decode(pipeline, latents)
        decoded[1, 0, 0, 0] = np.nan
        return decoded

    monkeypatch.setattr(sampling, "decode_latents", spoiled)
    kept = [one.video_id for one in predict_pairs(make_tiny_pipeline(), pairs, seed=0, batch_size=8)]
    assert kept == [pairs[0].video_id, pairs[2].video_id]
    assert f"warning: {pairs[1].video_id}: the prediction is not finite; left out" in capsys.readouterr().err


def spoil_second_prediction() -> None:
    decode = sampling.decode_latents

    def spoiled(*arguments):
        decoded = decode(*arguments)
        decoded[1:2] = np.nan  # the second of a batch; a reconstruction has one picture
        return decoded

    sampling.decode_latents = spoiled


def test_scores_leave_out_and_count_what_is_not_finite(trained, data_dir, tmp_path):
    done = run_forked(sampling_command(data_dir, trained, tmp_path, "--num_samples", 3), before=spoil_second_prediction)
    assert not done.returncode and "not finite and left out: 1 of 3 predictions" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    kept = {row["video_id"] for row in metrics["samples"]}
    assert len(kept) == metrics["summary"]["all"]["num_pairs"] == 2
    assert {path.name for path in (tmp_path / "samples").iterdir()} == kept


def test_wandb_without_a_key_is_an_error_before_anything_is_encoded(data_dir, tiny_model, tmp_path):
    """With a stand-in for the package, which is not installed here."""
    (tmp_path / "wandb.py").write_text("def login(prompt):\n    return prompt")
    command = training_command(data_dir, tiny_model, tmp_path / "run", "--report_to", "wandb")
    done = run("python", *command, check=False, PYTHONPATH=tmp_path)
    assert done.returncode == 1 and last_line(done.stderr).startswith("error: wandb has no key: run `wandb login`")
    assert "Encoding" not in done.stderr


def test_an_infinite_loss_ends_the_run_only_where_the_step_was_not_skipped():
    """With torch's own scaler, which skips a step with an infinite gradient and halves its scale."""
    scaler, weight = torch.amp.GradScaler("cpu"), torch.nn.Parameter(torch.ones(1))
    optimizer, infinite = torch.optim.SGD([weight], lr=0.1), torch.tensor(torch.inf)
    scaler.scale(weight.sum()).backward()  # its scale is a tensor from now on
    same = {"reduce": lambda tensor, how: tensor, "log": lambda figures, step: None}
    log = StepLog(SimpleNamespace(scaler=scaler, **same), 1)

    def step(number: int, loss: torch.Tensor, gradient: float) -> None:
        weight.grad = torch.full((1,), gradient)
        scaler.step(optimizer)
        scaler.update()
        log.add(number, loss, loss, 0.1)

    step(1, infinite, math.inf)
    assert log.flush() == math.inf and (log.num_updates, log.skipped) == (0, 1)
    step(2, torch.tensor(1.0), 1.0)
    step(3, infinite, 1.0)
    with pytest.raises(UserError, match="the loss of step 3 is inf"):
        log.flush()
    assert log.num_updates == 2


class Constant(torch.nn.Module):
    """A stand-in for the UNet that predicts 2 c with the conditions and c without."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, latents, timesteps, embeds, return_dict):
        told = embeds.abs().sum(dim=(1, 2)) > 0
        return (latents[:, :4] * 0 + self.value * (1 + 1 * told)[:, None, None, None],)


def batch_at(timesteps: list[int]) -> dict[str, torch.Tensor]:
    """Of ones, for `diffusion_loss`."""
    ones = torch.ones(len(timesteps), 4, 2, 2)
    embeds = {"prompt_embeds": torch.ones(len(timesteps), 3, 4), "empty_embeds": torch.zeros(1, 3, 4)}
    latents = {"target_latents": ones, "image_latents": ones, "noise": ones}
    return latents | embeds | {"timesteps": torch.tensor(timesteps)}


def test_the_guided_loss_asks_for_what_guidance_would_draw():
    """No gradient passes through the prediction without conditions."""

    def gradient(value: float, timestep: int, guidance: float) -> float:
        unet = Constant(value)
        diffusion_loss(unet, DDPMScheduler(), batch_at([timestep] * 2), guidance).backward()
        return unet.value.grad.item()

    # The noise, 1, is to be half of 2 c + c, and the loss' gradient is 2 (2 c - (1 + c / 2)) times 2.
    assert gradient(2 / 3, 500, guidance=2.0) == pytest.approx(0, abs=1e-6)
    assert gradient(1.0, 500, guidance=2.0) == pytest.approx(2)
    assert gradient(0.5, 500, guidance=1.0) == gradient(0.5, 10, guidance=2.0) == pytest.approx(0, abs=1e-6)


def test_a_unet_is_compiled_once_whatever_number_of_samples_learns_guidance():
    counter = CompileCounter()
    unet = torch.compile(Constant(1.0), backend=counter, dynamic=False)
    for timesteps in ([10, 10, 10], [10, 10, 500], [10, 500, 500], [500, 500, 500]):
        diffusion_loss(unet, DDPMScheduler(), batch_at(timesteps), guidance=2.0).backward()
    assert counter.frame_count == 1
