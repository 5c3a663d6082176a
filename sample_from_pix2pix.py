"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

Training predicts its validation pictures with the same functions (pecn/sampling.py).
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import layout
from data.layout import UserError, number
from data.sthv2_dataset_hf import (
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    FramePair,
    choose_pairs,
    describe_left_out,
    find_frame_pairs,
    verify_frames,
)
from pecn.sampling_options import add_sampling_options, number_of_samples, parse_with_sampling_options, sampling_options

DEFAULT_RESOLUTION = 128  # of frames, where a model does not say what it was trained on


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = layout.CommandParser(
        usage="%(prog)s [options]", description="Predict frames of validation videos, save pictures and scores."
    )
    add, index = parser.add_argument, number(at_least=0)
    annotations = layout.filtered_annotations_path(layout.DEFAULT_DATA_DIR, "val")
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add(
        "--frames_dir",
        type=Path,
        help=f"frames_<R>x<R> folder (of the model's resolution in {layout.DEFAULT_DATA_DIR})",
    )
    add("--val_annotations", type=Path, default=annotations, help="(%(default)s)")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add("--input_frame_idx", type=index, help="frame to start from (what the model was trained on, or 20)")
    add("--target_frame_idx", type=index, help="frame to predict (what the model was trained on, or 21)")
    add("--num_samples", type=number_of_samples, default=3, help="how many pairs to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the pairs and their noise (%(default)s)")
    add_sampling_options(parser)
    add("--batch_size", type=number(at_least=1), default=8, help="pictures predicted at once (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    return parse_with_sampling_options(parser, arguments)


if __name__ == "__main__":
    ARGS = parse_args()  # before the libraries are loaded, which takes seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C ends without a traceback

import torch
from accelerate import PartialState
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from pecn.model import find_model, load_pipeline, read_training_config
from pecn.pictures import check_output_dir, save_results
from pecn.sampling import predict_pairs
from pecn.scores import format_table


def main() -> None:
    args = ARGS
    if not args.val_annotations.is_file():
        raise UserError(f"there is no file {args.val_annotations}; make it with: python -m data.dataset")
    model = find_model(args.model_dir, revision=args.revision, variant=args.variant)
    trained = read_training_config(model)
    input_frame_idx = as_trained(args, "input_frame_idx", trained, DEFAULT_INPUT_FRAME_IDX)
    target_frame_idx = as_trained(args, "target_frame_idx", trained, DEFAULT_TARGET_FRAME_IDX)
    resolution = trained.get("resolution", DEFAULT_RESOLUTION)
    frames_folder = args.frames_dir or layout.frames_dir(layout.DEFAULT_DATA_DIR, resolution)
    pairs, left_out = find_frame_pairs(
        layout.read_annotations(args.val_annotations),
        frames_folder,
        input_frame_idx,
        target_frame_idx,
        add_progress=trained.get("add_progress", False),
        target_required=False,
    )
    if left_out:
        print(describe_left_out(left_out))
    if not pairs:
        raise UserError(
            f"no video of {args.val_annotations} has frame {input_frame_idx} in {frames_folder};"
            f" {where_frames_may_be(frames_folder, input_frame_idx)}"
        )
    pairs = choose_pairs(pairs, args.num_samples, args.seed)
    check_frames(pairs, trained, args.model_dir)
    check_output_dir(args.output_dir)
    with layout.only_one(args.output_dir, "sampling"):
        pipeline = load_model(args, model)
        predictions = predict_pairs(pipeline, pairs, args.seed, args.batch_size, sampling_options(args))
        note = f"{args.model_dir}, frame {input_frame_idx} to {target_frame_idx}"
        summary = save_results(predictions, args.output_dir, note)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame {target_frame_idx}: predicted, not scored")
    print(
        f"pictures: {args.output_dir}/overview.png, {args.output_dir}/scores.png, {args.output_dir}/samples/;"
        f" scores: {args.output_dir}/metrics.json"
    )


def as_trained(args: argparse.Namespace, name: str, trained: dict[str, Any], default: int) -> int:
    """The frame index that the command line gives, or the one that the model was trained on."""
    asked, learned = getattr(args, name), trained.get(name, default)
    if asked is None:
        return learned
    if trained and asked != learned:
        layout.warn(f"{name} is {asked}, but {args.model_dir} was trained with {learned}")
    return asked


def where_frames_may_be(folder: Path, frame_idx: int) -> str:
    """Advice for a user whose frames folder holds no frame `frame_idx` of any annotated video."""
    inside = sorted(path for path in folder.glob("frames_*x*") if path.is_dir())
    if inside:
        return f"name a folder of frames in it, such as {inside[0]} (FRAMES_DIR, --frames_dir)"
    if any(folder.glob(str(layout.frame_path("", "*", frame_idx)))):
        return "its videos are not those of these annotations: name both from the same data directory"
    if any(folder.glob("*/*.png")):
        return "choose an earlier frame (INPUT_FRAME_IDX, --input_frame_idx)"
    return f"extract the frames with: {layout.extraction_command(folder)}"


def check_frames(pairs: Sequence[FramePair], trained: dict[str, Any], model_dir: str) -> None:
    """Raises UserError where frames are damaged, differ in size, or do not fit any model."""
    resolution = trained.get("resolution", DEFAULT_RESOLUTION)
    try:
        with Image.open(pairs[0].input_image) as image:
            side = image.width
    except OSError:  # damaged, as verify_frames will say
        side = resolution
    verify_frames(pairs, side)
    if side % 8:
        raise UserError(f"{pairs[0].input_image} is {side} pixels wide; the model needs a multiple of 8")
    if trained and side != resolution:
        layout.warn(f"the frames are {side} pixels wide, but {model_dir} was trained on {resolution}")


def load_model(args: argparse.Namespace, model: Path) -> StableDiffusionInstructPix2PixPipeline:
    """Loads the model for prediction and moves it to the device it will run on."""
    device = PartialState().device
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipeline = load_pipeline(model, dtype, args.variant)
    if pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels:
        raise UserError(f"{args.model_dir} takes no input frame; train it first, or name another")
    return pipeline.to(device)


if __name__ == "__main__":
    layout.run_command(main)
