"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

Training uses the same functions for its validation pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.layout import (
    DEFAULT_DATA_DIR,
    UserError,
    extraction_command,
    frame_path,
    frames_dir,
    make_folder,
    read_annotations,
    run_command,
    warn,
)
from data.sthv2_dataset_hf import (
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    describe_left_out,
    find_frame_pairs,
)
from pecn.sampling_options import add_sampling_options, number_of_samples, sampling_options

DEFAULT_RESOLUTION = 128  # of frames, where a model does not say what it was trained on


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample_from_pix2pix.py",
        usage="%(prog)s [options]",
        description="Predict frames of validation videos, save pictures and scores.",
    )
    add = parser.add_argument
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--frames_dir", type=Path, help=f"frames_<R>x<R> folder (of the model's resolution in {DEFAULT_DATA_DIR})")
    add("--val_annotations", type=Path, default=DEFAULT_DATA_DIR / "annotations" / "val_filtered.json")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add("--input_frame_idx", type=int, help="frame to start from (what the model was trained on, or 20)")
    add("--target_frame_idx", type=int, help="frame to predict (what the model was trained on, or 21)")
    add("--num_samples", type=number_of_samples, default=3, help="how many entries to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the entries and their noise (%(default)s)")
    add_sampling_options(parser)
    add("--batch_size", type=int, default=8, help="pictures predicted at once (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    add("--cache_dir", help="where models from the hub are kept")
    return parser.parse_args(arguments)


def settle_frame_indices(args: argparse.Namespace, trained: dict[str, Any], model_dir: str) -> None:
    """Fills in what the command line leaves open from the model's training, and warns where the two differ."""
    defaults = {"input_frame_idx": DEFAULT_INPUT_FRAME_IDX, "target_frame_idx": DEFAULT_TARGET_FRAME_IDX}
    for name, default in defaults.items():
        asked, learned = getattr(args, name), trained.get(name, default)
        if asked is None:
            setattr(args, name, learned)
        elif trained and asked != learned:
            warn(f"{name} is {asked}, but {model_dir} was trained with {learned}")


if __name__ == "__main__":
    parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once

from diffusers import StableDiffusionInstructPix2PixPipeline

from pecn.model import load_pipeline, read_training_config
from pecn.pictures import save_results
from pecn.sampling import choose_samples, predict_pairs
from pecn.scores import format_table


def check_args(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")
    sampling_options(args)
    if not args.val_annotations.is_file():
        raise UserError(f"there is no file {args.val_annotations}; make it with: python -m data.dataset")


def place_pipeline(args: argparse.Namespace) -> StableDiffusionInstructPix2PixPipeline:
    """Loads the model for prediction and moves it to the device it will run on."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    hub_options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(args.model_dir, dtype, **hub_options)
    if pipeline.unet.config.in_channels != 8:
        raise UserError(f"{args.model_dir} takes no input frame (4 input channels); train it first, or name another")
    return pipeline.to(device)


def main() -> None:
    args = parse_args()
    check_args(args)
    trained = read_training_config(args.model_dir, revision=args.revision, cache_dir=args.cache_dir)
    settle_frame_indices(args, trained, args.model_dir)
    add_progress = trained.get("add_progress", False)
    if args.frames_dir is None:
        args.frames_dir = frames_dir(DEFAULT_DATA_DIR, trained.get("resolution", DEFAULT_RESOLUTION))
    pairs, left_out = find_frame_pairs(
        read_annotations(args.val_annotations),
        args.frames_dir,
        args.input_frame_idx,
        args.target_frame_idx,
        add_progress,
        target_required=False,
    )
    if left_out:
        print(describe_left_out(left_out))
    if not pairs:
        raise UserError(
            f"no video of {args.val_annotations} has frame {args.input_frame_idx} in {args.frames_dir};"
            f" {where_frames_may_be(args.frames_dir, args.input_frame_idx)}"
        )
    pairs = choose_samples(pairs, args.num_samples, args.seed)
    check_frame_sizes(pairs, trained.get("resolution"), args.model_dir)
    make_folder(args.output_dir)  # a wrong one is refused before the model is loaded
    pipeline = place_pipeline(args)
    results = predict_pairs(pipeline, pairs, args.seed, args.batch_size, sampling_options(args))
    note = f"{args.model_dir}, frame {args.input_frame_idx} to {args.target_frame_idx}"
    summary = save_results(results, args.output_dir, note, show_progress=False)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame {args.target_frame_idx}: predicted, not scored")
    print(
        f"pictures: {args.output_dir}/overview.png, {args.output_dir}/scores.png, {args.output_dir}/samples/;"
        f" scores: {args.output_dir}/metrics.json"
    )


def where_frames_may_be(folder: Path, frame_idx: int) -> str:
    """Advice for a user whose frames folder holds no frame `frame_idx` of any annotated video."""
    inside = sorted(path for path in folder.glob("frames_*x*") if path.is_dir())
    if inside:
        return f"name a folder of frames in it, such as {inside[0]} (FRAMES_DIR, --frames_dir)"
    if any(folder.glob(str(frame_path("", "*", frame_idx)))):
        return "its videos are not those of these annotations: name both from the same data directory"
    if any(folder.glob("*/*.png")):
        return "choose an earlier frame (INPUT_FRAME_IDX, --input_frame_idx)"
    return f"extract the frames with: {extraction_command(folder)}"


def check_frame_sizes(pairs: Sequence[dict[str, Any]], trained_resolution: int | None, model_dir: str) -> None:
    """Raises UserError where frames are damaged, differ in size, or do not fit any model."""
    from PIL import Image

    from pecn.frame_check import check_frames

    frame = pairs[0]["input_image"]
    try:
        with Image.open(frame) as image:
            side = image.width
    except OSError:  # damaged, as check_frames will say
        side = trained_resolution or DEFAULT_RESOLUTION
    check_frames(pairs, side)
    if side % 8:
        raise UserError(f"{frame} is {side} pixels wide; the model needs a multiple of 8")
    if trained_resolution is not None and side != trained_resolution:
        warn(f"the frames are {side} pixels wide, but {model_dir} was trained on {trained_resolution}")


if __name__ == "__main__":
    run_command(main)
