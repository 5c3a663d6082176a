"""How a frame is predicted: the options of sampling and validation, and their flags. Imports no library."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

from data.layout import UserError

SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class SamplingOptions:
    """How a frame is predicted.

    `residual=False, wiener_gain=False, num_predictions=1` draws the picture of diffusers' own pipeline, which drops the
    image guidance as well where the text's is 1. Raises `UserError` where a value is out of its range, or where
    `wiener_gain` is asked of one prediction or of `residual=False`.
    """

    num_inference_steps: int = 20  # denoising steps
    guidance_scale: float = 1.0  # of the text; 1 is none
    image_guidance_scale: float = 1.5  # of the input frame; 1 is none
    scheduler: str = "euler_ancestral"  # one of SCHEDULERS
    strength: float = 1.0  # share of the steps that are made; anything below 1 starts from the noised input frame
    num_predictions: int = 4  # pictures whose mean is the prediction
    residual: bool = True  # change the input frame by what the model changes, instead of decoding it anew
    wiener_gain: bool = True  # make the change smaller where the predictions disagree, or hardly change

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "num_predictions"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, not {self.scheduler}")
        if not 0 < self.strength <= 1:
            raise UserError(f"--strength must lie in (0, 1], not {self.strength}")
        if self.wiener_gain and not (self.residual and self.num_predictions > 1):
            raise UserError("--wiener_gain needs --residual and --num_predictions of 2 or more")


DEFAULT_OPTIONS = SamplingOptions()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    add = parser.add_argument_group("how frames are predicted").add_argument
    default = DEFAULT_OPTIONS
    add("--num_inference_steps", type=int, default=default.num_inference_steps, help="denoising steps (%(default)s)")
    add("--guidance_scale", type=float, default=default.guidance_scale, help="of the text; 1 is none (%(default)s)")
    add(
        "--image_guidance_scale",
        type=float,
        default=default.image_guidance_scale,
        help="of the input frame; 1 is none (%(default)s)",
    )
    add("--scheduler", choices=list(SCHEDULERS), default=default.scheduler, help="(%(default)s)")
    add(
        "--strength",
        type=float,
        default=default.strength,
        help="share of the steps to make, from the noised input frame; 1 starts from noise alone (%(default)s)",
    )
    add("--num_predictions", type=int, default=default.num_predictions, help="the result is their mean (%(default)s)")
    add(
        "--residual",
        action=argparse.BooleanOptionalAction,
        default=default.residual,
        help="add the predicted change to the input frame, instead of decoding the whole picture anew",
    )
    add(
        "--wiener_gain",
        action=argparse.BooleanOptionalAction,
        help="change less where several predictions disagree or hardly change anything; needs --residual and"
        " --num_predictions of 2 or more (on wherever these are)",
    )


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted."""
    values = {field.name: getattr(args, field.name) for field in fields(SamplingOptions)}
    if values["wiener_gain"] is None:
        values["wiener_gain"] = values["residual"] and values["num_predictions"] > 1
    return SamplingOptions(**values)


def number_of_samples(text: str) -> int | None:
    """A count of at least 1, or None for "all"."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor 'all'")
    return int(text)
