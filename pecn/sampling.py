"""Predicting frames: guidance, denoising, and what several predictions of one frame are made into."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.utils.torch_utils import randn_tensor
from tqdm import tqdm

from data.clips import FramePair, derive_seed
from data.sthv2_dataset_hf import frame_pairs_dataset
from pecn.model import decode_latents, encode_pictures, encode_prompts, to_picture
from pecn.sampling_options import DEFAULT_OPTIONS, SCHEDULERS, SamplingOptions

# Root mean square, in levels of 0..255: predicted changes below it are mostly errors. Chosen with
# benchmarks.sampling_options on rendered clips of seed 5150.
SMALLEST_CHANGE = 6.5


@dataclass(frozen=True)
class PredictedFrame:
    """What is predicted from one input frame. `sample`, `expected`: uint8 RGB (H, W, 3)."""

    sample: np.ndarray  # one prediction: a frame. Of several the most central one, nearest to their mean
    expected: np.ndarray | None  # the mean of several; None where only one was made
    uncertainty: np.ndarray | None  # float32 (H, W): their standard deviation at each pixel, averaged over the colors


@dataclass(frozen=True)
class Prediction(PredictedFrame):
    """A pair's prediction beside its input and its target; pictures are uint8 RGB (H, W, 3)."""

    video_id: str
    task: str
    edit_prompt: str
    input: np.ndarray
    target: np.ndarray | None  # None where the video lacks the frame
    vae_ceiling: np.ndarray | None  # the target after one trip through the VAE; None where either is missing


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
    """The UNet's output with guidance, eq. 3 of Brooks et al., 2023 (arXiv 2211.09800), sorted by branches.

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
    pipeline: StableDiffusionInstructPix2PixPipeline,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    generators: list[torch.Generator],
    options: SamplingOptions,
) -> torch.Tensor:
    """Samples latents (N, C, h, w), unscaled like `image_latents`, from the noise of each sample's generator."""
    scheduler = create_scheduler(options.scheduler, pipeline.scheduler.config, options.num_inference_steps)
    device, factor = image_latents.device, pipeline.vae.config.scaling_factor
    scheduler.set_timesteps(options.num_inference_steps, device=device)
    num_steps = max(1, round(options.num_inference_steps * options.strength))
    # Rounding gives DDIM one step too many for some numbers.
    timesteps = scheduler.timesteps[: options.num_inference_steps][-num_steps:]
    latents = randn_tensor(image_latents.shape, generator=generators, device=device)
    if options.strength == 1:
        latents = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(options.num_inference_steps - num_steps)
        latents = scheduler.add_noise(image_latents.float() * factor, latents, timesteps[:1])
    empty_embeds = encode_prompts(pipeline, [""]).expand_as(prompt_embeds)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": generators} if takes_generator else {}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        output = guided_prediction(pipeline.unet, scaled, timestep, image_latents, prompt_embeds, empty_embeds, options)
        latents = scheduler.step(output, timestep, latents, **noise_source).prev_sample
    return latents / factor


def predict_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    images: Sequence[np.ndarray],
    edit_prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> list[PredictedFrame]:
    """Predicts one batch from uint8 RGB frames (H, W, 3).

    Each prediction has its own noise seed, so its picture does not depend on its neighbors in the batch.
    """
    count = options.num_predictions
    with torch.no_grad():
        image_latents = encode_pictures(pipeline, images).mode()
        prompt_embeds = encode_prompts(pipeline, edit_prompts)
        noise_seeds = [seed if k == 0 else derive_seed(seed, "prediction", k) for seed in seeds for k in range(count)]
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        repeated = (image_latents.repeat_interleave(count, dim=0), prompt_embeds.repeat_interleave(count, dim=0))
        decoded = decode_latents(pipeline, denoise(pipeline, *repeated, generators, options)).clip(0, 255)
        decoded = decoded.reshape(len(images), count, *decoded.shape[1:])
        reconstructed = [None] * len(images)
        if options.residual:
            reconstructed = decode_latents(pipeline, image_latents).clip(0, 255)
    return [
        combine(pictures, image.astype(np.float32), same)
        for pictures, image, same in zip(decoded, images, reconstructed)
    ]


def combine(pictures: np.ndarray, image: np.ndarray, reconstruction: np.ndarray | None) -> PredictedFrame:
    """What K decoded predictions `pictures` (K, H, W, 3) of one frame make; all arguments are in levels of 0..255.

    The input frame `image` (H, W, 3) stays where the predictions hardly differ from `reconstruction`, the same frame
    after one trip through the VAE; without it nothing stays. The expected frame mixes both by Wiener's gain. In the
    sample the share of the prediction rises from 0 to 1 while the gain does from 1/4 to 3/4: mixtures show ghosts.
    """
    mean = pictures.mean(axis=0)
    sample = pictures[np.square(pictures - mean).sum(axis=(1, 2, 3)).argmin()]
    if reconstruction is not None:
        gain = wiener_gain(sample - reconstruction, np.zeros_like(sample))
        sample = image + np.clip(2 * gain - 0.5, 0, 1) * (sample - image)
    if len(pictures) == 1:
        return PredictedFrame(to_picture(sample), expected=None, uncertainty=None)
    variance = pictures.var(axis=0, ddof=1)
    if reconstruction is not None:
        mean = image + wiener_gain(mean - reconstruction, variance / len(pictures)) * (mean - image)
    return PredictedFrame(to_picture(sample), to_picture(mean), np.sqrt(variance).mean(axis=-1))


def wiener_gain(change: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Wiener's gain for a predicted change with a known variance, both (H, W, 3): (H, W, 1) in 0..1.

    Signal / (signal + noise): the change squared stands for signal + noise, and for the noise its variance, but never
    less than SMALLEST_CHANGE squared. Both are summed over the colors and averaged over a neighborhood of a 16th of
    the side. The gain is 0 where nothing moves, which keeps the detail that the VAE loses, and 1 where something else
    has come.
    """
    power, noise = np.square(change).sum(axis=-1), variance.sum(axis=-1)
    power, noise = (cv2.GaussianBlur(image, (0, 0), change.shape[1] / 16) for image in (power, noise))
    noise = np.maximum(noise, 3 * SMALLEST_CHANGE**2)
    return (np.maximum(power - noise, 0) / (power + 1e-6))[..., None]


def reconstruct_frame(pipeline: StableDiffusionInstructPix2PixPipeline, image: np.ndarray) -> np.ndarray:
    """A picture after one trip through the VAE (posterior mode), uint8 RGB: as good as decoding alone can be."""
    with torch.no_grad():
        return to_picture(decode_latents(pipeline, encode_pictures(pipeline, [image]).mode())[0])


def predict_pairs(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: Sequence[FramePair],
    seed: int,
    batch_size: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    show_progress: bool = True,
) -> Iterator[Prediction]:
    """Predicts every pair, `batch_size` pictures at once, or all predictions of one pair if these are more."""
    dataset = frame_pairs_dataset(pairs)
    with tqdm(total=len(dataset), desc="Predicting", unit="frame", disable=not show_progress) as progress_bar:
        for batch in dataset.iter(max(1, batch_size // options.num_predictions)):
            inputs = [np.asarray(image) for image in batch["input_image"]]
            seeds = [derive_seed(seed, video_id) for video_id in batch["video_id"]]
            predicted = predict_frames(pipeline, inputs, batch["edit_prompt"], seeds, options)
            for index, image in enumerate(batch["edited_image"]):
                target = None if image is None else np.asarray(image)
                yield Prediction(
                    video_id=batch["video_id"][index],
                    task=batch["task"][index],
                    edit_prompt=batch["edit_prompt"][index],
                    input=inputs[index],
                    **vars(predicted[index]),
                    target=target,
                    vae_ceiling=None if target is None else reconstruct_frame(pipeline, target),
                )
            progress_bar.update(len(inputs))
