"""Fine-tunes InstructPix2Pix to predict a future frame of a video.

    accelerate launch train_instruct_pix2pix.py --train_data_dir data/sthv2 --mixed_precision auto

The frozen VAE and text encoder see every frame and every prompt once, before the first step; a step runs the UNet
alone. Where the pairs of a video differ in their prompts (several horizons, any start with progress) it encodes these.
What a step sees is a pure function of the seed and the step's number: a resumed run equals an uninterrupted one, and
several processes equal one. Both are the work of pecn/encoded_frames.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from data import layout
from data.frame_choice import ESTIMATED, NO_PROGRESS, FrameChoice, add_frame_options, choice_of
from data.layout import UserError, number
from data.sthv2_dataset_hf import (
    Clip,
    choose_samples,
    describe_left_out,
    load_clips,
    verify_frames,
)
from pecn.sampling_options import add_sampling_options

PROJECT_NAME = "instruct_pix2pix"
NOT_UPLOADED = ("checkpoint-*/**", "encoded_cache/**", "validation/**", "train.log", ".*")  # nor any video's frames
# A run resumes only with the same of these, which shape its result.
FROZEN_FOR_RESUME = (
    "resolution input_frame_idx target_frame_idx horizon frames_per_video add_progress progress_source"
    " max_train_samples random_flip learning_rate scale_lr lr_scheduler lr_warmup_steps conditioning_dropout_prob"
    " input_noise use_8bit_adam use_ema adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm"
    " mixed_precision seed snr_gamma global_batch_size schedule_length use_lora lora_rank prediction_type"
    " rescale_betas_zero_snr hash_of_model_frames_and_prompts"
).split()


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; flags that diffusers' training examples have mean the same here."""
    parser = layout.CommandParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    count, index = number(at_least=1), number(at_least=0)
    not_negative, positive, below_one = number(float, at_least=0), number(float, above=0), {"at_least": 0, "below": 1}
    add = parser.add_argument_group("model").add_argument
    base_model = "timbrooks/instruct-pix2pix"
    add("--pretrained_model_name_or_path", default=base_model, help="hub id or directory (%(default)s)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="variant of the model's weight files, such as fp16")
    kinds = ["epsilon", "v_prediction"]
    add("--prediction_type", choices=kinds, help="v_prediction turns a model of the noise into one of the velocity")
    add("--rescale_betas_zero_snr", action="store_true", help="noise without any signal at the last timestep")
    add("--use_lora", **layout.SWITCH, help="train an adapter of the attention layers in place of all weights")
    add("--lora_rank", type=count, default=64, help="of the adapter (%(default)s)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--train_data_dir", type=Path, default=layout.DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames, uses frames_<R>x<R> (%(default)s)")
    add_frame_options(data, progress=True)
    spread_help = "with several pairs in a video: encode this many of its frames, spread, in place of all"
    add("--frames_per_video", type=number(at_least=2), help=spread_help)
    add("--add_progress", **layout.SWITCH, help="prompts say how much of the action is done")
    add("--max_train_samples", type=count, help="train on this many videos, spread over the tasks")
    add("--random_flip", action="store_true", help="mirror half of the pairs, swapping left and right in the prompt")
    add("--dataloader_num_workers", type=index, default=0, help="processes that prepare batches (%(default)s)")

    add = parser.add_argument_group("steps").add_argument
    add("--train_batch_size", type=count, default=16, help="samples a process and pass (%(default)s)")
    add("--gradient_accumulation_steps", type=count, default=1, help="passes per optimizer step (%(default)s)")
    add("--num_train_epochs", type=count, default=20, help="(%(default)s)")
    add("--max_train_steps", type=count, help="optimizer steps, overrides --num_train_epochs")
    add("--seed", type=int, default=42, help="order, noise, timesteps and dropout follow from it (%(default)s)")
    third = number(float, at_least=0, at_most=1 / 3)
    add("--conditioning_dropout_prob", type=third, default=0.05, help="for text, image, and both (%(default)s)")
    noise_help = "most noise in the input frame, against drift when predictions are chained, 0.5 for example"
    add("--input_noise", type=not_negative, default=0.0, help=f"{noise_help} (%(default)s)")
    add("--snr_gamma", type=positive, help="min-SNR weighting of the loss (Hang et al., 2023), 5.0 is usual")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=not_negative, help="(5e-6, with --use_lora 1e-4)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the global batch size")
    schedules = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    add("--lr_scheduler", choices=schedules, default="constant", help="(%(default)s)")
    add("--lr_warmup_steps", type=index, default=0, help="optimizer steps of linear warm-up (%(default)s)")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with 8-bit state")
    add("--adam_beta1", type=number(float, **below_one), default=0.9, help="(%(default)s)")
    add("--adam_beta2", type=number(float, **below_one), default=0.999, help="(%(default)s)")
    add("--adam_weight_decay", type=not_negative, default=1e-2, help="(%(default)s)")
    add("--adam_epsilon", type=not_negative, default=1e-8, help="(%(default)s)")
    add("--max_grad_norm", type=positive, default=1.0, help="(%(default)s)")
    add("--use_ema", action="store_true", help="keep a moving average of the weights and save that")

    add = parser.add_argument_group("speed and memory").add_argument
    precisions = ["auto", "no", "fp16", "bf16"]
    precision_help = "auto: bf16 where the GPU or CPU is fast in it, else fp16 (on a CPU no)"
    add("--mixed_precision", choices=precisions, help=f"{precision_help} (what accelerate is configured for)")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--allow_tf32", action="store_true", help="faster float32 products on Ampere and later GPUs")
    add("--compile", action="store_true", help="torch.compile the UNet: slow first step, faster ones after")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("outputs/instruct_pix2pix_128"), help="(%(default)s)")
    add("--logging_dir", default="logs", help="for TensorBoard, inside the output directory (%(default)s)")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="(%(default)s)")
    add("--checkpointing_steps", type=count, help="steps between checkpoints (spaced to cost under 2%% of the time)")
    limit_help = "keep only this many checkpoints, the newest (%(default)s)"
    add("--checkpoints_total_limit", type=count, default=2, help=limit_help)
    add("--resume_from_checkpoint", help="a checkpoint's directory, or 'latest'")
    add("--validation_epochs", type=count, default=5, help="epochs between validations (%(default)s)")
    add("--num_validation_images", type=index, default=4, help="validation pairs to predict, 0: none (%(default)s)")
    add("--push_to_hub", action="store_true", help="upload the trained pipeline")
    add("--hub_model_id", help="repository to upload to (the output directory's name)")
    add("--hub_token", help="token for the upload (what `hf auth login` stored); never logged")
    add_sampling_options(parser)

    args = parser.parse_args(arguments)
    estimated, estimator = args.progress_source == ESTIMATED, args.progress_estimator
    if (estimated or estimator) and not (estimated and estimator and args.add_progress):
        parser.error("estimated progress needs --add_progress, --progress_source estimated, --progress_estimator DIR")
    args.progress_source = args.progress_source if args.add_progress else NO_PROGRESS
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 5e-6
    for package, is_needed in (("bitsandbytes", args.use_8bit_adam), ("wandb", args.report_to == "wandb")):
        if is_needed and not find_spec(package):
            parser.error(f"the package {package} is missing: pip install {package}, or leave its option out")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from tqdm import tqdm

from pecn import checkpoints, optimization
from pecn.diffusion import add_image_channels, changed_scheduler
from pecn.encoded_frames import TrainingBatches, encode_once, load_batches
from pecn.frame_store import encoded_cache
from pecn.interruption import Interrupted, StopRequest
from pecn.lora import add_adapter
from pecn.model import create_hub_repository, find_model, load_pipeline, upload
from pecn.processes import create_accelerator, is_first_process, is_out_of_memory, on_main_process
from pecn.progress_model import with_estimates
from pecn.validation import start_trackers, validate_or_warn


def find_clips_of(args: argparse.Namespace, choice: FrameChoice, split: str, most: int | None) -> list[Clip]:
    """The clips of a split that offer pairs: at most `most` (None: all), spread over the tasks.

    Names the videos that are left out.
    """
    frames_per_video = args.frames_per_video if split == "train" else None
    found, left_out = load_clips(args.train_data_dir, split, args.resolution, choice, frames_per_video)
    if left_out and is_first_process():
        print(f"{split}: {describe_left_out(left_out)}")
    if not found:
        raise UserError(
            f"no video of {layout.filtered_annotations_path(args.train_data_dir, split)} has both frames ({choice}):"
            " choose others, or look at the list with: python -m data.sthv2_dataset_hf --data_dir"
            f" {args.train_data_dir} --resolution {args.resolution}"
        )
    return found if most is None else choose_samples(found, most, args.seed)


def load_base_model(args: argparse.Namespace) -> StableDiffusionInstructPix2PixPipeline:
    """The model to start from, its UNet ready for training, with the input frame's channels where it lacks them."""
    folder = find_model(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant)
    pipeline = load_pipeline(folder, variant=args.variant)
    pipeline.scheduler = changed_scheduler(pipeline.scheduler, args.prediction_type, args.rescale_betas_zero_snr)
    if pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels:
        add_image_channels(pipeline.unet)
    if args.use_lora:
        add_adapter(pipeline.unet, args.lora_rank, args.seed)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    pipeline.unet.train()
    return pipeline


def train(
    args: argparse.Namespace,
    clips: list[Clip],
    choice: FrameChoice,
    validation_clips: list[Clip],
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """The whole run: from a checkpoint, or from the base model, to the trained pipeline."""
    checkpoint = on_main_process(accelerator, checkpoints.find_checkpoint, args.output_dir, args.resume_from_checkpoint)
    if args.push_to_hub:  # before training, to fail early
        name = args.hub_model_id or args.output_dir.name
        repository = on_main_process(accelerator, create_hub_repository, name, args.hub_token)
    frames_hash = on_main_process(accelerator, verify_frames, clips, args.resolution)
    on_main_process(accelerator, verify_frames, validation_clips, args.resolution)

    pipeline = load_base_model(args)
    unet, noise_scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    cache_dir = encoded_cache(args.train_data_dir, args.output_dir)
    if choice.is_estimated:
        estimator = {"folder": args.progress_estimator, "pipeline": pipeline, "device": accelerator.device}
        estimate = functools.partial(with_estimates, choice=choice, **estimator)
        clips = on_main_process(accelerator, estimate, clips, seed=None, cache_dir=cache_dir)  # for all of their pairs
        validation_clips = on_main_process(accelerator, estimate, validation_clips, seed=args.seed)
    encoded = encode_once(pipeline, clips, choice, frames_hash, args.random_flip, cache_dir, accelerator)

    num_timesteps = noise_scheduler.config.num_train_timesteps
    batches = TrainingBatches(
        encoded=encoded,
        seed=args.seed,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_train_steps=args.max_train_steps,
        scaling_factor=pipeline.vae.config.scaling_factor,
        num_train_timesteps=num_timesteps,
        conditioning_dropout_prob=args.conditioning_dropout_prob,
        input_noise=args.input_noise,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    max_train_steps = batches.max_train_steps

    optimizer = optimization.create_optimizer(
        unet,
        args.learning_rate * (batches.global_batch_size if args.scale_lr else 1),
        args.use_8bit_adam,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    ema = optimization.MovingAverage(optimization.trained_weights(unet)) if args.use_ema else None
    unet, optimizer = accelerator.prepare(unet, optimizer)
    # Of the prepared one, since DeepSpeed replaces the optimizer where it offloads it to the CPU.
    lr_scheduler = optimization.create_lr_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, max_train_steps)
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))
    config = checkpoints.training_config(
        args,
        mixed_precision=accelerator.mixed_precision,
        global_batch_size=batches.global_batch_size,
        # A constant schedule does not know where training ends, so that such a run can be prolonged.
        schedule_length=None if args.lr_scheduler.startswith("constant") else max_train_steps,
        prediction_type=noise_scheduler.config.prediction_type,
        hash_of_model_frames_and_prompts=encoded.key,
    )
    steps_done = 0
    if checkpoint:
        steps_done = checkpoints.load_checkpoint(accelerator, checkpoint, config["arguments"], FROZEN_FOR_RESUME)
        if steps_done > max_train_steps:
            raise UserError(
                f"{checkpoint} is beyond the {max_train_steps} steps asked for; raise EPOCHS or MAX_TRAIN_STEPS"
            )
        accelerator.print(f"resuming from {checkpoint}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet, starting from the base model")
    if ema:
        ema.to(accelerator.device)  # after the checkpoint, which is loaded to the CPU
    if args.report_to != "none":
        start_trackers(accelerator, PROJECT_NAME, config["arguments"])
    accelerator.print(
        f"training on {batches.num_samples} {'frame pairs' if choice.is_one_pair else 'videos'} ({choice},"
        f" {args.resolution}x{args.resolution}) for {max_train_steps} steps of {batches.global_batch_size} samples,"
        f" {max_train_steps * batches.global_batch_size / batches.num_samples:.3g} epochs, on"
        f" {accelerator.num_processes} x {accelerator.device.type}, mixed precision {accelerator.mixed_precision}"
    )

    model = optimization.compile_unet(unet, accelerator) if args.compile else unet
    loader = load_batches(batches, steps_done, accelerator.device, pipeline, args.dataloader_num_workers)
    step_log = optimization.StepLog(accelerator, batches.global_batch_size, batches.num_samples)
    progress_bar = tqdm(
        total=max_train_steps, initial=steps_done, desc="Training", disable=not accelerator.is_main_process
    )
    checkpoint_times = checkpoints.CheckpointTimes(args.checkpointing_steps, sum(p.numel() for p in unet.parameters()))
    with stop.deferred(), progress_bar:
        for step in range(steps_done + 1, max_train_steps + 1):
            loss, grad_norm, updated = optimization.optimizer_step(
                accelerator, model, optimizer, noise_scheduler, loader, args.max_grad_norm, args.snr_gamma
            )
            step_log.add(step, loss, grad_norm, lr_scheduler.get_last_lr()[0], updated)
            if updated:
                lr_scheduler.step()
                if ema:
                    ema.step(optimization.trained_weights(unet))
            progress_bar.update()

            is_last = step == max_train_steps
            # Each process has a clock of its own: the main one's decides.
            stopped_by, is_due = stop.agree(accelerator.is_main_process and checkpoint_times.is_due(step))
            stopped_by = 0 if is_last else stopped_by
            save_now = is_due or stopped_by
            # The last step's validation comes after the pipeline is saved.
            validate_now = validation_clips and not is_last and batches.ends_epochs(step, args.validation_epochs)
            if step % optimization.LOG_EVERY == 0 or save_now or validate_now or is_last:
                progress_bar.set_postfix(loss=f"{step_log.flush():.4f}")
            if save_now or is_last:
                optimization.check_weights(accelerator, unet, step)
            if save_now:
                with checkpoint_times.saving():
                    saved = checkpoints.save_checkpoint(
                        accelerator, args.output_dir, step, config, args.checkpoints_total_limit
                    )
            if stopped_by:
                accelerator.end_training()
                raise Interrupted(stopped_by, f"after step {step}: go on from {saved} with {checkpoints.HOW_TO_RESUME}")
            if validate_now:
                validate_or_warn(pipeline, unet, ema, validation_clips, choice, args, accelerator, step)
            if save_now or validate_now:
                step_log.restart_clock()
    if not lr_scheduler.last_epoch:  # the number of updates
        raise UserError(f"every step was skipped and nothing learned: {optimization.WHY_SKIPPED}")

    with stop.deferred():
        with optimization.current_unet(pipeline, accelerator, unet, ema):
            if accelerator.is_main_process:
                checkpoints.save_pipeline(pipeline, args.output_dir, config)
        if validation_clips:
            validate_or_warn(pipeline, unet, ema, validation_clips, choice, args, accelerator, max_train_steps)
    sampling = f"MODEL_DIR={shlex.quote(str(args.output_dir))} bash sample_from_pix2pix.sh"
    accelerator.print(f"the trained pipeline is in {args.output_dir}; sample from it with:\n  {sampling}")
    if args.push_to_hub and accelerator.is_main_process:
        upload(args.output_dir, repository, args.hub_token, [*NOT_UPLOADED, f"{args.logging_dir}/**"])
        print(f"uploaded to {repository}")
    accelerator.end_training()


def main() -> None:
    args = ARGS
    choice = choice_of(vars(args))
    clips = find_clips_of(args, choice, "train", args.max_train_samples)
    num_validation = args.num_validation_images
    validation_clips = find_clips_of(args, choice, "val", num_validation) if num_validation else []
    accelerator = create_accelerator(args)
    stop = StopRequest()
    layout.make_folder(args.output_dir)
    try:
        with layout.only_one(args.output_dir, "training") if accelerator.is_main_process else contextlib.nullcontext():
            if accelerator.is_main_process:
                layout.remove_leftovers(args.output_dir)
            train(args, clips, choice, validation_clips, accelerator, stop)
    except OSError as error:  # such as a full disk while the frames are encoded
        raise UserError(f"{layout.one_line(error)}; fix that and run the same command again") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: lower BATCH_SIZE and raise GRADIENT_ACCUM by as much, lower RESOLUTION, or set"
            ' EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"'
        ) from error


if __name__ == "__main__":
    layout.run_command(main)
