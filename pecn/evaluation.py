"""Predictions of validation videos, rollouts or one picture, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from diffusers import StableDiffusionInstructPix2PixPipeline

from data import cli, files, paths
from data.cli import UserError
from data.clips import (
    ANY,
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    NO_PROGRESS,
    Clip,
    FrameChoice,
    FramePair,
    choice_of,
    choose_samples,
    describe_left_out,
    draw_pairs,
    find_clips,
    frame_choice,
    horizons_of,
)
from data.prompts import build_prompt
from data.video_decoder import read_picture
from pecn.model import DTYPES, check_frames, find_model, load_pipeline, read_training_config
from pecn.pictures import check_output_dir, comparison_picture, read_scores, save_prediction, save_results
from pecn.progress_model import with_estimates
from pecn.rollout_pictures import ROLLOUT_FILE, save_rollouts
from pecn.rollouts import describe_rollouts, roll_out, rollout_choice
from pecn.sampling import Prediction, predict_frames, predict_pairs
from pecn.sampling_options import DEFAULT_OPTIONS, sampling_options
from pecn.scores import format_table, load_lpips, paired_difference, score_prediction, verdict

DEFAULTS = {  # for a model that does not say how it was trained and validated, such as those on the hub
    "train_data_dir": paths.DEFAULT_DATA_DIR,
    "resolution": 128,
    "input_frame_idx": DEFAULT_INPUT_FRAME_IDX,
    "target_frame_idx": DEFAULT_TARGET_FRAME_IDX,
    "horizon": None,
    "progress_source": NO_PROGRESS,
    "progress_estimator": None,
    **vars(DEFAULT_OPTIONS),
}


def run(args: argparse.Namespace) -> None:
    """Predicts as the options of sample_from_pix2pix.py say."""
    model = find_model(args.model_dir, revision=args.revision, variant=args.variant)
    trained = read_training_config(model)
    args = as_trained(args, read_training_config(find_model(args.settings_of)) if args.settings_of else trained)
    if args.image is None:
        predict_validation_videos(args, model, trained)
    else:
        predict_from_picture(args, model, trained)


def as_trained(args: argparse.Namespace, trained: dict[str, Any]) -> argparse.Namespace:
    """The options, with what the command leaves out as a model's training config `trained` or DEFAULTS have it.

    `tell_horizon` is added: whether prompts tell the horizon, as the model's do, or as asked for one picture. Where
    they do, rollouts are direct.
    """
    known = DEFAULTS | {name: trained[name] for name in DEFAULTS if name in trained}
    known["frames_dir"] = paths.frames_dir(known["train_data_dir"], known["resolution"])
    known["val_annotations"] = paths.filtered_annotations_path(known["train_data_dir"], "val")
    learned = choice_of(known)
    known["tell_horizon"] = learned.tell_horizon or (args.image is not None and args.horizon is not None)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "target_frame_idx" in given and "horizon" not in given:  # a target in place of the horizons
        known["horizon"] = None
        if learned.start is None and "input_frame_idx" not in given:
            known["input_frame_idx"] = DEFAULT_INPUT_FRAME_IDX
    elif learned.start is None or args.input_frame_idx == ANY or args.rollout:  # there another start keeps the horizon
        known["horizon"] = known["horizon"] or str(learned.horizons[0])
    known["rollout_mode"] = "direct" if known["tell_horizon"] else "chained"
    return argparse.Namespace(**vars(args) | known | given)


def predict_validation_videos(args: argparse.Namespace, model: Path, trained: dict[str, Any]) -> None:
    """Chooses videos, and predicts a frame of each or its rollout."""
    if not args.val_annotations.is_file():
        raise UserError(
            f"there is no file {args.val_annotations}: set VAL_ANNOTATIONS and FRAMES_DIR, or make it with: python -m"
            " data.dataset"
        )
    told = {"tell_horizon": args.tell_horizon, "progress_source": args.progress_source}
    choice = asked = frame_choice(args.input_frame_idx, args.target_frame_idx, args.horizon, **told)
    if args.rollout:
        choice = rollout_choice(asked, args.rollout, args.rollout_mode)
    entries = paths.read_annotations(args.val_annotations)
    clips, left_out = find_clips(entries, args.frames_dir, choice, target_required=False)
    if left_out:
        print(describe_left_out(left_out))
    if not clips:
        raise UserError(
            f"no video of {args.val_annotations} has what is asked for ({choice}) in {args.frames_dir}: name both from"
            f" one data directory, and extract its frames with: {paths.extraction_command(args.frames_dir)}"
        )
    clips = choose_samples(clips, args.num_samples, args.seed)
    check_frames(clips, asked if args.rollout_mode == "chained" else choice, args.model_dir, trained)
    if choice.is_estimated:
        exact = load_pipeline(model, variant=args.variant)  # in float32, as the estimator was trained
        clips = with_estimates(clips, choice, args.seed, args.progress_estimator, exact, PartialState().device)
        del exact
    samples = clips if args.rollout else draw_pairs(clips, choice, args.seed)
    if all(len(sample.paths) == 1 for sample in samples):
        raise UserError(
            f"none of the {len(samples)} videos chosen has both frames ({choice}) in {args.frames_dir}: choose an"
            f" earlier {'INPUT' if args.rollout else 'TARGET'}_FRAME_IDX"
        )
    (roll_out_clips if args.rollout else predict_and_score)(args, model, samples, choice)


def predict_and_score(args: argparse.Namespace, model: Path, pairs: Sequence[FramePair], choice: FrameChoice) -> None:
    """Predicts the target of each pair, and saves the pictures and their scores."""
    lpips_map = load_lpips() if args.lpips else None
    others = read_scores(args.against) if args.against else None
    check_output_dir(args.output_dir)
    with files.only_one(args.output_dir, "sampling"):
        pipeline = load_model(args, model)
        predictions = predict_pairs(pipeline, pairs, args.seed, args.batch_size, sampling_options(args))
        summary = save_results(predictions, args.output_dir, f"{args.model_dir}, {choice.in_full}", lpips_map)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame to predict ({choice}): predicted, not scored")
    pictures = "overview.png, random_pairs.png, scores.png, samples/"
    print(f"{args.output_dir} holds the pictures ({pictures}) and the scores (metrics.json)")
    print(f"{choice.in_full}, {verdict(summary)}")
    if others is not None:
        difference = paired_difference(read_scores(args.output_dir), others)
        if difference["unpaired"]:
            print(describe_left_out(difference["unpaired"]))
        print(f"the same, {verdict(difference, str(args.against))}")


def roll_out_clips(args: argparse.Namespace, model: Path, clips: Sequence[Clip], choice: FrameChoice) -> None:
    """Predicts how each clip goes on, and saves films, filmstrips and the scores at each horizon."""
    check_output_dir(args.output_dir, ROLLOUT_FILE)
    with files.only_one(args.output_dir, "sampling"):
        how = (args.rollout_mode, args.seed, args.batch_size, sampling_options(args))
        rollouts = roll_out(load_model(args, model), clips, choice, *how)
        summary = save_rollouts(rollouts, args.output_dir, f"{args.model_dir}, {choice.in_full}, {args.rollout_mode}")
    print(f"{args.output_dir} holds films and filmstrips (samples/), quality_by_horizon.png and scores (rollout.json)")
    print(describe_rollouts(summary))


def predict_from_picture(args: argparse.Namespace, model: Path, trained: dict[str, Any]) -> None:
    """Predicts what follows one picture, and saves the pictures."""
    if args.image.resolve().parent == args.output_dir.resolve():
        raise UserError(f"{args.image} is in OUTPUT_DIR, where pictures are replaced; choose another OUTPUT_DIR")
    picture = read_picture(args.image, args.resolution)
    has_progress = args.progress is not None
    if trained.get("add_progress", has_progress) != has_progress:
        cli.warn(f"{args.model_dir} was trained with{'out' if has_progress else ''} progress prompts (--progress)")
    if args.tell_horizon and len(horizons_of(args.horizon)) > 1:
        raise UserError(f"{args.model_dir} predicts {args.horizon} frames ahead: choose one number with --horizon")
    horizon = horizons_of(args.horizon)[0] if args.tell_horizon else None
    edit_prompt = build_prompt(args.prompt, args.progress, horizon)
    files.make_folder(args.output_dir)
    with files.only_one(args.output_dir, "sampling"):
        pipeline = load_model(args, model)
        [predicted] = predict_frames(pipeline, [picture], [edit_prompt], [args.seed], sampling_options(args))
        names = {"video_id": args.image.stem, "task": "unknown", "edit_prompt": edit_prompt}
        prediction = Prediction(**names, input=picture, **vars(predicted), target=None, vae_ceiling=None)
        comparison = comparison_picture(prediction, score_prediction(prediction), args.model_dir)
        for name in ("expected.png", "uncertainty.png"):  # of an earlier picture
            (args.output_dir / name).unlink(missing_ok=True)
        save_prediction(args.output_dir, prediction, comparison)
    print(f"prompt: {edit_prompt}")
    if (predicted.sample == picture).all():
        cli.warn("the prediction is the input, the model changes too little to show (but for --residual False)")
    print(f"{args.output_dir} holds the prediction (prediction.png), input.png, and both side by side (comparison.png)")


def load_model(args: argparse.Namespace, model: Path) -> StableDiffusionInstructPix2PixPipeline:
    """Loads the model for prediction and moves it to the device it will run on."""
    device = PartialState().device
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    pipeline = load_pipeline(model, DTYPES[precision], args.variant)
    if pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels:
        raise UserError(f"{args.model_dir} takes no input frame; train it first, or name another")
    return pipeline.to(device)
