"""A whole training run: set-up, loop, validation, saving."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex

from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from tqdm import tqdm

from data import cli, files, paths
from data.cli import UserError
from data.clips import Clip, FrameChoice, choice_of, choose_samples, describe_left_out, load_clips, verify_frames
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
            f"no video of {paths.filtered_annotations_path(args.train_data_dir, split)} has both frames ({choice}):"
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


def run(args: argparse.Namespace) -> None:
    """Trains as the options of train_instruct_pix2pix.py say."""
    choice = choice_of(vars(args))
    clips = find_clips_of(args, choice, "train", args.max_train_samples)
    num_validation = args.num_validation_images
    validation_clips = find_clips_of(args, choice, "val", num_validation) if num_validation else []
    accelerator = create_accelerator(args)
    stop = StopRequest()
    files.make_folder(args.output_dir)
    try:
        with files.only_one(args.output_dir, "training") if accelerator.is_main_process else contextlib.nullcontext():
            if accelerator.is_main_process:
                files.remove_leftovers(args.output_dir)
            train(args, clips, choice, validation_clips, accelerator, stop)
    except OSError as error:  # such as a full disk while the frames are encoded
        raise UserError(f"{cli.one_line(error)}; fix that and run the same command again") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: lower BATCH_SIZE and raise GRADIENT_ACCUM by as much, lower RESOLUTION, or set"
            ' EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"'
        ) from error
