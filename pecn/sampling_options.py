"""How a frame is predicted: the options of sampling and validation, and their flags.

Apart from pecn/sampling.py, since a script reads its options before it loads torch.
"""

import argparse
from dataclasses import dataclass, fields

from data.cli import SWITCH, number

# Names of diffusers' classes, and the options in which they differ from a model's own scheduler.
SCHEDULERS = {
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmsolver++karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


@dataclass(frozen=True)
class SamplingOptions:
    """What a prediction depends on beside the model, the frame, the prompt and the seed.

    With the defaults of `strength` and `keep_background` the picture is that of diffusers' own pipeline, which needs a
    `guidance_scale` above 1.
    """

    num_inference_steps: int = 20  # denoising steps
    guidance_scale: float = 1.0  # of the text; 1 is none
    image_guidance_scale: float = 1.5  # of the input frame; 1 is none
    scheduler: str = "euler_ancestral"  # one of SCHEDULERS
    strength: float = 1.0  # share of the steps that are made; anything below 1 starts from the noised input frame
    num_predictions: int = 1  # draws of each frame; of several their mean and spread are kept too
    keep_background: bool = False  # put the input frame's pixels where the model changes little


DEFAULT_OPTIONS = SamplingOptions()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads, with DEFAULT_OPTIONS."""
    add = parser.add_argument_group("how frames are predicted").add_argument
    count, scale, share = number(at_least=1), number(float, at_least=1), number(float, above=0, at_most=1)
    add("--num_inference_steps", type=count, help="denoising steps (%(default)s)")
    add("--guidance_scale", type=scale, help="of the text; 1 is none (%(default)s)")
    add("--image_guidance_scale", type=scale, help="of the input frame; 1 is none (%(default)s)")
    add("--scheduler", choices=list(SCHEDULERS), help="(%(default)s)")
    strength_help = "share of the steps to make, from the noised input frame; 1 starts from noise alone (%(default)s)"
    add("--strength", type=share, help=strength_help)
    add("--num_predictions", type=count, help="draws of each frame; their mean is shown too (%(default)s)")
    add("--keep_background", **SWITCH, help="keep the input's pixels where the model changes little (%(default)s)")
    parser.set_defaults(**vars(DEFAULT_OPTIONS))


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted."""
    return SamplingOptions(**{field.name: getattr(args, field.name) for field in fields(SamplingOptions)})
