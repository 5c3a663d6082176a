"""A whole training run: set-up, loop, validation, saving. train_instruct_pix2pix.py has the options."""

import argparse
import contextlib
import math
import shlex
import uuid

import torch
from accelerate import Accelerator, PartialState
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from data import paths
from data.cli import UserError, warn
from data.clips import Clip, FrameChoice, choose_balanced, describe_left_out, draw_pair, find_clips, frame_choice
from data.files import make_folder, only_one, remove_leftovers
from pecn import checkpoints, lora, optimization, processes
from pecn.encoded_frames import TrainingBatches, encode_once, encoded_cache
from pecn.model import read_training_config, round_weights
from pecn.processes import on_main_process
from pecn.sampling_options import sampling_options
from pecn.validation import Validation, check_wandb, start_trackers

PROJECT_NAME, BEST = "instruct_pix2pix", "best"  # the latter: the folder of --save_best
# They shape a run's result: it resumes only where they are as before.
FROZEN_FOR_RESUME = (
    "resolution input_frame_idx horizon add_progress max_train_samples random_flip learning_rate lr_scheduler"
    " lr_warmup_steps conditioning_dropout_prob model_guidance_scale use_8bit_adam use_ema adam_weight_decay"
    " max_grad_norm mixed_precision seed global_batch_size schedule_length use_lora lora_rank prediction_type"
    " rescale_betas_zero_snr hash_of_model_frames_and_prompts"
).split()


def run(args: argparse.Namespace) -> None:
    """Trains as the options of train_instruct_pix2pix.py say."""
    accelerator, stop = processes.create_accelerator(args), processes.StopRequest()
    make_folder(args.output_dir)
    try:
        with only_one(args.output_dir, "training") if accelerator.is_main_process else contextlib.nullcontext():
            if accelerator.is_main_process:
                remove_leftovers(args.output_dir)
            train(args, accelerator, stop)
    except (MemoryError, RuntimeError) as error:
        if not processes.is_out_of_memory(error):
            raise
        arguments = 'EXTRA_ARGS="--gradient_checkpointing --use_8bit_adam"'
        advice = f"lower BATCH_SIZE and raise GRADIENT_ACCUM by as much, lower RESOLUTION, or set {arguments}"
        raise UserError(f"out of memory: {advice}") from error


def find_clips_of(args: argparse.Namespace, choice: FrameChoice, split: str, most: int | None) -> list[Clip]:
    """The clips of a split that offer pairs: at most `most` (None: all), spread over the tasks.

    Names the videos that are left out.
    """
    found, left_out = find_clips(args.train_data_dir, split, args.resolution, choice, args.add_progress)
    if left_out:
        PartialState().print(f"{split}: {describe_left_out(left_out)}")
    if not found:
        annotations = paths.filtered_annotations_path(args.train_data_dir, split)
        advice = f"extract them with: {paths.extraction_command(args.train_data_dir, args.resolution)}"
        raise UserError(f"{annotations}: no video has both frames ({choice}): choose others (pairs: 0, 1) or {advice}")
    return found if most is None else choose_balanced(found, args.seed, most)


def train(args: argparse.Namespace, accelerator: Accelerator, stop: processes.StopRequest) -> None:
    """The whole run: from a checkpoint, or from the base model, to the trained pipeline."""
    # What can fail at once comes first.
    if args.report_to == "wandb":
        on_main_process(check_wandb)
    choice = frame_choice(vars(args))
    clips = find_clips_of(args, choice, "train", args.max_train_samples)
    validation_clips = find_clips_of(args, choice, "val", None) if args.num_validation_images else []
    checkpoint = on_main_process(checkpoints.find_checkpoint, args.output_dir, args.resume_from_checkpoint)
    if args.push_to_hub:
        name = args.hub_model_id or args.output_dir.name
        repository = on_main_process(checkpoints.create_hub_repository, name, args.hub_token, args.hub_private)

    pipeline = checkpoints.load_base_model(args)
    unet, noise_scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    cache_dir = encoded_cache(args.train_data_dir, args.output_dir)
    encoded = encode_once(pipeline, clips, choice, args.random_flip, cache_dir)
    common = {
        "seed": args.seed,
        "train_batch_size": args.train_batch_size,
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "num_train_timesteps": noise_scheduler.config.num_train_timesteps,
    }
    batches = TrainingBatches(
        encoded=encoded,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_train_steps=args.max_train_steps,
        conditioning_dropout_prob=args.conditioning_dropout_prob,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        **common,
    )
    validation = None
    if validation_clips:
        held_out = encode_once(pipeline, validation_clips, choice, False, cache_dir)
        shown = choose_balanced(validation_clips, args.seed, args.num_validation_images)
        validation = Validation(
            pairs=[draw_pair(clip, choice, args.seed) for clip in shown],
            batches=TrainingBatches(encoded=held_out, num_train_epochs=1, **common),
            noise_scheduler=noise_scheduler,
            guidance=args.model_guidance_scale,
            options=sampling_options(args),
            folder=args.output_dir / "validation",
        )

    optimizer = optimization.create_optimizer(
        unet, args.learning_rate, args.use_8bit_adam, weight_decay=args.adam_weight_decay
    )
    ema = EMAModel(optimization.trained_weights(unet), foreach=True) if args.use_ema else None
    last_step = batches.max_train_steps
    lr_scheduler = optimization.create_lr_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, last_step)
    if args.use_lora:
        round_weights(unet, accelerator.mixed_precision)
        accelerator.register_save_state_pre_hook(lora.keep_trained)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))
    config = checkpoints.training_config(
        args,
        mixed_precision=accelerator.mixed_precision,
        global_batch_size=batches.global_batch_size,
        # A constant schedule does not know where training ends, so that such a run can be prolonged.
        schedule_length=None if args.lr_scheduler.startswith("constant") else last_step,
        prediction_type=noise_scheduler.config.prediction_type,
        hash_of_model_frames_and_prompts=encoded.key,
        run_id=uuid.uuid4().hex,  # wandb's, which goes on with it
    )
    steps_done = 0
    if checkpoint:
        steps_done = checkpoints.load_checkpoint(accelerator, checkpoint, config["arguments"], FROZEN_FOR_RESUME)
        config["arguments"]["run_id"] = read_training_config(checkpoint).get("run_id")
        if steps_done > last_step:
            raise UserError(f"{checkpoint} is beyond the {last_step} steps asked for; raise EPOCHS or MAX_TRAIN_STEPS")
        accelerator.print(f"resuming from {checkpoint}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet, starting from the base model")
    if ema:
        ema.to(accelerator.device)  # after the checkpoint, which is loaded to the CPU
    if args.report_to != "none":
        start_trackers(accelerator, PROJECT_NAME, config["arguments"], steps_done)
    num_epochs = last_step * batches.global_batch_size / batches.num_samples
    device = processes.describe_device(accelerator.device, unet)
    accelerator.print(
        f"training on {batches.num_samples} {'frame pairs' if choice.is_one_pair else 'videos'} ({choice},"
        f" {args.resolution}x{args.resolution}) for {last_step} steps, batch size {batches.global_batch_size},"
        f" {num_epochs:.3g} epochs, on {accelerator.num_processes} x {device}, mixed precision"
        f" {accelerator.mixed_precision}"
    )

    model = optimization.compile_unet(unet, accelerator) if args.compile else unet
    passes = batches.load(steps_done, pipeline, accelerator)
    step_log = optimization.StepLog(accelerator, batches.global_batch_size)
    limit = args.checkpoints_total_limit
    of_best = read_training_config(args.output_dir / BEST) if checkpoint else {}
    lowest_loss = of_best.get("held_out_loss", math.inf)

    def validate(step: int) -> str:
        nonlocal lowest_loss
        loss, words = validation.run_or_warn(pipeline, ema, accelerator, step)
        if args.save_best and step and loss < lowest_loss:
            lowest_loss = loss
            arguments = config["arguments"] | {"held_out_loss": loss}
            if accelerator.is_main_process:
                checkpoints.save_trained(args, pipeline, ema, args.output_dir / BEST, config | {"arguments": arguments})
                checkpoints.save_model_card(args.output_dir / BEST, arguments, words)
        return words

    if validation and not steps_done:
        validate(0)
    bar = tqdm(total=last_step, initial=steps_done, desc="Training", disable=not accelerator.is_main_process)
    with stop.deferred(), bar:
        for step in range(steps_done + 1, last_step + 1):
            loss, grad_norm = optimization.optimizer_step(
                accelerator, model, optimizer, noise_scheduler, passes, args.max_grad_norm, args.model_guidance_scale
            )
            step_log.add(step, loss, grad_norm, lr_scheduler.get_last_lr()[0])
            lr_scheduler.step()
            if ema:
                ema.step(optimization.trained_weights(unet))
            bar.update()

            is_last = step == last_step
            stopped_by = 0 if is_last else stop.agree()
            # The last step's checkpoint and validation come after the pipeline is saved.
            save_now = not is_last and (step % args.checkpointing_steps == 0 or stopped_by)
            validate_now = validation and not is_last and batches.ends_epochs(step, args.validation_epochs)
            if step % optimization.LOG_EVERY == 0 or save_now or validate_now or is_last:
                bar.set_postfix(loss=f"{step_log.flush():.4f}")
            if save_now or is_last:
                optimization.check_weights(accelerator, unet, step)
            if save_now:
                saved = checkpoints.save_checkpoint(accelerator, args.output_dir, step, config, limit)
            if stopped_by:
                accelerator.end_training()
                how = f"go on from {saved} with {checkpoints.HOW_TO_RESUME}"
                raise processes.Interrupted(stopped_by, f" after step {step}: {how}")
            if validate_now:
                validate(step)
            if save_now or validate_now:
                step_log.restart_clock()
    if steps_done < last_step and not step_log.num_updates:
        raise UserError(f"all steps {optimization.WHY_SKIPPED}")

    with stop.deferred():
        if accelerator.is_main_process:
            checkpoints.save_trained(args, pipeline, ema, args.output_dir, config)
        words = validate(last_step) if validation else ""
        if accelerator.is_main_process:
            checkpoints.save_model_card(args.output_dir, config["arguments"], words)
        if steps_done < last_step:
            try:
                checkpoints.save_checkpoint(accelerator, args.output_dir, last_step, config, limit)
            except UserError as error:  # nothing is lost but that the run could be prolonged
                warn(f"the trained pipeline is saved, but {error}")
    peak = f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if torch.cuda.is_available() else ""
    accelerator.print(f"{step_log.samples_per_second:.1f} samples/s{peak}")
    sampling = f"MODEL_DIR={shlex.quote(str(args.output_dir))} bash sample_from_pix2pix.sh"
    accelerator.print(f"the trained pipeline is in {args.output_dir}; sample from it with:\n  {sampling}")
    if args.push_to_hub and accelerator.is_main_process:
        checkpoints.upload(args.output_dir, repository, args.hub_token)
        print(f"uploaded to {repository}")
    accelerator.end_training()
