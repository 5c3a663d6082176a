"""How a frame is predicted: the options of sampling and validation, and their flags.

Apart from pecn/sampling.py, since a command reads its options before it loads torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from data.cli import SWITCH, number

# Names of diffusers' classes, and the options in which they differ from a model's own scheduler.
SCHEDULERS = {
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    # Latents are not bounded by 1 as pictures are, and DDIM's steps fit no other spacing.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
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
    residual: bool = True  # keep the input frame where the model changes little, instead of decoding it anew


DEFAULT_OPTIONS = SamplingOptions()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads; their help names DEFAULT_OPTIONS, whatever the parser's defaults are."""
    add, standard = parser.add_argument_group("how frames are predicted").add_argument, DEFAULT_OPTIONS
    count, scale, share = number(at_least=1), number(float, at_least=1), number(float, above=0, at_most=1)
    add("--num_inference_steps", type=count, help=f"denoising steps ({standard.num_inference_steps})")
    add("--guidance_scale", type=scale, help=f"of the text; 1 is none ({standard.guidance_scale})")
    image_help = f"of the input frame; 1 is none ({standard.image_guidance_scale})"
    add("--image_guidance_scale", type=scale, help=image_help)
    add("--scheduler", choices=list(SCHEDULERS), help=f"({standard.scheduler})")
    strength_help = "share of the steps to make, from the noised input frame; 1 starts from noise alone"
    add("--strength", type=share, help=f"{strength_help} ({standard.strength})")
    count_help = f"of each frame; their mean and spread are shown too ({standard.num_predictions})"
    add("--num_predictions", type=count, help=count_help)
    add("--residual", **SWITCH, help=f"keep the input frame where the model changes little ({standard.residual})")
    parser.set_defaults(**vars(standard))


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted."""
    return SamplingOptions(**{field.name: getattr(args, field.name) for field in fields(SamplingOptions)})


def number_of_samples(text: str) -> int | None:
    """An argparse type: a count of at least 1, or None for "all"."""
    return None if text == "all" else number(at_least=1)(text)
