"""How a frame is predicted: the options of sampling and validation, and their flags.

Apart from pecn/sampling.py, since a command reads its options before it loads torch.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, fields

from data.layout import SWITCH, filtered_annotations_path, frames_dir, number

SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class SamplingOptions:
    """What a prediction depends on beside the model, the frame, the prompt and the seed.

    `residual=False, num_predictions=1` draws the picture of diffusers' own pipeline, except that the latter drops the
    image guidance too where `guidance_scale` is 1.
    """

    num_inference_steps: int = 20  # denoising steps
    guidance_scale: float = 1.0  # of the text; 1 is none
    image_guidance_scale: float = 1.5  # of the input frame; 1 is none
    scheduler: str = "euler_ancestral"  # one of SCHEDULERS
    strength: float = 1.0  # share of the steps that are made; anything below 1 starts from the noised input frame
    num_predictions: int = 1  # of each frame; of several one is shown, and their mean and spread beside it
    residual: bool = True  # keep the input frame where the model changes nothing, instead of decoding it anew


DEFAULT_OPTIONS = SamplingOptions()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    add = parser.add_argument_group("how frames are predicted").add_argument
    count, scale, share = number(at_least=1), number(float, at_least=1), number(float, above=0, at_most=1)
    add("--num_inference_steps", type=count, help="denoising steps (%(default)s)")
    add("--guidance_scale", type=scale, help="of the text; 1 is none (%(default)s)")
    add("--image_guidance_scale", type=scale, help="of the input frame; 1 is none (%(default)s)")
    add("--scheduler", choices=list(SCHEDULERS), help="(%(default)s)")
    strength_help = "share of the steps to make, from the noised input frame; 1 starts from noise alone (%(default)s)"
    add("--strength", type=share, help=strength_help)
    add("--num_predictions", type=count, help="of each frame; their mean and spread are shown too (%(default)s)")
    add("--residual", **SWITCH, help="keep the input frame where the model changes nothing (%(default)s)")
    parser.set_defaults(**{field.name: field.default for field in fields(SamplingOptions)})


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted."""
    return SamplingOptions(**{field.name: getattr(args, field.name) for field in fields(SamplingOptions)})


def number_of_samples(text: str) -> int | None:
    """An argparse type: a count of at least 1, or None for "all"."""
    return None if text == "all" else number(at_least=1)(text)


def sampling_command(args: argparse.Namespace) -> str:
    """The shell command that samples from the trained model on the validation videos of its training data."""
    variables = {
        "MODEL_DIR": args.output_dir,
        "FRAMES_DIR": frames_dir(args.train_data_dir, args.resolution),
        "VAL_ANNOTATIONS": filtered_annotations_path(args.train_data_dir, "val"),
        "INPUT_FRAME_IDX": args.input_frame_idx,
        "TARGET_FRAME_IDX": args.target_frame_idx,
    }
    for option in fields(SamplingOptions):
        if (value := getattr(args, option.name)) != option.default:
            variables[option.name.upper()] = value
    words = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    return " ".join([*words, "bash sample_from_pix2pix.sh"])
