"""Predicting frames: guidance, denoising, and what several draws of one frame are made into."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from data.cli import warn
from data.clips import FramePair, derive_seed
from data.video_decoder import load_picture
from pecn.model import Pipeline, decode_latents, encode_pictures, encode_prompts, to_picture
from pecn.sampling_options import DEFAULT_OPTIONS, SCHEDULERS, SamplingOptions

# Root mean square, in levels of 0..255: predicted changes below it are mostly errors. Chosen with
# benchmarks.sampling_options on rendered clips of seed 5150.
SMALLEST_CHANGE = 6.5


@dataclass(frozen=True)
class PredictedFrame:
    """What is predicted from one input frame. `sample`, `expected`: uint8 RGB (H, W, 3)."""

    sample: np.ndarray  # the first draw
    expected: np.ndarray | None  # the mean of several; None where only one was made
    uncertainty: np.ndarray | None  # float32 (H, W): their standard deviation at each pixel, averaged over the colors


@dataclass(frozen=True)
class Prediction:
    """A pair's prediction beside its input and its target; pictures are uint8 RGB (H, W, 3)."""

    video_id: str
    task: str
    edit_prompt: str
    input: np.ndarray
    predicted: PredictedFrame
    target: np.ndarray | None = None  # None where the video lacks the frame
    vae_ceiling: np.ndarray | None = None  # the target after one trip through the VAE; None where either is missing


def create_scheduler(name: str, config: dict[str, Any], num_inference_steps: int) -> Any:
    """The scheduler called `name` in SCHEDULERS, for a model whose own scheduler has `config`."""
    class_name, options = SCHEDULERS[name]
    if num_inference_steps == 1:
        options = options | {"timestep_spacing": "trailing"}  # the only one whose single step begins where all is noise
    return getattr(diffusers, class_name).from_config(config, **options)


def guided_prediction(
    unet: torch.nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    empty_embeds: torch.Tensor,
    options: SamplingOptions,
) -> torch.Tensor:
    """The UNet's output with guidance, eq. 3 of Brooks et al., 2023 (arXiv 2211.09800), written as a weighted sum.

    A branch whose weight is zero is not computed: without any guidance that leaves one of three.
    """
    no_image = torch.zeros_like(image_latents)
    text_scale, image_scale = options.guidance_scale, options.image_guidance_scale
    branches = [
        (text_scale, image_latents, prompt_embeds),
        (image_scale - text_scale, image_latents, empty_embeds),
        (1 - image_scale, no_image, empty_embeds),
    ]
    branches = [branch for branch in branches if branch[0] != 0]
    weights, images, embeds = zip(*branches)
    unet_input = torch.cat([torch.cat([latents, image], dim=1) for image in images])
    outputs = unet(unet_input.to(unet.dtype), timestep, torch.cat(embeds), return_dict=False)[0].float()
    return sum(weight * output for weight, output in zip(weights, outputs.chunk(len(branches))))


def denoise(
    pipeline: Pipeline,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    generators: list[torch.Generator],
    options: SamplingOptions,
    watch: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter,
) -> torch.Tensor:
    """Samples latents (N, C, h, w), unscaled like `image_latents`, from the noise of each sample's generator.

    `watch` goes through the timesteps and may show that, as tqdm does.
    """
    scheduler = create_scheduler(options.scheduler, pipeline.scheduler.config, options.num_inference_steps)
    device, factor = image_latents.device, pipeline.vae.config.scaling_factor
    scheduler.set_timesteps(options.num_inference_steps, device=device)
    num_steps = max(1, round(options.num_inference_steps * options.strength))
    timesteps = scheduler.timesteps[-num_steps:]
    latents = randn_tensor(image_latents.shape, generator=generators, device=device)
    if options.strength == 1:
        latents = latents * scheduler.init_noise_sigma
    else:
        scheduler.set_begin_index(options.num_inference_steps - num_steps)
        latents = scheduler.add_noise(image_latents.float() * factor, latents, timesteps[:1])
    empty_embeds = encode_prompts(pipeline, [""]).expand_as(prompt_embeds)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": generators} if takes_generator else {}
    for timestep in watch(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        output = guided_prediction(pipeline.unet, scaled, timestep, image_latents, prompt_embeds, empty_embeds, options)
        latents = scheduler.step(output, timestep, latents, **noise_source).prev_sample
    return latents / factor


@torch.no_grad()
def predict_frames(
    pipeline: Pipeline,
    images: Sequence[np.ndarray],
    edit_prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_OPTIONS,
    watch: Callable[[torch.Tensor], Iterable[torch.Tensor]] = iter,
) -> list[PredictedFrame | None]:
    """Predicts one batch from uint8 RGB frames (H, W, 3); None where a prediction is not finite.

    Each draw has its own noise seed, so its picture does not depend on its neighbors in the batch. `watch` is as
    `denoise` takes it.
    """
    count = options.num_predictions
    image_latents = encode_pictures(pipeline, images).mode()
    prompt_embeds = encode_prompts(pipeline, edit_prompts)
    noise_seeds = [seed if k == 0 else derive_seed(seed, "prediction", k) for seed in seeds for k in range(count)]
    generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
    repeated = (image_latents.repeat_interleave(count, dim=0), prompt_embeds.repeat_interleave(count, dim=0))
    decoded = decode_latents(pipeline, denoise(pipeline, *repeated, generators, options, watch))
    reconstructed = decode_latents(pipeline, image_latents) if options.keep_background else [None] * len(images)
    frames = []
    for image, draws, same in zip(images, decoded.reshape(len(images), count, *decoded.shape[1:]), reconstructed):
        if not np.isfinite(draws).all():
            frames.append(None)
            continue
        sample, mean = (with_background(picture, image, same) for picture in (draws[0], draws.mean(axis=0)))
        spread = draws.std(axis=0, ddof=1).mean(axis=-1) if count > 1 else None
        frames.append(PredictedFrame(to_picture(sample), to_picture(mean) if count > 1 else None, spread))
    return frames


def with_background(picture: np.ndarray, image: np.ndarray, reconstruction: np.ndarray | None) -> np.ndarray:
    """A prediction (H, W, 3) in levels of 0..255, with the input frame's pixels where it hardly differs from that.

    It is compared with `reconstruction`, the input frame after one trip through the VAE; None leaves it as it is. The
    change squared, summed over the colors and averaged over a neighborhood of a 16th of the side, stands for signal
    plus noise, and SMALLEST_CHANGE for the noise. Where Wiener's gain, signal / (signal + noise), is below 1/4 the
    input's pixels stay, above 3/4 they are the prediction's: mixtures of both would show ghosts.
    """
    if reconstruction is None:
        return picture
    power = cv2.GaussianBlur(np.square(picture - reconstruction).sum(axis=-1), (0, 0), picture.shape[1] / 16)
    gain = np.maximum(1 - 3 * SMALLEST_CHANGE**2 / (power + 1e-6), 0)
    return image + np.clip(2 * gain - 0.5, 0, 1)[..., None] * (picture - image)


@torch.no_grad()
def reconstruct_frame(pipeline: Pipeline, image: np.ndarray) -> np.ndarray:
    """A picture after one trip through the VAE (posterior mode), uint8 RGB: as good as decoding alone can be."""
    return to_picture(decode_latents(pipeline, encode_pictures(pipeline, [image]).mode())[0])


def predict_pairs(
    pipeline: Pipeline,
    pairs: Sequence[FramePair],
    seed: int,
    batch_size: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    label: str | None = None,
) -> Iterator[Prediction]:
    """Predicts every pair, `batch_size` pictures at once, or all draws of one pair if these are more.

    With a `label` there is a progress bar of that name.
    """
    at_once = max(1, batch_size // options.num_predictions)
    with tqdm(total=len(pairs), desc=label, unit="frame", disable=label is None) as progress_bar:
        for first in range(0, len(pairs), at_once):
            batch = pairs[first : first + at_once]
            inputs = [load_picture(pair.input_image) for pair in batch]
            seeds = [derive_seed(seed, pair.video_id) for pair in batch]
            predicted = predict_frames(pipeline, inputs, [pair.edit_prompt for pair in batch], seeds, options)
            for pair, image, frame in zip(batch, inputs, predicted):
                if frame is None:
                    warn(f"{pair.video_id}: the prediction is not finite; left out")
                    continue
                target = load_picture(pair.edited_image) if pair.edited_image else None
                ceiling = None if target is None else reconstruct_frame(pipeline, target)
                yield Prediction(pair.video_id, pair.task, pair.edit_prompt, image, frame, target, ceiling)
            progress_bar.update(len(batch))
