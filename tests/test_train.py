"""Training, through the command users run; the loss and its parts as functions."""

import argparse
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.cli import UserError
from data.clips import load_frame_pairs
from pecn.model import create_hub_repository, encode_pictures, encode_prompts, load_pipeline, upload
from pecn.processes import is_fast_in_bf16
from pecn.sampling import denoise
from pecn.sampling_options import SamplingOptions
from tests.conftest import LABELS, SIDE, make_tiny_pipeline, read_events, run, scalars

STEPS = 8


DDP = ("--multi_gpu", "train_instruct_pix2pix.py")


def command_line(
    data_dir: Path,
    model: Path,
    output_dir: Path,
    *extra: object,
    processes: int = 1,
    kind: Sequence[object] = DDP,
) -> list[str]:
    """One process runs without `accelerate launch`, which saves each test its start-up; the script tests use it."""
    command = ["python", "train_instruct_pix2pix.py"]
    if processes > 1:
        command = ["accelerate", "launch", "--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]
        command += ["--num_processes", processes, *kind]
    command += ["--train_data_dir", data_dir, "--output_dir", output_dir, "--pretrained_model_name_or_path", model]
    command += ["--resolution", SIDE, "--max_train_steps", STEPS, "--train_batch_size", 4 // processes]
    command += ["--checkpointing_steps", 3, "--learning_rate", 1e-3, "--num_inference_steps", 2]
    return [str(word) for word in command + list(extra)]


def train(*arguments: object, check: bool = True, **launched: object) -> subprocess.CompletedProcess:
    return run(*command_line(*arguments, **launched), check=check)


def final_weights(output_dir: Path) -> bytes:
    return (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(data_dir, tiny_model, tmp_path_factory):
    """An undisturbed run with progress prompts: its output directory and what it printed."""
    output_dir = tmp_path_factory.mktemp("trained")
    options = ("--add_progress", "--validation_epochs", 2, "--num_validation_images", 3, "--checkpoints_total_limit", 1)
    return output_dir, train(data_dir, tiny_model, output_dir, *options).stdout


def test_result_is_a_pipeline_that_stock_diffusers_loads(trained, tiny_model):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    output_dir, printed = trained
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
    before = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model)
    assert not torch.equal(pipeline.unet.conv_in.weight, before.unet.conv_in.weight)
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, before.vae.encoder.conv_in.weight)
    image = Image.new("RGB", (SIDE, SIDE), "gray")
    assert pipeline("a cup", image=image, num_inference_steps=2).images[0].size == (SIDE, SIDE)
    assert f"  MODEL_DIR={output_dir} bash sample_from_pix2pix.sh\n" in printed
    assert not list(output_dir.rglob("*.bin.index*")) and not list(output_dir.glob(".*"))


def test_config_records_arguments_and_versions(trained):
    config = json.loads((trained[0] / "training_config.json").read_text())
    arguments = config["arguments"]
    assert (arguments["resolution"], arguments["add_progress"], arguments["seed"]) == (SIDE, True, 42)
    assert (arguments["input_frame_idx"], arguments["target_frame_idx"]) == (20, 21)
    assert "hub_token" not in arguments
    assert config["library_versions"]["torch"] == torch.__version__


def test_tensorboard_shows_every_step_and_the_validation_pictures(trained):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    logs = trained[0] / "logs"
    for name in ("loss", "learning_rate", "grad_norm", "samples_per_second"):
        assert sorted(scalars(logs, f"train/{name}")) == list(range(1, STEPS + 1)), name
    assert list(scalars(logs, "train/learning_rate").values()) == pytest.approx([1e-3] * STEPS)
    losses = list(scalars(logs, "train/loss").values())
    means = [sum(losses[max(0, end - 2) : end]) / min(end, 2) for end in range(1, STEPS + 1)]  # an epoch: 1.5 steps
    assert list(scalars(logs, "train/loss_epoch_mean").values()) == pytest.approx(means)

    [event_file] = logs.rglob("events*")  # one run, of one file
    events = read_events(event_file)
    where_something_moves = [f"{metric}_where_something_moves" for metric in ("psnr", "ssim", "mae", "sharpness")]
    metrics = ["share_of_frames", *where_something_moves, "psnr", "ssim"]
    lines = {metric: [f"validation_{metric}/{way}" for way in ("copy", "sample", "vae_ceiling")] for metric in metrics}
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("validation")]
    assert sorted(tags) == sorted(itertools.chain(*lines.values()))  # no mean of a single prediction
    # 6 samples, 4 a step: two epochs end with step 3, four with step 6.
    assert all(sorted(scalars(logs, tag)) == [3, 6, 8] for tag in tags)
    copies = scalars(logs, "validation_psnr/copy")
    assert not any("rollout" in tag for tag in events.Tags()["images"])  # of one horizon
    assert copies[3] == copies[8] != scalars(logs, "validation_psnr/sample")[8]

    [layout] = events.Tensors("custom_scalars__config__")
    [category] = Layout.FromString(layout.tensor_proto.string_val[0]).category
    charts = {chart.title: chart.multiline.tag for chart in category.chart}
    assert {title: sorted(tag for tag in tags if re.search(regex, tag)) for title, [regex] in charts.items()} == lines
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")

    sentences = [
        f"validation_{task}/{label}. And 50% of the action has been completed." for task, label in LABELS.items()
    ]
    assert sorted(events.Tags()["images"]) == sorted(sentences)
    assert [event.step for event in events.Images(sentences[0])] == [3, 6, 8]
    first = events.Images(sentences[0])[0]
    assert (first.width, first.height) == (3 * 2 * SIDE, 2 * SIDE)  # input, sample, target


def test_validation_pictures_are_saved(trained):
    names = sorted(path.name for path in (trained[0] / "validation").iterdir())
    assert names == [f"step-{step:06}_val{number}.png" for step in (3, 6, 8) for number in range(3)]
    with Image.open(trained[0] / "validation" / names[0]) as picture:
        assert picture.width > 3 * 256


def test_the_pipeline_is_saved_before_the_last_validation(trained):
    saved, last_picture = trained[0] / "model_index.json", trained[0] / "validation" / "step-000008_val0.png"
    assert saved.stat().st_mtime_ns <= last_picture.stat().st_mtime_ns


def test_old_checkpoints_are_removed_and_short_videos_named(trained):
    output_dir, printed = trained
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-6"]
    assert "1 without frame 21 (train_short)" in printed
    assert "training on 6 frame pairs" in printed


def test_resuming_with_other_settings_is_refused(trained, data_dir, tiny_model, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    options = ("--add_progress", "--num_validation_images", 0, "--resume_from_checkpoint", "latest")
    refused = train(data_dir, tiny_model, tmp_path, *options, "--seed", 7, "--train_batch_size", 2, check=False)
    assert refused.returncode != 0
    assert "seed was 42, is 7" in refused.stderr
    assert "global_batch_size was 4, is 2" in refused.stderr
    assert "Traceback" not in refused.stderr


def largest_mean_difference(*output_dirs: Path) -> float:
    """Of any of the UNet's weights. It is small where only the order of sums differs; the learning rate is 1e-3."""
    one, other = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in output_dirs)
    return max((one[name] - other[name]).abs().mean().item() for name in one)


def test_two_processes_give_the_losses_and_the_average_of_one(trained, data_dir, tiny_model, tmp_path):
    options = ("--add_progress", "--num_validation_images", 1, "--validation_epochs", 4, "--use_ema")
    train(data_dir, tiny_model, tmp_path / "one", *options)
    divided = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    train(data_dir, tiny_model, tmp_path / "two", *options, *divided, processes=2)
    for figure in ("loss", "grad_norm"):
        one, two = (scalars(path / "logs", f"train/{figure}") for path in (trained[0], tmp_path / "two"))
        assert sorted(two) == list(range(1, STEPS + 1))
        assert two == pytest.approx(one, rel=1e-3), figure
    assert largest_mean_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert largest_mean_difference(tmp_path / "one", trained[0]) > 1e-4  # the average is not the last


def test_lora_resumes_and_is_saved_merged_with_the_adapter_beside(data_dir, tiny_model, tmp_path):
    """Its average with one process, resumed, and with two."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    options = ("--use_lora", "--lora_rank", 4, "--use_ema", "--num_validation_images", 1, "--validation_epochs", 4)
    one, resumed, two = (tmp_path / name for name in ("one", "resumed", "two"))
    train(data_dir, tiny_model, one, *options)
    train(data_dir, tiny_model, resumed, *options, "--resume_from_checkpoint", one / "checkpoint-3")
    train(data_dir, tiny_model, two, *options, processes=2)
    assert final_weights(one) == final_weights(resumed)
    assert largest_mean_difference(one, two) < 1e-5
    assert len(list((one / "validation").iterdir())) == 2

    base, trained = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in (tiny_model, one))
    changed = {name for name, weight in base.items() if not torch.equal(weight, trained[name])}
    assert {name for name in changed if "attn" not in name} == {"conv_in.weight", "conv_in.bias"}
    assert sum(".attn" in name for name in changed) > 8 and trained.keys() == base.keys()
    with_adapter = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_model)
    with_adapter.load_lora_weights(one, weight_name="pytorch_lora_weights.safetensors")
    with_adapter.fuse_lora()
    with_adapter.unload_lora_weights()
    fused, attention = with_adapter.unet.state_dict(), [name for name in changed if "attn" in name]
    assert max((fused[name] - trained[name]).abs().max() for name in attention) < 1e-6


FSDP = ("--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "NO_WRAP", "--fsdp_state_dict_type")
DEEPSPEED = ("--use_deepspeed", "--zero_stage", 2)
without_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="the package deepspeed is not installed")


@pytest.mark.parametrize(
    "sharing",
    [
        (*FSDP, "FULL_STATE_DICT"),
        (*FSDP, "SHARDED_STATE_DICT"),
        pytest.param((*DEEPSPEED, "--mixed_precision", "no"), marks=without_deepspeed),
        pytest.param((*DEEPSPEED, "--mixed_precision", "bf16"), marks=without_deepspeed),
    ],
    ids=lambda sharing: sharing[-1],
)
def test_processes_that_share_out_the_weights_end_near_one(data_dir, tiny_model, tmp_path, sharing):
    """They clip, accumulate, warm up, validate, save and resume. (FSDP 1 refuses to start where there is no GPU.)"""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--lr_warmup_steps", 4, "--max_grad_norm", 0.1, "--adam_epsilon", 1e-3)  # with which clipping matters
    options += ("--num_validation_images", 1, "--validation_epochs", 4)
    train(data_dir, tiny_model, one, *options)
    launched = {"processes": 2, "kind": [*sharing, "-m", "tests.sharing_on_cpu"]}
    options += ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    train(data_dir, tiny_model, two, *options, "--max_train_steps", 3, **launched)
    assert any((two / "checkpoint-3").glob("pytorch_model*"))  # FSDP's and DeepSpeed's own
    resumed = train(data_dir, tiny_model, two, *options, "--resume_from_checkpoint", "latest", **launched)
    assert f"resuming from {two}/checkpoint-3" in resumed.stdout and "warning: " not in resumed.stderr
    tolerance, weights_tolerance = (3e-2, 5e-4) if sharing[-1] == "bf16" else (1e-3, 1e-4)
    for figure in ("loss", "grad_norm"):
        expected, shared = (scalars(path / "logs", f"train/{figure}") for path in (one, two))
        assert shared == pytest.approx(expected, rel=tolerance), figure
    assert largest_mean_difference(one, two) < weights_tolerance  # float32 is saved, whatever computes
    pictures = sorted(path.name[:11] for path in (two / "validation").iterdir())
    assert pictures == ["step-000003", "step-000006", "step-000008"]


def one_step_error(model: Path, data_dir: Path) -> float:
    """Root mean square error of the scaled latents that one step gives, over the validation pairs."""
    pairs = load_frame_pairs(data_dir, "val", SIDE)[0]
    pipeline, generators = load_pipeline(model), [torch.Generator().manual_seed(seed) for seed in range(len(pairs))]
    with torch.no_grad():
        inputs, targets = (
            encode_pictures(pipeline, [Image.open(getattr(pair, name)) for pair in pairs]).mode()
            for name in ("input_image", "edited_image")
        )
        prompts = encode_prompts(pipeline, [pair.edit_prompt for pair in pairs])
        options = SamplingOptions(num_inference_steps=1, image_guidance_scale=1.0)
        errors = denoise(pipeline, inputs, prompts, generators, options) - targets
    return pipeline.vae.config.scaling_factor * errors.square().mean().sqrt().item()


def test_a_noise_model_becomes_a_velocity_model_that_predicts_in_one_step(data_dir, tiny_model, tmp_path):
    options = ("--num_validation_images", 0, "--max_train_steps", 40, "--checkpointing_steps", 100)
    velocity = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    train(data_dir, tiny_model, tmp_path / "noise", *options)
    train(data_dir, tiny_model, tmp_path / "velocity", *options, *velocity)
    before, after = (one_step_error(tmp_path / name, data_dir) for name in ("noise", "velocity"))
    assert before > 3 and after < 1
    scheduler = json.loads((tmp_path / "velocity/scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    assert scheduler["timestep_spacing"] == "trailing"


def test_an_adapter_has_a_learning_rate_of_its_own(data_dir, tiny_model, tmp_path):
    command = ["python", "train_instruct_pix2pix.py", "--train_data_dir", data_dir, "--resolution", SIDE]
    command += ["--pretrained_model_name_or_path", tiny_model, "--output_dir", tmp_path, "--use_lora"]
    run(*command, "--max_train_steps", 1, "--num_validation_images", 0)
    assert json.loads((tmp_path / "training_config.json").read_text())["arguments"]["learning_rate"] == 1e-4


def test_options_work_together(data_dir, tmp_path):
    """A plain 4-channel model, EMA, accumulation, mirrored pairs, a schedule with warm-up, a precision, workers, …"""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    model = tmp_path / "model"
    make_tiny_pipeline(in_channels=4, prediction_type="v_prediction").save_pretrained(model)
    options = "--use_ema --random_flip --gradient_accumulation_steps 2 --lr_scheduler constant --lr_warmup_steps 4"
    options += " --snr_gamma 5 --gradient_checkpointing --scale_lr --mixed_precision auto --allow_tf32"
    options += " --max_train_samples 3 --dataloader_num_workers 1 --num_validation_images 1 --learning_rate 1e-4"
    options += " --hub_token hf_secret"
    output_dir = tmp_path / "output"
    done = train(data_dir, model, output_dir, *options.split())
    assert "training on 3 frame pairs" in done.stdout
    precision = "bf16" if is_fast_in_bf16("cpu") else "no"
    assert f"training on the CPU, mixed precision: {precision}" in done.stdout
    rates = scalars(output_dir / "logs", "train/learning_rate")
    assert rates == pytest.approx({step: 8e-4 * min(1, (step - 1) / 4) for step in range(1, STEPS + 1)})
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
    assert pipeline.unet.config.in_channels == 8
    checkpoint = StableDiffusionInstructPix2PixPipeline.from_pretrained(model).unet
    assert not torch.equal(pipeline.unet.conv_out.weight, checkpoint.conv_out.weight)
    texts = [path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not any(b"hf_secret" in text for text in texts)


def test_compiled_training_gives_the_same_losses(trained, data_dir, tiny_model, tmp_path):
    """Also a guard against wrong gradients: torch 2.13's default compilation of the UNet has them."""
    options = ("--add_progress", "--num_validation_images", 0, "--compile", "--report_to", "tensorboard")
    train(data_dir, tiny_model, tmp_path, *options)
    plain, compiled = (scalars(output_dir / "logs", "train/loss") for output_dir in (trained[0], tmp_path))
    assert compiled == pytest.approx(plain, abs=1e-3)


def test_upload_leaves_out_checkpoints_and_never_names_the_token(monkeypatch, tmp_path):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, exist_ok):
            if name == "taken/name":
                raise OSError("403 Forbidden")
            return argparse.Namespace(repo_id=f"user/{name}")

        def upload_folder(self, **options):
            if options["repo_id"] == "user/full":
                raise OSError("the connection broke")
            calls.append(("upload", options))

    monkeypatch.setattr("pecn.model.HfApi", Hub)
    upload(tmp_path / "run", create_hub_repository("run", "hf_secret"), "hf_secret", ["checkpoint-*/**"])
    assert calls[0] == calls[1] == ("token", "hf_secret")
    assert (calls[2][1]["repo_id"], calls[2][1]["ignore_patterns"]) == ("user/run", ["checkpoint-*/**"])
    with pytest.raises(
        UserError, match="pipeline is in .*run, but its upload failed: the connection broke; .*hf upload"
    ):
        upload(tmp_path / "run", "user/full", "hf_secret", [])
    with pytest.raises(UserError, match="cannot upload to taken/name: 403 Forbidden") as refusal:
        create_hub_repository("taken/name", "hf_secret")
    assert "hf_secret" not in str(refusal.value)


def test_weights_that_are_not_finite_stop_the_run(data_dir, tiny_model, tmp_path):
    """The warm-up leaves the first step harmless; the second one's loss is finite, its weights are not."""
    options = ("--learning_rate", 1e38, "--lr_warmup_steps", 1, "--report_to", "none", "--checkpointing_steps", 1)
    done = train(data_dir, tiny_model, tmp_path, *options, check=False)
    assert done.returncode != 0
    assert "error: after step 2 the weights are not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "model_index.json").exists()
    assert not (tmp_path / "logs").exists()
    without_checkpoints = ("--learning_rate", 1e38, "--checkpointing_steps", 100, "--num_validation_images", 0)
    done = train(data_dir, tiny_model, tmp_path / "other", *without_checkpoints, check=False)
    assert "error: the loss of step 2 is nan" in done.stderr


def test_a_fresh_run_never_mixes_with_old_checkpoints(data_dir, tiny_model, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    done = train(data_dir, tiny_model, tmp_path, check=False)
    assert done.returncode == 1
    assert "holds checkpoints of an earlier run (checkpoint-500)" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resolution 100", "must be a multiple of 8, not 100"),
        ("--train_batch_size 0", "must be at least 1, not 0"),
        ("--train_batch_size 1.5", "'1.5' is not a whole number"),
        ("--num_predictions 0", "must be at least 1, not 0"),
        ("--residual yes", "must be True or False, not 'yes'"),
        ("--conditioning_dropout_prob 0.5", "must be at most 0.3333, not 0.5"),
        ("--learning_rate nan", "'nan' is not a number"),
        ("--adam_beta2 1", "must be below 1, not 1"),
        ("--max_grad_norm 0", "must be above 0, not 0"),
        ("--use_8bit_adam", "pip install bitsandbytes"),
    ],
)
def test_unusable_options_are_refused_at_once_in_one_line(options, message):
    done = run("python", "train_instruct_pix2pix.py", *options.split(), check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_mistakes_get_one_line(data_dir, tiny_model, tmp_path):
    def message(*arguments: object) -> str:
        done = run("python", "train_instruct_pix2pix.py", "--output_dir", tmp_path / "output", *arguments, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "python -m data.dataset --data_dir" in message("--train_data_dir", tmp_path)
    here = ("--train_data_dir", data_dir, "--resolution")
    assert "python -m data.video_loader --data_dir" in message(*here, 64)
    assert "train_filtered.json has both frames (frame 20 to 90)" in message(*here, SIDE, "--target_frame_idx", 90)
    assert not (tmp_path / "output").exists()
    nowhere = message(*here, SIDE, "--pretrained_model_name_or_path", "nobody/nothing")
    assert "HF_ENDPOINT" in nowhere and "nobody/nothing" in nowhere
    assert "no model_index.json" in message(*here, SIDE, "--pretrained_model_name_or_path", tmp_path)
    taken = tmp_path / "file"
    taken.write_text("kept")
    base_model = ("--pretrained_model_name_or_path", tiny_model)
    assert f"the folder {taken} cannot be made (it is a file)" in message(
        *here, SIDE, *base_model, "--output_dir", taken
    )
    assert taken.read_text() == "kept"
    resumed = ("--pretrained_model_name_or_path", tiny_model, "--resume_from_checkpoint", "checkpoint-77")
    assert "there is no checkpoint checkpoint-77" in message(*here, SIDE, *resumed)


def test_a_model_of_16_latent_channels_is_trained_and_sampled_from(data_dir, tmp_path):
    model, output_dir, results = tmp_path / "model", tmp_path / "trained", tmp_path / "results"
    make_tiny_pipeline(in_channels=32, latent_channels=16).save_pretrained(model)
    options = ("--max_train_steps", 2, "--random_flip", "--num_validation_images", 1)
    train(data_dir, model, output_dir, *options)
    command = ("python", "sample_from_pix2pix.py", "--model_dir", output_dir, "--output_dir", results)
    run(*command, "--num_predictions", 2, "--num_samples", 2)
    assert json.loads((results / "metrics.json").read_text())["summary"]["num_samples"] == 2
