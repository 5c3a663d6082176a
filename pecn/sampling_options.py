"""How a frame is predicted: the options of sampling and validation, and their flags.

Apart from pecn/sampling.py, since a command reads its options before it loads torch.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields

from data.layout import SWITCH, CommandParser, UserError, boolean, filtered_annotations_path, frames_dir, number

SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class SamplingOptions:
    """`residual=False, num_predictions=1` draws the picture of diffusers' own pipeline, which drops the image
    guidance as well where the text's is 1."""

    num_inference_steps: int = 20  # denoising steps
    guidance_scale: float = 1.0  # of the text; 1 is none
    image_guidance_scale: float = 1.5  # of the input frame; 1 is none
    scheduler: str = "euler_ancestral"  # one of SCHEDULERS
    strength: float = 1.0  # share of the steps that are made; anything below 1 starts from the noised input frame
    num_predictions: int = 4  # pictures whose mean is the prediction
    residual: bool = True  # change the input frame by what the model changes, instead of decoding it anew
    wiener_gain: bool | None = None  # make small or uncertain changes smaller; None: wherever that is possible

    def __post_init__(self) -> None:
        possible = self.residual and self.num_predictions > 1
        if self.wiener_gain and not possible:
            raise UserError("--wiener_gain needs --residual and --num_predictions of 2 or more")
        if self.wiener_gain is None:
            object.__setattr__(self, "wiener_gain", possible)


DEFAULT_OPTIONS = SamplingOptions()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    add, default = parser.add_argument_group("how frames are predicted").add_argument, DEFAULT_OPTIONS
    count, scale = number(at_least=1), number(float, at_least=1)
    add("--num_inference_steps", type=count, default=default.num_inference_steps, help="denoising steps (%(default)s)")
    add("--guidance_scale", type=scale, default=default.guidance_scale, help="of the text; 1 is none (%(default)s)")
    add(
        "--image_guidance_scale",
        type=scale,
        default=default.image_guidance_scale,
        help="of the input frame; 1 is none (%(default)s)",
    )
    add("--scheduler", choices=list(SCHEDULERS), default=default.scheduler, help="(%(default)s)")
    add(
        "--strength",
        type=number(float, above=0, at_most=1),
        default=default.strength,
        help="share of the steps to make, from the noised input frame; 1 starts from noise alone (%(default)s)",
    )
    add("--num_predictions", type=count, default=default.num_predictions, help="the result is their mean (%(default)s)")
    add(
        "--residual",
        **SWITCH | {"default": default.residual},
        help="add the predicted change to the input frame, instead of decoding the whole picture anew (%(default)s)",
    )
    add(
        "--wiener_gain",
        **SWITCH | {"type": boolean_or_auto, "default": None, "metavar": "True|False|auto"},
        help="change less where several predictions disagree or hardly change anything; auto: with --residual and"
        " --num_predictions of 2 or more (auto)",
    )


def boolean_or_auto(text: str) -> bool | None:
    return None if text == "auto" else boolean(text)


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted. Raises UserError where options do not go together."""
    return SamplingOptions(**{field.name: getattr(args, field.name) for field in fields(SamplingOptions)})


def parse_with_sampling_options(parser: CommandParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """`parser.parse_args`, which also refuses sampling options that do not go together."""
    args = parser.parse_args(arguments)
    try:
        sampling_options(args)
    except UserError as error:
        parser.error(str(error))
    return args


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
    for name in (field.name for field in fields(DEFAULT_OPTIONS) if field.name != "wiener_gain"):
        if (value := getattr(args, name)) != getattr(DEFAULT_OPTIONS, name):
            variables[name.upper()] = value
    if args.wiener_gain is not None:
        variables["WIENER_GAIN"] = args.wiener_gain
    words = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    return " ".join([*words, "bash sample_from_pix2pix.sh"])
