"""Finds, loads and checks a pipeline, and passes prompts and pictures through its text encoder and VAE.

Nothing is guessed or filled in: a model that lacks weights, a tokenizer or a part is refused, as the libraries would
silently start from random numbers or an empty vocabulary. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from data.cli import UserError, one_line, warn
from data.clips import ANY, NO_PROGRESS, ORACLE, Clip, FrameChoice, FramePair, choice_of, tells_horizon, verify_frames
from pecn.sampling_options import DEFAULT_OPTIONS

TRAINING_CONFIG = "training_config.json"  # what train_instruct_pix2pix.py was called with, beside the trained pipeline
PIPELINE_INDEX = "model_index.json"  # names a pipeline's parts; the last file of one to be written
PARTS = {  # a pipeline's folders, each with a file that it must hold
    "unet": "*.safetensors",
    "vae": "*.safetensors",
    "text_encoder": "*.safetensors",
    "tokenizer": "*.json",
    "scheduler": "scheduler_config.json",
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of the weights, by mixed precision
HUB_TIMEOUT = 10  # seconds for each of the hub's answers

# No progress bars while weights load; pecn/__init__.py silences the libraries' notes.
for _logging in (transformers_logging, diffusers_logging):
    _logging.disable_progress_bar()


# Finding and loading.


def find_model(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The directory of a model's files: `name` itself, or what the hub's cache holds of it; downloaded if it must be.

    The hub is asked only where the cache lacks something. Raises UserError where there is no such model or the hub
    gives no answer.
    """
    if os.path.isdir(name):
        return Path(name)
    missing = f"there is no directory {name} (the nearest is {nearest_directory(Path(name))})"
    if name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir()):  # no hub id, then
        raise UserError(f"{missing}: name one that holds a model")
    options = {"revision": revision, "variant": variant, "use_safetensors": True, "safety_checker": None}
    download = functools.partial(StableDiffusionInstructPix2PixPipeline.download, name, **options)
    with contextlib.suppress(Exception):  # not in the cache, or not all of it
        folder = Path(download(local_files_only=True))
        check_all_parts_are_there(folder)
        return folder
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)  # `download` may wait forever
        folder = Path(download())
        with contextlib.suppress(Exception):  # only models trained here have one
            hf_hub_download(name, TRAINING_CONFIG, revision=revision)
        return folder
    except Exception as error:  # the network, the hub, its libraries: the list of what they raise is long
        raise UserError(
            f"{missing}, and no such model could be fetched from"
            f" {os.environ.get('HF_ENDPOINT', 'the hub')} ({one_line(error)}): set HF_ENDPOINT to a mirror you can"
            " reach, or name a directory that holds a model"
        ) from error


def nearest_directory(path: Path) -> Path:
    """The existing directory whose path is most like `path`, which does not exist; else the one to hold it."""
    parent = path.parent if path.parent.is_dir() else nearest_directory(path.parent)
    names = [folder.name for folder in parent.iterdir() if folder.is_dir()]
    return parent / next(iter(difflib.get_close_matches(path.name, names, n=1)), "")


def read_training_config(folder: Path) -> dict[str, Any]:
    """The arguments a model was trained with; empty where its directory has no record of them."""
    path = folder / TRAINING_CONFIG
    if not path.is_file():
        return {}
    types = {"resolution": int, "target_frame_idx": int, "add_progress": bool}
    types |= {"progress_source": str, "train_data_dir": str}
    types |= {name: type(value) for name, value in vars(DEFAULT_OPTIONS).items()}
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        for name, kind in types.items():
            if type(arguments.get(name, kind())) is not kind:
                raise ValueError(f"{name} is {arguments[name]!r}")
        if arguments.get("input_frame_idx") != ANY and type(arguments.get("input_frame_idx", 0)) is not int:
            raise ValueError(f"input_frame_idx is {arguments['input_frame_idx']!r}")
        tells_horizon(arguments.get("horizon"))
    except (ArgumentTypeError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a training config written by train_instruct_pix2pix.py ({one_line(error)}); copy the model"
            " again, or delete the file to sample without it"
        ) from error
    # Before progress could be estimated, it was the oracle's.
    return {"progress_source": ORACLE if arguments.get("add_progress") else NO_PROGRESS} | arguments


def check_frames(
    samples: Sequence[FramePair | Clip], choice: FrameChoice, model_dir: str, trained: dict[str, Any]
) -> None:
    """Warns where frames are not as the model was trained on them; raises UserError where they fit no model."""
    try:
        with Image.open(samples[0].paths[0]) as image:
            side = image.width
    except OSError:
        side = 0  # damaged, as verify_frames says
    verify_frames(samples, side)
    if side % 8:
        raise UserError(f"{samples[0].paths[0]} is {side} pixels wide; the model needs a multiple of 8")
    if trained.get("resolution", side) != side:
        warn(f"the frames' resolution is {side}, but {model_dir} was trained with {trained['resolution']}")
    if "input_frame_idx" in trained:
        learned = choice_of(trained)
        if learned.start not in (None, choice.start) or not set(choice.horizons) <= set(learned.horizons):
            warn(f"predicting {choice}, but {model_dir} was trained with {learned}")


def load_pipeline(
    folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> StableDiffusionInstructPix2PixPipeline:
    """Loads a diffusers pipeline from a directory, without its safety checker.

    A plain Stable Diffusion pipeline loads as well; its UNet then has half the input channels. Raises UserError where
    a part or a weight is missing or cannot be read, and where the parts do not fit together.
    """
    try:
        check_all_parts_are_there(folder)
        pipeline = load_parts(folder, dtype, variant)
        check_parts_fit(pipeline)
    except Exception as error:  # whatever a broken model makes the libraries raise, only the model can be mended
        raise UserError(
            f"the model {folder} cannot be loaded: {one_line(error)}; copy it again, or name another"
        ) from error
    return pipeline


def check_all_parts_are_there(folder: Path) -> None:
    """Raises UserError where a pipeline's directory lacks a part, or has it only as a pickle."""
    if not (folder / PIPELINE_INDEX).is_file():
        raise UserError(f"it holds no diffusers pipeline (no {PIPELINE_INDEX})")
    for part, pattern in PARTS.items():
        if not any((folder / part).glob(pattern)):
            pickles = any((folder / part).glob("*.bin"))
            unsafe = ", only pickles, which can run any code when they are loaded" if pickles else ""
            raise UserError(f"{part}/ holds no {pattern}{unsafe}")
    for index in folder.glob("*/*.safetensors.index*.json"):  # of weights in several files
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if not name.endswith(".safetensors"):
                raise UserError(f"{index} names {name}, which is no safetensors file")


def load_parts(folder: Path, dtype: torch.dtype, variant: str | None) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline in a directory. Raises UserError where weights are missing, which are otherwise made up."""
    models = {}
    for part, model_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        try:
            models[part], report = model_class.from_pretrained(
                folder,
                subfolder=part,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise UserError(f"{part}/: {one_line(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(f"{len(missing)} weights are missing in {part}/ ({missing[0]}, …)")
    # Nothing here uses a feature extractor, and a saved one's name may be unknown to another version of transformers.
    unused = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder, **models, **unused, dtype=dtype, local_files_only=True
    )


def check_parts_fit(pipeline: StableDiffusionInstructPix2PixPipeline) -> None:
    """Raises UserError where UNet, VAE, text encoder and tokenizer do not belong together."""
    unet, text = pipeline.unet.config, pipeline.text_encoder.config
    channels, vocabulary = pipeline.vae.config.latent_channels, len(pipeline.tokenizer)
    has = (unet.in_channels, unet.out_channels, unet.cross_attention_dim)
    if has not in [(inputs, channels, text.hidden_size) for inputs in (channels, 2 * channels)]:
        raise UserError(
            f"its UNet has {has[0]} input channels, {has[1]} output channels and reads prompts {has[2]} wide, where"
            f" {2 * channels} (or {channels}, for training), {channels} and {text.hidden_size} are needed"
        )
    if not len(pipeline.tokenizer.all_special_ids) < vocabulary <= text.vocab_size:
        raise UserError(f"its tokenizer/ has {vocabulary} words, but its text encoder knows {text.vocab_size}")


# Prompts and pictures.


def tokenize(pipeline: StableDiffusionInstructPix2PixPipeline, edit_prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (N, 77), padded and cut to the model's length, as the stock pipeline does it."""
    tokens = pipeline.tokenizer(
        list(edit_prompts),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids


def encode_prompts(pipeline: StableDiffusionInstructPix2PixPipeline, edit_prompts: Sequence[str]) -> torch.Tensor:
    """The text encoder's states (N, 77, d)."""
    encoder = pipeline.text_encoder
    return encoder(tokenize(pipeline, edit_prompts).to(encoder.device))[0]


def encode_pictures(
    pipeline: StableDiffusionInstructPix2PixPipeline, pictures: Sequence[Image.Image | np.ndarray]
) -> DiagonalGaussianDistribution:
    """The VAE's posterior over the latents (N, C, h, w), not scaled, of RGB pictures (uint8 where they are arrays)."""
    images = [Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture for picture in pictures]
    pixels = pipeline.image_processor.preprocess(images)
    return pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist


def decode_latents(pipeline: StableDiffusionInstructPix2PixPipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures of unscaled latents: float32 RGB (N, H, W, 3) in levels of 0..255, not clipped."""
    decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample
    if not decoded.isfinite().all():
        raise UserError("the model's output is not finite: predict with --mixed_precision no, or bf16")
    return ((decoded.float() + 1) * 127.5).permute(0, 2, 3, 1).cpu().numpy()


def to_picture(levels: np.ndarray) -> np.ndarray:
    return levels.clip(0, 255).round().astype(np.uint8)


# Uploading.


def create_hub_repository(name: str, token: str | None) -> str:
    """Makes the repository to upload to, or finds it; returns its full name. Raises UserError where it cannot."""
    try:
        return HfApi(token=token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:
        raise UserError(
            f"cannot upload to {name}: {one_line(error)}; log in with `hf auth login`, or leave --push_to_hub out"
        ) from error


def upload(folder: Path, repository: str, token: str | None, ignore_patterns: Sequence[str]) -> None:
    """Uploads a trained pipeline. Raises UserError, with the command that does it by hand, where that fails."""
    try:
        HfApi(token=token).upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=list(ignore_patterns))
    except Exception as error:
        ignored = " ".join(f"--exclude '{pattern}'" for pattern in ignore_patterns)
        raise UserError(
            f"the trained pipeline is in {folder}, but its upload failed: {one_line(error)}; upload it with:"
            f" hf upload {repository} {folder} {ignored}"
        ) from error
