"""Training through the command that users run: what it leaves, how it divides and resumes, and what it refuses."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from data.clips import FrameChoice, draw_pair, find_clips
from data.paths import frame_path, frames_dir
from data.prompts import build_prompt
from data.video_decoder import load_picture
from pecn.model import encode_pictures, encode_prompts, load_pipeline, read_training_config
from pecn.processes import is_fast_in_bf16
from pecn.sampling import denoise, predict_frames
from pecn.sampling_options import SamplingOptions
from pecn.scores import METRICS
from tests.conftest import (
    LABELS,
    PROJECT,
    SIDE,
    STEPS,
    last_line,
    make_data_dir,
    make_tiny_pipeline,
    read_events,
    run,
    sampling_command,
    scalars,
    train,
    unet_file,
)

RESUME = ("--resume_from_checkpoint", "latest")


# What a run leaves.


def test_result_is_a_pipeline_of_stock_diffusers_that_draws_our_pictures(trained, tiny_model, data_dir):
    stock = StableDiffusionInstructPix2PixPipeline.from_pretrained(trained)
    before = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model)
    assert not torch.equal(stock.unet.conv_in.weight, before.unet.conv_in.weight)
    assert torch.equal(stock.vae.encoder.conv_in.weight, before.vae.encoder.conv_in.weight)
    frame, guidance = load_picture(frame_path(frames_dir(data_dir, SIDE), "val0", 20)), {"guidance_scale": 2.0}
    [ours] = predict_frames(load_pipeline(trained), [frame], ["a cup"], [7], SamplingOptions(**guidance))
    theirs = stock(
        "a cup",
        image=Image.fromarray(frame),
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=20,
        image_guidance_scale=1.5,
        **guidance,
    )
    assert np.abs(np.asarray(theirs.images[0]).astype(int) - ours.sample).max() <= 1
    assert not list(trained.glob(".*.partial"))


def test_what_is_printed_names_the_pairs_and_the_next_command(trained):
    printed = (trained / "printed.txt").read_text()
    assert "1 without frame 21 (train_short)" in printed and "training on 6 frame pairs (frame 20 to 21" in printed
    assert f"  MODEL_DIR={trained} bash sample_from_pix2pix.sh\n" in printed


def test_config_records_arguments_and_versions(trained):
    config = json.loads((trained / "training_config.json").read_text())
    recorded = {name: config["arguments"][name] for name in ("resolution", "add_progress", "seed", "horizon")}
    assert recorded == {"resolution": SIDE, "add_progress": True, "seed": 42, "horizon": "1"}
    prompt = build_prompt("pushing a cup from left to right", 60)
    assert config["arguments"]["example_prompt"] == prompt and prompt in (trained / "README.md").read_text()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True).stdout.strip()
    assert (config["git_commit"] or "").removesuffix("-dirty") == commit
    assert config["arguments"]["input_frame_idx"] == 20 and config["arguments"]["prediction_type"] == "epsilon"
    assert "hub_token" not in config["arguments"]
    assert config["library_versions"]["torch"] == torch.__version__


def test_tensorboard_shows_every_step_and_the_validation_pictures(trained):
    logs = trained / "logs"
    for name in ("loss", "learning_rate", "grad_norm", "samples_per_second"):
        assert sorted(scalars(logs, f"train/{name}")) == list(range(1, STEPS + 1)), name
    assert list(scalars(logs, "train/learning_rate").values()) == pytest.approx([1e-3] * STEPS)
    runs = {way: [path.parent for path in logs.rglob(f"{way}/events*")] for way in ("copy", "sample", "vae_ceiling")}
    held_out = {
        event.step: event.value
        for file in logs.rglob("held_out/events*")
        for event in read_events(file).Scalars("train/loss")
    }
    assert sorted(held_out) == [0, 3, 6, STEPS] and held_out[STEPS] < held_out[3]
    runs["held_out"] = [path.parent for path in logs.rglob("held_out/events*")]
    [of_run] = set(logs.rglob("events*")) - {path for folders in runs.values() for path in folders[0].iterdir()}
    del runs["held_out"]
    assert len(set(logs.rglob("events*"))) == 1 + 4 * 4  # a file for each validation; no mean of a single draw
    # 6 samples, 4 a step: two epochs end with step 3, four with step 6.
    for metric, (folder, *_) in itertools.product(METRICS, runs.values()):
        assert sorted(scalars(folder, f"validation/{metric}")) == [0, 3, 6, STEPS]
    copied, drawn = (scalars(runs[way][0], "validation/psnr") for way in ("copy", "sample"))
    assert copied[3] == copied[STEPS] != drawn[STEPS]

    images, done = read_events(of_run), "And 50% of the action has been completed."
    sentences = [
        f"validation_{task}/{label}. {done} (val{number})" for number, (task, label) in enumerate(LABELS.items())
    ]
    assert sorted(images.Tags()["images"]) == sorted(sentences)
    assert [event.step for event in images.Images(sentences[0])] == [0, 3, 6, STEPS]


def test_validation_pictures_are_saved_and_come_after_the_pipeline(trained):
    names = sorted(path.name for path in (trained / "validation").iterdir())
    assert names == [f"step-{step:06}_val{number}.png" for step in (0, 3, 6, STEPS) for number in range(3)]
    saved, last_picture = trained / "model_index.json", trained / "validation" / names[-1]
    assert saved.stat().st_mtime_ns <= last_picture.stat().st_mtime_ns
    # The limit is two; the last one is for going on.
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_a_failed_validation_is_a_warning_and_changes_no_weight(trained, data_dir, tiny_model, tmp_path):
    """The decoder's pictures are not finite; then the pictures' folder is a file."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(vae)
    weights["decoder.conv_out.weight"] *= torch.nan
    save_file(weights, vae, {"format": "pt"})
    (tmp_path / "no_folder").mkdir()
    (tmp_path / "no_folder" / "validation").touch()
    validated = ("--add_progress", "--num_validation_images", 1, "--validation_epochs", 2)
    failed = [f"validation of step {step} failed" for step in (0, 3, 6, 8)]
    for name, base, causes in (("not_finite", model, ["not finite; left out"] * 4), ("no_folder", tiny_model, failed)):
        done = train(data_dir, base, tmp_path / name, *validated)
        lines = [line for line in re.split("[\r\n]", done.stderr) if line.startswith("warning: ")]
        assert len(lines) == 4 and all(cause in line for cause, line in zip(causes, lines)), lines
        assert unet_file(tmp_path / name).read_bytes() == unet_file(trained).read_bytes()


# The same run, divided or resumed.


def largest_mean_difference(*output_dirs: Path) -> float:
    """Of any of the UNet's weights. It is small where only the order of sums differs; the learning rate is 1e-3."""
    one, other = (load_file(unet_file(path)) for path in output_dirs)
    return max((one[name] - other[name]).abs().mean().item() for name in one)


def test_two_processes_that_accumulate_give_the_losses_and_the_average_of_one(trained, data_dir, tiny_model, tmp_path):
    options = ("--add_progress", "--use_ema", "--num_validation_images", 1, "--validation_epochs", 4)
    train(data_dir, tiny_model, tmp_path / "one", *options)
    divided = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    train(data_dir, tiny_model, tmp_path / "two", *options, *divided, processes=2)
    for figure in ("loss", "grad_norm"):
        one, two = (scalars(path / "logs", f"train/{figure}") for path in (trained, tmp_path / "two"))
        assert sorted(two) == list(range(1, STEPS + 1))
        assert two == pytest.approx(one, rel=1e-3), figure
    assert largest_mean_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert largest_mean_difference(tmp_path / "one", trained) > 1e-4  # the average is not the last


def test_a_resumed_run_may_divide_its_global_batch_otherwise(trained, data_dir, tiny_model, tmp_path):
    """From an odd step: then the passes made so far are no multiple of the new number of passes in a step."""
    halves = ("--add_progress", "--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    train(data_dir, tiny_model, tmp_path, *halves, "--max_train_steps", 3)
    quarters = ("--add_progress", "--train_batch_size", 1, "--gradient_accumulation_steps", 4)
    shutil.rmtree(tmp_path / "unet")
    done = train(data_dir, tiny_model, tmp_path, *quarters, *RESUME)  # a constant run is prolonged
    assert f"resuming from {tmp_path}/checkpoint-3" in done.stdout
    assert largest_mean_difference(tmp_path, trained) < 1e-4


def test_lora_resumes_and_is_saved_merged_with_the_adapter_beside(data_dir, tiny_model, tmp_path):
    """Its moving average with one process, resumed, and with two."""
    options = ("--use_lora", "--lora_rank", 4, "--use_ema", "--num_validation_images", 1, "--validation_epochs", 4)
    one, resumed, two = (tmp_path / name for name in ("one", "resumed", "two"))
    train(data_dir, tiny_model, one, *options, "--checkpoints_total_limit", 9)
    train(data_dir, tiny_model, resumed, *options, "--resume_from_checkpoint", one / "checkpoint-3")
    train(data_dir, tiny_model, two, *options, "--train_batch_size", 2, processes=2)
    assert unet_file(one).read_bytes() == unet_file(resumed).read_bytes()
    assert largest_mean_difference(one, two) < 1e-5
    assert len(list((one / "validation").iterdir())) == 3

    base, trained = (load_file(unet_file(path)) for path in (tiny_model, one))
    changed = {name for name, weight in base.items() if not torch.equal(weight, trained[name])}
    assert all("attn" in name for name in changed)
    in_checkpoint = load_file(one / "checkpoint-6" / "model.safetensors")
    assert all(".lora_" in name for name in in_checkpoint)  # what is trained, and nothing else
    assert sum(".attn" in name for name in changed) > 8 and trained.keys() == base.keys()
    with_adapter = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model)
    with_adapter.load_lora_weights(one, weight_name="pytorch_lora_weights.safetensors")
    with_adapter.fuse_lora()
    with_adapter.unload_lora_weights()
    fused, attention = with_adapter.unet.state_dict(), [name for name in changed if "attn" in name]
    assert max((fused[name] - trained[name]).abs().max() for name in attention) < 1e-6


def test_resuming_with_other_settings_lists_the_differences(trained, data_dir, tiny_model, tmp_path):
    output_dir = tmp_path / "output"
    shutil.copytree(trained / "checkpoint-6", output_dir / "checkpoint-6")
    others = make_data_dir(tmp_path / "data")
    cv2.imwrite(str(frame_path(frames_dir(others, SIDE), "train0", 21)), np.zeros((SIDE, SIDE, 3), np.uint8))
    seed_and_batch = ("--seed", 7, "--train_batch_size", 2, "--lr_scheduler", "linear")
    for options, where, expected in (
        (seed_and_batch, data_dir, ["seed was 42, is 7", "global_batch_size was 4, is 2", "schedule_length was None"]),
        ((), others, ["hash_of_model_frames_and_prompts was "]),
        (("--add_progress", "False"), data_dir, ["add_progress was True, is False"]),
    ):
        done = train(where, tiny_model, output_dir, "--add_progress", *options, *RESUME, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert all(difference in last_line(done.stderr) for difference in expected), done.stderr


# Options.


def one_step_error(model: Path, data_dir: Path) -> float:
    """Root mean square error of the scaled latents that one step gives, over the validation pairs."""
    clips, _ = find_clips(data_dir, "val", SIDE, FrameChoice())
    pairs = [draw_pair(clip, FrameChoice(), seed=0) for clip in clips]
    pipeline, generators = load_pipeline(model), [torch.Generator().manual_seed(seed) for seed in range(len(pairs))]
    with torch.no_grad():
        inputs, targets = (
            encode_pictures(pipeline, [load_picture(getattr(pair, name)) for pair in pairs]).mode()
            for name in ("input_image", "edited_image")
        )
        prompts = encode_prompts(pipeline, [pair.edit_prompt for pair in pairs])
        options = SamplingOptions(num_inference_steps=1, image_guidance_scale=1.0)
        errors = denoise(pipeline, inputs, prompts, generators, options) - targets
    return pipeline.vae.config.scaling_factor * errors.square().mean().sqrt().item()


def test_a_noise_model_becomes_a_velocity_model_that_predicts_in_one_step(trained, data_dir, tiny_model, tmp_path):
    velocity = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    train(data_dir, tiny_model, tmp_path, *velocity, "--max_train_steps", 40, "--checkpointing_steps", 100)
    assert one_step_error(trained, data_dir) > 3 and one_step_error(tmp_path, data_dir) < 1
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    assert scheduler["timestep_spacing"] == "trailing"


def test_options_work_together(data_dir, tmp_path):
    """A plain 4-channel model, EMA, accumulation, mirrored pairs, a schedule with warm-up, a precision, any start, …"""
    model = tmp_path / "model"
    make_tiny_pipeline(in_channels=4, prediction_type="v_prediction").save_pretrained(model)
    options = "--use_ema --random_flip --gradient_accumulation_steps 2 --lr_scheduler constant --lr_warmup_steps 4"
    options += " --gradient_checkpointing --mixed_precision auto --max_train_samples 3 --learning_rate 1e-4"
    options += " --num_validation_images 1 --num_predictions 2 --keep_background"
    options += " --input_frame_idx any --horizon 1-3 --add_progress"
    output_dir = tmp_path / "output"
    done = train(data_dir, model, output_dir, *options.split())
    assert "training on 3 videos (any frame to the one 1 to 3 later" in done.stdout
    precision = "bf16" if is_fast_in_bf16("cpu") else "no"
    assert f"training on the CPU, mixed precision: {precision}" in done.stdout
    rates = scalars(output_dir / "logs", "train/learning_rate")
    assert rates == pytest.approx({step: 1e-4 * min(1, (step - 1) / 4) for step in range(1, STEPS + 1)})
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
    assert pipeline.unet.config.in_channels == 8
    assert not torch.equal(pipeline.unet.conv_out.weight, load_pipeline(model).unet.conv_out.weight)
    recorded = read_training_config(output_dir)
    assert (recorded["input_frame_idx"], recorded["horizon"], recorded["tell_horizon"]) == ("any", "1-3", True)

    run("python", *sampling_command(data_dir, output_dir, tmp_path / "samples"))
    metrics = json.loads((tmp_path / "samples" / "metrics.json").read_text())
    prompts = [row["edit_prompt"] for row in metrics["samples"]]
    assert all(
        re.search(r"And \d+% of the action .* The frame is [123] frames? later\.$", prompt) for prompt in prompts
    )
    assert metrics["settings"]["keep_background"] and "expected" in metrics["summary"]["all"]


def test_a_model_of_16_latent_channels_is_trained_and_sampled_from(data_dir, tmp_path):
    model, output_dir, results = tmp_path / "model", tmp_path / "trained", tmp_path / "results"
    make_tiny_pipeline(in_channels=32, latent_channels=16).save_pretrained(model)
    train(data_dir, model, output_dir, "--max_train_steps", 2, "--random_flip", "--num_validation_images", 1)
    run("python", *sampling_command(data_dir, output_dir, results, "--num_samples", 2))
    assert json.loads((results / "metrics.json").read_text())["summary"]["all"]["num_pairs"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resolution 100", "must be a multiple of 8, not 100"),
        ("--train_batch_size 0", "must be at least 1, not 0"),
        ("--train_batch_size 1.5", "'1.5' is not a whole number"),
        ("--keep_background yes", "must be True or False, not 'yes'"),
        ("--add_progress nowhere.json", "'nowhere.json' is neither True, False, nor a file"),
        ("--conditioning_dropout_prob 0.5", "must be at most 0.3333, not 0.5"),
        ("--learning_rate nan", "'nan' is not a number"),
        ("--max_grad_norm 0", "must be above 0, not 0"),
        ("--target_frame_idx 21 --horizon 2", "not allowed with argument"),
        ("--use_8bit_adam", "pip install bitsandbytes"),
    ],
)
def test_unusable_options_are_refused_at_once_in_one_line(options, message):
    done = run("python", "train_instruct_pix2pix.py", *options.split(), check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_mistakes_get_one_line(data_dir, tiny_model, tmp_path):
    def message(*options: object, data_dir: Path = data_dir, model: object = tiny_model) -> str:
        done = train(data_dir, model, tmp_path / "output", *options, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return last_line(done.stderr)

    (tmp_path / f"frames_{SIDE}x{SIDE}").mkdir()
    assert "python -m data.dataset --data_dir" in message(data_dir=tmp_path)
    assert "python -m data.video_loader --data_dir" in message("--resolution", 64)
    assert "train_filtered.json: no video has both frames (frame 20 to 90)" in message("--target_frame_idx", 90)
    assert "choose a later target" in message("--target_frame_idx", 20)
    nowhere = message(model="nobody/nothing")
    assert "HF_ENDPOINT" in nowhere and "nobody/nothing" in nowhere
    assert "no model_index.json" in message(model=tmp_path)
    taken = tmp_path / "file"
    taken.write_text("kept")
    assert f"the folder {taken} cannot be made (it is a file)" in message("--output_dir", taken)
    assert taken.read_text() == "kept"
    assert "there is no checkpoint checkpoint-77" in message("--resume_from_checkpoint", "checkpoint-77")
