"""Fine-tunes InstructPix2Pix to predict a future frame of a video.

    accelerate launch train_instruct_pix2pix.py --train_data_dir data/sthv2 --resolution 128 --output_dir outputs/run

The frozen VAE and text encoder see every frame and every prompt once, before the first step; a step is the UNet alone.
What a step sees is a pure function of the seed and the step's number: a resumed run equals an uninterrupted one, and
several processes equal one. Both are the work of pecn/encoded_frames.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.layout import (
    DEFAULT_DATA_DIR,
    UserError,
    filtered_annotations_path,
    frames_dir,
    make_folder,
    run_command,
    warn,
    write_file,
)
from data.sthv2_dataset_hf import DEFAULT_INPUT_FRAME_IDX, DEFAULT_TARGET_FRAME_IDX, describe_left_out, load_frame_pairs
from pecn.sampling_options import DEFAULT_OPTIONS, add_sampling_options, sampling_options

PROJECT_NAME = "instruct_pix2pix"
FROZEN_FOR_RESUME = (
    "resolution input_frame_idx target_frame_idx add_progress max_train_samples random_flip learning_rate scale_lr"
    " lr_scheduler lr_warmup_steps conditioning_dropout_prob use_8bit_adam use_ema adam_beta1 adam_beta2"
    " adam_weight_decay adam_epsilon max_grad_norm mixed_precision seed snr_gamma global_batch_size"
    " schedule_length encoded_data timestep_bias_strategy timestep_bias_multiplier timestep_bias_portion"
).split()


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; flags that diffusers' training examples have mean the same here."""
    parser = argparse.ArgumentParser(
        prog="train_instruct_pix2pix.py", usage="%(prog)s [options]", description=__doc__.splitlines()[0]
    )
    model = parser.add_argument_group("model").add_argument
    model(
        "--pretrained_model_name_or_path",
        default="timbrooks/instruct-pix2pix",
        help="hub id or directory (%(default)s)",
    )
    model("--revision", help="revision of a model on the hub")
    model("--variant", help="variant of the model's weight files, such as fp16")
    model("--cache_dir", help="where models from the hub are kept")

    data = parser.add_argument_group("data").add_argument
    data("--train_data_dir", type=Path, default=DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
    data("--resolution", type=int, default=128, help="side of the frames, uses frames_<R>x<R> (%(default)s)")
    data("--input_frame_idx", type=int, default=DEFAULT_INPUT_FRAME_IDX, help="frame that is given (%(default)s)")
    data("--target_frame_idx", type=int, default=DEFAULT_TARGET_FRAME_IDX, help="frame to predict (%(default)s)")
    data("--add_progress", action="store_true", help="prompts say how much of the action is done")
    data("--max_train_samples", type=int, help="train on this many frame pairs, spread over the tasks")
    data("--random_flip", action="store_true", help="mirror half of the pairs, swapping left and right in the prompt")
    data("--dataloader_num_workers", type=int, default=0, help="processes that prepare batches (%(default)s)")

    steps = parser.add_argument_group("steps").add_argument
    steps("--train_batch_size", type=int, default=8, help="samples a process and pass (%(default)s)")
    steps("--gradient_accumulation_steps", type=int, default=1, help="passes per optimiser step (%(default)s)")
    steps("--num_train_epochs", type=int, default=20, help="(%(default)s)")
    steps("--max_train_steps", type=int, help="optimiser steps, overrides --num_train_epochs")
    steps("--seed", type=int, default=42, help="order, noise, timesteps and dropout follow from it (%(default)s)")
    steps(
        "--conditioning_dropout_prob",
        type=float,
        default=0.05,
        help="for text, image, and both; 0 is off (%(default)s)",
    )
    steps("--snr_gamma", type=float, help="min-SNR weighting of the loss (Hang et al., 2023), 5.0 is usual")
    steps(
        "--timestep_bias_strategy",
        choices=["none", "later"],
        default="none",
        help="'later' draws the last, noisiest timesteps more often: there the motion is decided (%(default)s)",
    )
    steps("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often (%(default)s)")
    steps("--timestep_bias_portion", type=float, default=0.25, help="the share of timesteps meant (%(default)s)")

    optimizer = parser.add_argument_group("optimiser").add_argument
    optimizer("--learning_rate", type=float, default=5e-6, help="(%(default)s)")
    optimizer("--scale_lr", action="store_true", help="multiply the learning rate by the global batch size")
    optimizer(
        "--lr_scheduler",
        default="constant",
        choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
    )
    optimizer("--lr_warmup_steps", type=int, default=0, help="optimiser steps of linear warm-up (%(default)s)")
    optimizer("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with 8-bit state")
    optimizer("--adam_beta1", type=float, default=0.9)
    optimizer("--adam_beta2", type=float, default=0.999)
    optimizer("--adam_weight_decay", type=float, default=1e-2)
    optimizer("--adam_epsilon", type=float, default=1e-8)
    optimizer("--max_grad_norm", type=float, default=1.0, help="(%(default)s)")
    optimizer("--use_ema", action="store_true", help="keep a moving average of the weights and save that")

    speed = parser.add_argument_group("speed and memory").add_argument
    speed("--mixed_precision", choices=["no", "fp16", "bf16"], help="(what accelerate is configured for)")
    speed("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    speed("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later GPUs")
    speed("--compile", action="store_true", help="torch.compile the UNet: slow first step, faster ones after")
    speed("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of PyTorch's attention")

    output = parser.add_argument_group("output").add_argument
    output("--output_dir", type=Path, default=Path("outputs/instruct_pix2pix_128"), help="(%(default)s)")
    output("--logging_dir", default="logs", help="for TensorBoard, inside the output directory (%(default)s)")
    output("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="(%(default)s)")
    output("--checkpointing_steps", type=int, default=500, help="optimiser steps between checkpoints (%(default)s)")
    output("--checkpoints_total_limit", type=int, help="keep only this many checkpoints, the newest")
    output("--resume_from_checkpoint", help="a checkpoint's directory, or 'latest'")
    output("--validation_epochs", type=int, default=5, help="epochs between validations (%(default)s)")
    output(
        "--num_validation_images", type=int, default=4, help="validation entries to predict, 0 for none (%(default)s)"
    )
    output("--push_to_hub", action="store_true", help="upload the trained pipeline")
    output("--hub_model_id", help="repository to upload to (the output directory's name)")
    output("--hub_token", help="token for the upload (what `hf auth login` stored); never logged")
    add_sampling_options(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once

from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

from pecn.checkpoints import (
    HOW_TO_RESUME,
    find_checkpoint,
    remove_unfinished,
    removed_where_the_disk_is_full,
    save_checkpoint,
)
from pecn.encoded_frames import TrainingBatches, load_batches
from pecn.hub import create_hub_repository, upload
from pecn.interruption import Interrupted, StopRequest
from pecn.model import TRAINING_CONFIG, load_pipeline, quiet_libraries
from pecn.optimization import (
    LOG_EVERY,
    StepLog,
    averaged_weights,
    check_weights,
    compile_unet,
    create_lr_scheduler,
    create_optimizer,
    optimisation_step,
    prepare_unet,
    whole_unet,
)
from pecn.pictures import comparison_picture, save_picture
from pecn.sampling import choose_samples, predict_pairs
from pecn.scores import mean_scores, score_result
from pecn.shortage import Shortage, shortages_in_one_line


def check_args(args: argparse.Namespace) -> None:
    """Refuses values that could only fail later, before anything heavy is loaded."""
    at_least_one = (
        "resolution train_batch_size gradient_accumulation_steps num_train_epochs checkpointing_steps validation_epochs"
        " max_train_steps max_train_samples checkpoints_total_limit"
    )
    for name in at_least_one.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    sampling_options(args)
    for name in ("lr_warmup_steps", "num_validation_images", "dataloader_num_workers"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be at least 0, not {getattr(args, name)}")
    for name in ("learning_rate", "adam_weight_decay", "adam_epsilon"):
        if not 0 <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be at least 0, not {getattr(args, name)}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name} must lie in [0, 1), not {getattr(args, name)}")
    for name in ("max_grad_norm", "snr_gamma", "timestep_bias_multiplier"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} must be above 0, not {getattr(args, name)}")
    if args.resolution % 8:
        raise UserError(f"--resolution must be a multiple of 8, not {args.resolution}")
    if not 0 < args.timestep_bias_portion <= 1:
        raise UserError(f"--timestep_bias_portion must lie in (0, 1], not {args.timestep_bias_portion}")
    if not 0 <= args.conditioning_dropout_prob <= 1 / 3:
        raise UserError(f"--conditioning_dropout_prob must lie in [0, 1/3], not {args.conditioning_dropout_prob}")
    if args.report_to == "wandb" and not find_spec("wandb"):
        raise UserError("--report_to wandb needs wandb: pip install wandb, or use tensorboard")
    if args.use_8bit_adam and not find_spec("bitsandbytes"):
        raise UserError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    if args.enable_xformers_memory_efficient_attention and not find_spec("xformers"):
        raise UserError(
            "xformers is not installed: pip install xformers, or leave the flag out for PyTorch's attention"
        )


# Training


# Checkpoints, validation, results


def resume(accelerator: Accelerator, checkpoint: Path, config: dict[str, Any]) -> int:
    """Loads a checkpoint; returns the number of steps done. Refuses one of another experiment."""
    saved = json.loads((checkpoint / TRAINING_CONFIG).read_text(encoding="utf-8"))["arguments"]
    now = config["arguments"]
    names = {"encoded_data": "the model, frames or prompts (as a hash)"}
    changed = [
        f"{names.get(name, name)} was {saved.get(name)}, is {now[name]}"
        for name in FROZEN_FOR_RESUME
        if saved.get(name) != now[name]
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to other settings ({'; '.join(changed)}); resume with the same ones, or train into"
            " another OUTPUT_DIR"
        )
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # of its passes, which may be divided otherwise now; checkpoints lie between steps
    return int(checkpoint.name.removeprefix("checkpoint-"))


def training_config(args: argparse.Namespace, **derived: Any) -> dict[str, Any]:
    """What `training_config.json` records: all arguments but the token, derived figures, library versions."""
    import accelerate
    import datasets
    import diffusers
    import torch
    import transformers

    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["hub_token"]
    libraries = (torch, diffusers, transformers, accelerate, datasets)
    versions = {library.__name__: library.__version__ for library in libraries}
    return {"arguments": arguments | derived, "library_versions": versions | {"python": platform.python_version()}}


def as_json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"


def validate(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    unet: UNet2DConditionModel,
    pairs: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Predicts the validation pairs with the UNet as it is, saves the pictures and logs them with their scores."""
    pipeline.unet = unet.eval()
    pipeline.to(accelerator.device)
    with accelerator.autocast():
        options = sampling_options(args)
        results = list(predict_pairs(pipeline, pairs, args.seed, args.train_batch_size, options, show_progress=False))
    for frozen in (pipeline.vae, pipeline.text_encoder):
        frozen.to("cpu")
    unet.train()

    folder = args.output_dir / "validation"
    folder.mkdir(exist_ok=True)
    pictures, scores = {}, [score_result(result) for result in results]
    for result, its_scores in zip(results, scores):
        picture = comparison_picture(result, f"step {step}", its_scores)
        save_picture(folder / f"step-{step:06}_{result['video_id']}.png", picture)
        pictures[f"validation/{result['video_id']}"] = picture[None]
    means = mean_scores(scores)
    # A dictionary becomes several lines in one chart, so that the prediction is seen to pass the copy.
    charts = {"psnr": means["psnr"], "ssim": means["ssim"], "psnr_where_something_moves": means["moving"]["psnr"]}
    accelerator.log({f"validation/{name}": lines for name, lines in charts.items() if None not in lines.values()}, step)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **options)
    psnr = means["psnr"]
    accelerator.print(
        f"step {step}: validation PSNR {psnr['prediction']:.2f} dB, copying the input {psnr['copy']:.2f} dB,"
        f" pictures in {folder}"
    )


def save_pipeline(pipeline: StableDiffusionInstructPix2PixPipeline, output_dir: Path, config: dict[str, Any]) -> None:
    """Puts the whole pipeline and its training config into the output directory, model_index.json last."""
    unfinished = output_dir / ".pipeline.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with removed_where_the_disk_is_full(unfinished, f"the pipeline in {output_dir}", output_dir):
        pipeline.to("cpu").save_pretrained(unfinished, safe_serialization=True)
        write_file(unfinished / TRAINING_CONFIG, as_json(config))
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for part in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
        if (output_dir / part.name).is_dir():
            shutil.rmtree(output_dir / part.name)
        os.replace(part, output_dir / part.name)
    unfinished.rmdir()


# The run


def find_training_pairs(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The frame pairs to train on and those to validate with."""
    chosen = []
    for split, most in (("train", args.max_train_samples), ("val", args.num_validation_images)):
        pairs, left_out = load_frame_pairs(
            args.train_data_dir, split, args.resolution, args.input_frame_idx, args.target_frame_idx, args.add_progress
        )
        if left_out and is_first_process():
            print(f"{split}: {describe_left_out(left_out)}")
        chosen.append(pairs if split == "train" and most is None else choose_samples(pairs, most, args.seed))
    if not chosen[0]:
        raise UserError(
            f"no training video of {args.train_data_dir} has both frames {args.input_frame_idx} and"
            f" {args.target_frame_idx}; look at: python -m data.sthv2_dataset_hf --data_dir {args.train_data_dir}"
        )
    return chosen[0], chosen[1]


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    import torch
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    project = ProjectConfiguration(
        project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
    )
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # the others wait while one encodes
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 needs a GPU: train with MIXED_PRECISION=no (--mixed_precision no)")
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation_steps:
        raise UserError(
            f"accelerate is configured for {accelerator.gradient_accumulation_steps} gradient accumulation steps, the"
            f" command line says {args.gradient_accumulation_steps}: set GRADIENT_ACCUM to the former"
        )
    if args.use_ema and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            "--use_ema needs the whole UNet in each process, which FSDP and DeepSpeed share out: leave it out"
        )
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed takes it from the DataLoader that is prepared; ours divides its batches itself.
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def train(
    args: argparse.Namespace,
    train_pairs: list[dict[str, Any]],
    validation_pairs: list[dict[str, Any]],
    checkpoint: Path | None,
    stop: StopRequest,
) -> None:
    """The whole run: from a checkpoint, or from the base model, to the trained pipeline."""
    quiet_libraries()
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel
    from tqdm import tqdm

    from pecn.encoded_frames import TrainingBatches, encode_once
    from pecn.frame_check import check_frames
    from pecn.freed_memory import keep_freed_memory

    accelerator = create_accelerator(args)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    stop.share()
    make_folder(args.output_dir)
    if accelerator.is_main_process:
        remove_unfinished(args.output_dir)
    check_frames([*train_pairs, *validation_pairs], args.resolution)
    if args.push_to_hub and accelerator.is_main_process:
        repository = create_hub_repository(args)

    hub_options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(args.pretrained_model_name_or_path, **hub_options)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet = pipeline.unet
    prepare_unet(unet, args)
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)

    latents, embeddings, encoded_data = encode_once(pipeline, train_pairs, args, accelerator)
    batches = TrainingBatches(
        latents,
        embeddings,
        args,
        noise_scheduler.config.num_train_timesteps,
        pipeline.vae.config.scaling_factor,
        accelerator.num_processes,
        accelerator.process_index,
    )
    max_train_steps = batches.max_train_steps
    # A constant schedule does not know where training ends, so that such a run can be prolonged.
    schedule_length = None if args.lr_scheduler.startswith("constant") else max_train_steps
    config = training_config(
        args, global_batch_size=batches.global_batch_size, schedule_length=schedule_length, encoded_data=encoded_data
    )

    learning_rate = args.learning_rate * (batches.global_batch_size if args.scale_lr else 1)
    optimizer = create_optimizer(unet, args, learning_rate)
    lr_scheduler = create_lr_scheduler(optimizer, args, max_train_steps)
    accelerator.register_for_checkpointing(lr_scheduler)
    ema = EMAModel(unet.parameters()) if args.use_ema else None
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if ema:
        accelerator.register_for_checkpointing(ema)

    first_step = 0
    if checkpoint:
        first_step = resume(accelerator, checkpoint, config)
        if first_step > max_train_steps:
            raise UserError(
                f"{checkpoint} is beyond the {max_train_steps} steps asked for; raise EPOCHS or MAX_TRAIN_STEPS"
            )
        accelerator.print(f"resuming from {checkpoint}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet, starting from the base model")
    if ema:
        ema.to(accelerator.device)  # after the checkpoint, which is loaded to the CPU
    if args.report_to != "none":
        accelerator.init_trackers(PROJECT_NAME, {name: str(value) for name, value in config["arguments"].items()})

    validation_steps = steps_to_validate_after(batches, args.validation_epochs) if validation_pairs else set()
    print_plan(accelerator, args, batches)

    model = compile_unet(unet) if args.compile else unet
    loader = load_batches(batches, first_step, accelerator, args)
    step_log = StepLog(accelerator, batches.global_batch_size)
    progress_bar = tqdm(
        total=max_train_steps,
        initial=first_step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    with stop.deferred(), progress_bar:
        for step in range(first_step + 1, max_train_steps + 1):
            loss, grad_norm = optimisation_step(accelerator, model, optimizer, noise_scheduler, loader, args)
            step_log.add(step, loss, grad_norm, lr_scheduler.get_last_lr()[0])
            lr_scheduler.step()
            if ema:
                ema.step(unet.parameters())
            progress_bar.update()

            stopped_by = stop.agreed() if step < max_train_steps else 0
            save_now, validate_now = step % args.checkpointing_steps == 0 or stopped_by, step in validation_steps
            if step % LOG_EVERY == 0 or save_now or validate_now or step == max_train_steps:
                figures = step_log.flush()
                progress_bar.set_postfix(loss=f"{figures['train/loss']:.4f}")
            if save_now or step == max_train_steps:
                check_weights(accelerator, unet, step)
            if save_now:
                notes = {TRAINING_CONFIG: as_json(config)}
                saved = save_checkpoint(accelerator, args.output_dir, step, notes, args.checkpoints_total_limit)
            if stopped_by:
                accelerator.end_training()
                progress_bar.close()
                raise Interrupted(stopped_by, f"after step {step}: go on from {saved} with {HOW_TO_RESUME}")
            if validate_now:
                with averaged_weights(ema, unet):
                    current = whole_unet(accelerator, unet)
                    if accelerator.is_main_process:
                        validate(pipeline, current, validation_pairs, args, accelerator, step)
                accelerator.wait_for_everyone()
            if save_now or validate_now:
                step_log.restart_clock()

    with stop.deferred():
        if ema:
            ema.copy_to(unet.parameters())
        pipeline.unet = whole_unet(accelerator, unet)
        if accelerator.is_main_process:
            save_pipeline(pipeline, args.output_dir, config)
    if accelerator.is_main_process:
        print(f"the trained pipeline is in {args.output_dir}; sample from it with:\n  {sampling_command(args)}")
    try:
        if args.push_to_hub and accelerator.is_main_process:
            upload(args, repository)
            print(f"uploaded to {repository}")
        accelerator.end_training()
    except Interrupted as interruption:
        raise Interrupted(interruption.signal_number, f"after training: the pipeline is in {args.output_dir}") from None


def sampling_command(args: argparse.Namespace) -> str:
    """The shell command that samples from the trained model on the validation videos of its training data."""
    variables = {
        "MODEL_DIR": args.output_dir,
        "FRAMES_DIR": frames_dir(args.train_data_dir, args.resolution),
        "VAL_ANNOTATIONS": filtered_annotations_path(args.train_data_dir, "val"),
        "INPUT_FRAME_IDX": args.input_frame_idx,
        "TARGET_FRAME_IDX": args.target_frame_idx,
    }
    options = sampling_options(args)
    for field in fields(options):
        if (value := getattr(options, field.name)) != getattr(DEFAULT_OPTIONS, field.name):
            variables[field.name.upper()] = value
    words = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    return " ".join([*words, "bash sample_from_pix2pix.sh"])


def steps_to_validate_after(batches: TrainingBatches, validation_epochs: int) -> set[int]:
    """The optimiser steps that end every `validation_epochs`-th epoch, and the last one."""
    last = batches.max_train_steps
    ends = (batches.steps_after_epochs(epoch) for epoch in itertools.count(validation_epochs, validation_epochs))
    return {*itertools.takewhile(lambda step: step < last, ends), last}


def print_plan(accelerator: Accelerator, args: argparse.Namespace, batches: TrainingBatches) -> None:
    num_epochs = batches.max_train_steps * batches.global_batch_size / batches.num_samples
    accelerator.print(
        f"training on {batches.num_samples} frame pairs ({args.input_frame_idx} -> {args.target_frame_idx},"
        f" {args.resolution}x{args.resolution}) for {batches.max_train_steps} steps of"
        f" {batches.global_batch_size} samples,"
        f" {num_epochs:.3g} epochs, on {accelerator.num_processes} x {accelerator.device.type},"
        f" mixed precision {accelerator.mixed_precision}"
    )


def run(stop: StopRequest) -> None:
    args = parse_args()
    check_args(args)
    checkpoint, damaged = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    for line in damaged if is_first_process() else []:
        warn(f"{line}; {checkpoint} is used instead")
    train_pairs, validation_pairs = find_training_pairs(args)
    if args.num_validation_images and not validation_pairs:
        warn(f"no validation video of {args.train_data_dir} has both frames; training goes on without validation")
    try:
        with shortages_in_one_line(args):
            train(args, train_pairs, validation_pairs, checkpoint, stop)
    except Interrupted as interruption:
        kept = f"{checkpoint} is still the newest checkpoint" if checkpoint else "there is nothing to save"
        where = str(interruption) or f"before the first step: {kept}, run the same command again"
        raise Interrupted(interruption.signal_number, where) from None


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    try:
        run(StopRequest())
    except Interrupted as interruption:
        if is_first_process():
            print(f"interrupted {interruption}".rstrip(), file=sys.stderr)
        sys.exit(interruption.exit_status)
    except UserError as error:
        if is_first_process() or isinstance(error, Shortage):
            raise
        time.sleep(10)  # the first process says the same; its launcher ends this one as soon as it has
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
