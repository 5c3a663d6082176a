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
from data.layout import SWITCH, UserError, number
from data.sthv2_dataset_hf import (
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    FramePair,
    choose_pairs,
    describe_left_out,
    find_frame_pairs,
    verify_frames,
)
from pecn.sampling_options import add_sampling_options, number_of_samples, sampling_options


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = layout.CommandParser(
        usage="%(prog)s [options]", description="Predict frames of validation videos, save pictures and scores."
    )
    add, index = parser.add_argument, number(at_least=0)
    frames_dir = layout.frames_dir(layout.DEFAULT_DATA_DIR, 128)
    annotations = layout.filtered_annotations_path(layout.DEFAULT_DATA_DIR, "val")
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--frames_dir", type=Path, default=frames_dir, help="of the model's resolution (%(default)s)")
    add("--val_annotations", type=Path, default=annotations, help="(%(default)s)")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add("--input_frame_idx", type=index, default=DEFAULT_INPUT_FRAME_IDX, help="frame that is given (%(default)s)")
    add("--target_frame_idx", type=index, default=DEFAULT_TARGET_FRAME_IDX, help="frame to predict (%(default)s)")
    add("--num_samples", type=number_of_samples, default=3, help="how many pairs to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the pairs and their noise (%(default)s)")
    add_sampling_options(parser)
    add("--batch_size", type=number(at_least=1), default=8, help="pictures predicted at once (%(default)s)")
    add("--lpips", **SWITCH, help="score LPIPS too; needs the package lpips (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    return parser.parse_args(arguments)


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
from pecn.scores import format_table, load_lpips, verdict


def main() -> None:
    args = ARGS
    if not args.val_annotations.is_file():
        raise UserError(f"there is no file {args.val_annotations}; make it with: python -m data.dataset")
    model = find_model(args.model_dir, revision=args.revision, variant=args.variant)
    trained = read_training_config(model)
    pairs, left_out = find_frame_pairs(
        layout.read_annotations(args.val_annotations),
        args.frames_dir,
        args.input_frame_idx,
        args.target_frame_idx,
        add_progress=trained.get("add_progress", False),
        target_required=False,
    )
    if left_out:
        print(describe_left_out(left_out))
    if not pairs:
        raise UserError(
            f"no video of {args.val_annotations} has frame {args.input_frame_idx} in {args.frames_dir}: name both from"
            f" one data directory, and extract its frames with: {layout.extraction_command(args.frames_dir)}"
        )
    pairs = choose_pairs(pairs, args.num_samples, args.seed)
    check_frames(pairs, args, trained)
    lpips_map = load_lpips() if args.lpips else None
    check_output_dir(args.output_dir)
    with layout.only_one(args.output_dir, "sampling"):
        pipeline = load_model(args, model)
        predictions = predict_pairs(pipeline, pairs, args.seed, args.batch_size, sampling_options(args))
        note = f"{args.model_dir}, frame {args.input_frame_idx} to {args.target_frame_idx}"
        summary = save_results(predictions, args.output_dir, note, lpips_map)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame {args.target_frame_idx}: predicted, not scored")
    pictures = "overview.png, random_pairs.png, scores.png, samples/"
    print(f"{args.output_dir} holds the pictures ({pictures}) and the scores (metrics.json)")
    print(f"frame {args.input_frame_idx} to {args.target_frame_idx}, {verdict(summary)}")


def check_frames(pairs: Sequence[FramePair], args: argparse.Namespace, trained: dict[str, Any]) -> None:
    """Warns where frames are not as the model was trained on them; raises UserError where they fit no model."""
    try:
        with Image.open(pairs[0].input_image) as image:
            side = image.width
    except OSError:
        side = 0  # damaged, as verify_frames says
    verify_frames(pairs, side)
    if side % 8:
        raise UserError(f"{pairs[0].input_image} is {side} pixels wide; the model needs a multiple of 8")
    asked = {"input_frame_idx": args.input_frame_idx, "target_frame_idx": args.target_frame_idx, "resolution": side}
    for name, value in asked.items():
        if trained.get(name, value) != value:
            layout.warn(f"{name} is {value}, but {args.model_dir} was trained with {trained[name]}")


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
