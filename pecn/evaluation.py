"""What sample_from_pix2pix.py does: predictions of validation videos, rollouts or one picture, and their scores."""

import argparse
import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from data import clips
from data.cli import UserError, one_line, warn
from data.files import make_folder, only_one, parts_replaced, write_json
from data.prompts import build_prompt
from data.video_decoder import load_picture, read_picture
from pecn import model, pictures, rollouts, scores
from pecn.checkpoints import load_from_checkpoint
from pecn.processes import is_fast_in_bf16
from pecn.sampling import Prediction, predict_frames, predict_pairs
from pecn.sampling_options import DEFAULT_OPTIONS, sampling_options

RESULTS = Path("test_result")  # where OUTPUT_DIR lies by default
SAMPLES, METRICS_FILE, ROLLOUT_FILE = "samples", "metrics.json", "rollout.json"
RANDOM_PAIRS, SHOWN_IN_OVERVIEW = 20, 9  # in random_pairs.png; from the best pair to the worst in overview.png
FEWEST_PAIRS = 10  # the table has no line for a task with fewer
OF_PAIRS = "resolution input_frame_idx horizon tell_horizon add_progress prompt_prefix".split()
RECORDED = [*OF_PAIRS, *vars(DEFAULT_OPTIONS)]


def recorded_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the model's training recorded (nothing for one of the hub's) of the options that `args` may leave out."""
    folder = model.find_model(args.model_dir)
    if not any((folder / name).is_file() for name in (model.PIPELINE_INDEX, model.CHECKPOINT_WEIGHTS)):
        model.load_pipeline(folder)  # which says what is wrong
    trained = model.read_training_config(folder)
    settings = {name: trained[name] for name in RECORDED if name in trained}
    if "train_data_dir" in trained:
        settings["data_dir"] = Path(trained["train_data_dir"])
    if args.target_frame_idx is not None and settings.get("input_frame_idx") == clips.ANY:
        del settings["input_frame_idx"]  # a target needs a start: the default one
    if args.image and args.horizon and not trained:
        settings["tell_horizon"] = True
    return settings


def default_output_dir(image: Path | None) -> Path:
    """One folder for results of validation videos, which are replaced; a new one for each own picture."""
    if image is None:
        return RESULTS / "baseline"
    numbered = (RESULTS / f"{image.stem}-{number}" for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def run(args: argparse.Namespace) -> None:
    """Predicts as the options of sample_from_pix2pix.py say, those left out being as `recorded_settings` says."""
    trained = model.read_training_config(model.find_model(args.model_dir))
    clips.settle_frames(vars(args))
    args.output_dir = args.output_dir or default_output_dir(args.image)
    prompt = clips.example_prompt(vars(args))
    if trained.get("example_prompt", prompt) != prompt:
        warn(f"prompts are like {prompt!r}, but {args.model_dir} was trained with {trained['example_prompt']!r}")
    if args.image:
        predict_from_picture(args, trained)
        return
    asked = choice = clips.frame_choice(vars(args))  # a rollout predicts more frames than are asked for
    if args.rollout:
        args.rollout_mode = args.rollout_mode or ("direct" if choice.tell_horizon else "chained")
        choice = rollouts.rollout_choice(asked, args.rollout, args.rollout_mode)
    where = (args.data_dir, "val", args.resolution)
    found, left_out = clips.find_clips(*where, choice, args.add_progress, target_required=False)
    if left_out:
        print(clips.describe_left_out(left_out))
    if not found:
        raise UserError(f"no validation video of {args.data_dir} has what is asked for ({choice})")
    learned = clips.frame_choice(trained) if trained else asked
    if learned.start not in (None, asked.start) or not {*asked.horizons} <= {*learned.horizons}:
        warn(f"predicting {asked}, but {args.model_dir} was trained with {learned}")
    chosen = clips.choose_balanced(found, args.seed, args.num_samples)
    if args.rollout:
        roll_out_clips(args, chosen, choice)
    else:
        predict_and_score(args, [clips.draw_pair(clip, choice, args.seed) for clip in chosen], choice)


def load_for_prediction(model_dir: str) -> tuple[model.Pipeline, torch.autocast]:
    """Loads a model, or a checkpoint of a run, and the context in which it computes in the precision of its training.

    A model that does not say counts as fp16 on a GPU, as bf16 on a CPU. A CPU computes in bf16 only for a model of
    bf16 and where that is fast, else in float32.
    """
    device, folder = PartialState().device, model.find_model(model_dir)
    is_checkpoint = (folder / model.CHECKPOINT_WEIGHTS).is_file()
    pipeline = load_from_checkpoint(folder) if is_checkpoint else model.load_pipeline(folder)
    if pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels:
        raise UserError(f"{model_dir} takes no input frame; train it first, or name another")
    precision = model.read_training_config(folder).get("mixed_precision", "fp16" if device.type == "cuda" else "bf16")
    if device.type == "cpu" and not (precision == "bf16" and is_fast_in_bf16("cpu")):
        precision = "no"
    pipeline.unet.requires_grad_(False).eval()
    model.round_weights(pipeline.unet, precision)
    return pipeline.to(device), torch.autocast(device.type, model.DTYPES[precision], enabled=precision != "no")


@contextlib.contextmanager
def loaded_model(model_dir: str) -> Iterator[model.Pipeline]:
    """Loads a model as `load_for_prediction` does, and is its context."""
    pipeline, precision = load_for_prediction(model_dir)
    with precision:
        yield pipeline


@contextlib.contextmanager
def results_folder(output_dir: Path, results_file: str) -> Iterator[Path]:
    """Yields a new folder whose content replaces the results of an earlier run in `output_dir` when all went well.

    Raises UserError where that has a folder of the user's in its place.
    """
    make_folder(output_dir)
    if (output_dir / SAMPLES).exists() and not (output_dir / results_file).is_file():
        why = f"is not from an earlier run like this (no {results_file} beside it) and would be replaced"
        raise UserError(f"{output_dir}/{SAMPLES} {why}: move it, or choose another OUTPUT_DIR")
    with only_one(output_dir, "sampling"), parts_replaced(output_dir, last=results_file) as new:
        yield new


# Frame pairs.


def predict_and_score(args: argparse.Namespace, pairs: Sequence[clips.FramePair], choice: clips.FrameChoice) -> None:
    """Predicts the target of each pair, saves the pictures and their scores, and says whether the model is good."""
    others = read_metrics(args.against)["samples"] if args.against else None
    options = sampling_options(args)
    settings = {"model_dir": args.model_dir, "frames": str(choice), "seed": args.seed, **vars(options)}
    with contextlib.suppress(UserError):  # no earlier results
        if read_metrics(args.output_dir).get("settings") != settings:
            print(f"{args.output_dir} has results of another model or other settings, which will be replaced")
    how = f"{choice}, background kept" if options.keep_background else str(choice)
    with results_folder(args.output_dir, METRICS_FILE) as new, loaded_model(args.model_dir) as pipeline:
        model.warn_of_cuts(pipeline, [pair.edit_prompt for pair in pairs])
        label = f"Predicting with {args.model_dir}"
        predictions = predict_pairs(pipeline, pairs, args.seed, args.batch_size, options, label)
        rows = save_predictions(new, predictions, f"{args.model_dir}, {how}")
        summary = scores.summarize(rows)
        write_json(new / METRICS_FILE, {"settings": settings, "summary": summary, "samples": rows})
    large = {name: group for name, group in summary.items() if name == "all" or group["num_pairs"] >= FEWEST_PAIRS}
    print(scores.format_table(large))
    print("where something moves, but for 'whole'; ±: 95% interval; good frames: sharp and better placed than the copy")
    if num_lost := len(pairs) - len(rows):
        print(f"not finite and left out: {num_lost} of {len(pairs)} predictions")
    if num_without := summary["all"]["num_without_target"]:
        print(f"predicted and not scored, as their video ends before: {num_without} of {len(rows)} ({choice})")
    print(f"{args.output_dir} has overview.png, random_pairs.png, scores.png, samples/ and {METRICS_FILE}")
    print(f"{how}, {scores.verdict(summary['all'])}")
    if others is not None:
        compared, unpaired = scores.paired_difference(rows, others)
        if unpaired:
            print(clips.describe_left_out(unpaired))
        words = scores.better_or_not(compared["psnr"], compared["num_moving"], str(args.against))
        ours, theirs = compared["good_frames"]
        print(f"where something moves it is {words}; good frames {ours:.0%}, there {theirs:.0%}")


def save_predictions(new: Path, predictions: Iterable[Prediction], note: str) -> list[dict[str, Any]]:
    """Writes samples/<video id>/*.png, overview.png, random_pairs.png and scores.png; returns the scores of each pair.

    The predictions may be a generator: few are kept beyond their scores. Whoever chose the pairs drew them at random,
    so the first ones are shown as random pairs.
    """
    rows, strips = [], []
    for prediction in predictions:
        rows.append(scores.score_prediction(prediction))
        comparison = pictures.comparison_picture(prediction, rows[-1], note)
        save_prediction(new / SAMPLES / prediction.video_id, prediction, comparison)
        if len(strips) < RANDOM_PAIRS:
            strips.append(pictures.panel_row(pictures.frame_panels(prediction), [pictures.short_prompt(prediction)]))
    moving = [row for row in rows if row["moving_share"]]
    ranked = sorted(moving, key=lambda row: row["sample"]["psnr"] - row["copy"]["psnr"], reverse=True) or rows
    shown = np.linspace(0, len(ranked) - 1, min(len(ranked), SHOWN_IN_OVERVIEW)).round().astype(int)
    folders = [new / SAMPLES / ranked[place]["video_id"] for place in shown]
    comparisons = [load_picture(folder / "comparison.png") for folder in folders]
    pictures.save_picture(new / "overview.png", pictures.sheet(comparisons))
    pictures.save_picture(new / "random_pairs.png", pictures.sheet(strips, columns=2))
    pictures.save_scores_plot(new / "scores.png", rows, note)
    return rows


def save_prediction(folder: Path, prediction: Prediction, comparison: np.ndarray) -> None:
    """Writes comparison.png, the frames as they are, and uncertainty.png (16 bits: 256 times the deviation)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures.save_picture(folder / "comparison.png", comparison)
    for title, frame in pictures.frame_panels(prediction):
        pictures.save_picture(folder / f"{'prediction' if title == 'sample' else title}.png", frame)
    if prediction.predicted.uncertainty is not None:
        levels = np.clip(prediction.predicted.uncertainty * 256.0, 0, 65535)
        pictures.save_picture(folder / "uncertainty.png", levels.round().astype(np.uint16))


def read_metrics(output_dir: Path) -> dict[str, Any]:
    """The settings, summary and scores of each pair that a run left. Raises UserError where there are none."""
    try:
        metrics = json.loads((output_dir / METRICS_FILE).read_bytes())
        return metrics | {"samples": metrics["samples"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{output_dir} has no scores of an earlier run ({METRICS_FILE}): {one_line(error)}") from error


# Rollouts and one picture.


def roll_out_clips(args: argparse.Namespace, chosen: Sequence[clips.Clip], choice: clips.FrameChoice) -> None:
    """Predicts how each clip goes on, and saves films, filmstrips and the scores at each horizon."""
    if isinstance(args.add_progress, str) and args.rollout_mode == "chained":
        raise UserError("chained, there are no frames to estimate progress from: set PROGRESS to False or True")
    rows = []
    with results_folder(args.output_dir, ROLLOUT_FILE) as new, loaded_model(args.model_dir) as pipeline:
        how = (args.rollout_mode, args.seed, args.batch_size, sampling_options(args))
        for rollout in rollouts.roll_out(pipeline, chosen, choice, *how):
            rollouts.save_rollout(new / SAMPLES / rollout.clip.video_id, rollout)
            rows += rollout.rows()
        model.warn_of_cuts(pipeline, [row["edit_prompt"] for row in rows])
        summary = scores.summarize(rows, by="horizon")
        write_json(new / ROLLOUT_FILE, {"summary": summary, "samples": rows})
    print(scores.format_table(summary))
    print(f"{args.output_dir} has films and filmstrips (samples/) and {ROLLOUT_FILE}")
    if num_beyond := summary["all"]["num_without_target"]:
        print(f"{num_beyond} of the predicted frames lie beyond the end of their video: not scored")


def predict_from_picture(args: argparse.Namespace, trained: dict[str, Any]) -> None:
    """Predicts what follows one picture, and saves the pictures; there is no truth, so nothing is scored."""
    if args.image.resolve().parent == args.output_dir.resolve():
        raise UserError(f"{args.image} is in OUTPUT_DIR, where pictures are replaced; choose another OUTPUT_DIR")
    picture, choice = read_picture(args.image, args.resolution, args.crop), clips.frame_choice(vars(args))
    progress = args.add_progress if type(args.add_progress) is int else None
    if trained and trained["add_progress"] and progress is None:
        warn(f"{args.model_dir} was trained with progress prompts (PROGRESS=40: 40% is done)")
    if choice.tell_horizon and len(choice.horizons) > 1:
        raise UserError(f"{args.model_dir} predicts {args.horizon} frames ahead: choose one number with HORIZON")
    horizon = choice.horizons[0] if choice.tell_horizon else None
    edit_prompt = build_prompt(args.prompt, progress, horizon, args.prompt_prefix)
    make_folder(args.output_dir)
    with only_one(args.output_dir, "sampling"), loaded_model(args.model_dir) as pipeline:
        model.warn_of_cuts(pipeline, [edit_prompt])
        [predicted] = predict_frames(pipeline, [picture], [edit_prompt], [args.seed], sampling_options(args))
        if predicted is None:
            raise UserError("the prediction is not finite: the model is damaged, or does not fit its precision")
        prediction = Prediction(args.image.stem, "unknown", edit_prompt, picture, predicted)
        comparison = pictures.comparison_picture(prediction, scores.score_prediction(prediction), args.model_dir)
        for name in ("expected.png", "uncertainty.png"):  # of an earlier picture
            (args.output_dir / name).unlink(missing_ok=True)
        save_prediction(args.output_dir, prediction, comparison)
    print(f"prompt: {edit_prompt}")
    if (predicted.sample == picture).all():
        warn("the prediction is the input: the model changes too little to show with KEEP_BACKGROUND=True")
    print(f"{args.output_dir} has prediction.png, input.png, and both side by side (comparison.png)")
