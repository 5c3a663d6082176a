"""Fine-tunes InstructPix2Pix to predict a future frame of a video.

    accelerate launch train_instruct_pix2pix.py --train_data_dir data/sthv2 --mixed_precision auto

This file has the options; pecn/training.py does the work. The frozen VAE and text encoder see every frame and every
prompt once, before the first step; a step runs the UNet alone. What a step sees is a pure function of the seed and the
step's number: a resumed run equals an uninterrupted one, and several processes equal one.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from data.cli import SWITCH, CommandParser, number, run_command
from data.clips import add_frame_options, settle_frames
from data.paths import DEFAULT_DATA_DIR
from data.prompts import PROGRESS_HELP, PROGRESS_OPTION
from pecn.sampling_options import add_sampling_options


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; flags that diffusers' training examples have mean the same here."""
    parser = CommandParser(usage="%(prog)s [options]", description=__doc__.splitlines()[0])
    count, index = number(at_least=1), number(at_least=0)
    not_negative, positive = number(float, at_least=0), number(float, above=0)
    add = parser.add_argument_group("model").add_argument
    base_model = "timbrooks/instruct-pix2pix"
    add("--pretrained_model_name_or_path", default=base_model, help="hub id or directory (%(default)s)")
    kinds = ["epsilon", "v_prediction"]
    add("--prediction_type", choices=kinds, help="v_prediction turns a model of the noise into one of the velocity")
    add("--rescale_betas_zero_snr", action="store_true", help="noise without any signal at the last timestep")
    add("--use_lora", **SWITCH, help="train an adapter of the attention layers in place of all weights")
    add("--lora_rank", type=count, default=64, help="of the adapter (%(default)s)")

    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--train_data_dir", type=Path, default=DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
    side = number(at_least=8, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames, uses frames_<R>x<R> (%(default)s)")
    add_frame_options(data)
    add("--add_progress", **PROGRESS_OPTION, default=False, help=PROGRESS_HELP)
    add("--max_train_samples", type=count, help="train on this many videos, spread over the tasks")
    add("--random_flip", action="store_true", help="mirror half of the pairs, swapping left and right in the prompt")

    add = parser.add_argument_group("steps").add_argument
    add("--train_batch_size", type=count, default=16, help="batch size per GPU (%(default)s)")
    add("--gradient_accumulation_steps", type=count, default=1, help="passes per optimizer step (%(default)s)")
    add("--num_train_epochs", type=count, default=20, help="(%(default)s)")
    add("--max_train_steps", type=count, help="optimizer steps, overrides --num_train_epochs")
    add("--seed", type=int, default=42, help="order, noise, timesteps and dropout follow from it (%(default)s)")
    third = number(float, at_least=0, at_most=1 / 3)
    scale_help = "learn to draw in one pass what guidance of this scale draws in two (Tang et al., 2025); 1: do not"
    add("--model_guidance_scale", type=number(float, at_least=1), default=1.0, help=f"{scale_help} (%(default)s)")
    add("--conditioning_dropout_prob", type=third, default=0.05, help="for text, image, and both (%(default)s)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning_rate", type=not_negative, help="(5e-6, with --use_lora 1e-4)")
    schedules = ["constant", "constant_with_warmup", "linear", "cosine"]
    add("--lr_scheduler", choices=schedules, default="constant", help="(%(default)s)")
    add("--lr_warmup_steps", type=index, default=0, help="optimizer steps of linear warm-up (%(default)s)")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with 8-bit state")
    add("--adam_weight_decay", type=not_negative, default=1e-2, help="(%(default)s)")
    add("--max_grad_norm", type=positive, default=1.0, help="(%(default)s)")
    add("--use_ema", action="store_true", help="keep a moving average of the weights and save that")

    add = parser.add_argument_group("speed and memory").add_argument
    precisions = ["auto", "no", "fp16", "bf16"]
    precision_help = "auto: bf16 where GPU or CPU are fast in it, else fp16, on a CPU no (accelerate's configuration)"
    add("--mixed_precision", choices=precisions, help=precision_help)
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--compile", action="store_true", help="torch.compile the UNet: slow first step, faster ones after")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, default=Path("outputs/instruct_pix2pix_128"), help="(%(default)s)")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="(%(default)s)")
    add("--checkpointing_steps", type=count, default=1000, help="steps between checkpoints (%(default)s)")
    limit_help = "keep only this many checkpoints, the newest (%(default)s)"
    add("--checkpoints_total_limit", type=count, default=2, help=limit_help)
    add("--resume_from_checkpoint", help="a checkpoint's directory, or 'latest'")
    add("--validation_epochs", type=count, default=5, help="epochs between validations (%(default)s)")
    add("--num_validation_images", type=index, default=4, help="validation pairs to predict, 0: none (%(default)s)")
    add("--save_best", action="store_true", help="keep the pipeline of the lowest held-out loss too, as best/")
    add("--push_to_hub", action="store_true", help="upload the trained pipeline")
    add("--hub_model_id", help="repository to upload to (the output directory's name)")
    add("--hub_private", **SWITCH | {"default": True}, help="make the repository private (%(default)s)")
    add("--hub_token", help="token for the upload (what `hf auth login` stored); never logged")
    add_sampling_options(parser)

    args = parser.parse_args(arguments)
    settle_frames(vars(args))
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.use_lora else 5e-6
    for package, is_needed in (("bitsandbytes", args.use_8bit_adam), ("wandb", args.report_to == "wandb")):
        if is_needed and not find_spec(package):
            parser.error(f"the package {package} is missing: pip install {package}, or leave its option out")
    return args


def main() -> None:
    args = parse_args()
    from pecn.training import run  # not before the options are known to be good: it takes seconds

    run(args)


if __name__ == "__main__":
    run_command(main)
