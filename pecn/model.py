"""Finds and loads a pipeline, and passes prompts and pictures through its text encoder and VAE.

Nothing is guessed or filled in: a model that lacks weights is refused, as the libraries would silently start from
random numbers. Only safetensors are read, never pickles, which can run any code when they are loaded.
"""

import contextlib
import functools
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from PIL import Image
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from data.cli import UserError, one_line, warn
from data.clips import settle_frames
from data.prompts import TOLD

Pipeline = StableDiffusionInstructPix2PixPipeline
TRAINING_CONFIG = "training_config.json"  # what train_instruct_pix2pix.py was called with, beside the trained pipeline
PIPELINE_INDEX = "model_index.json"  # names a pipeline's parts; the last file of one to be written
CHECKPOINT_WEIGHTS = "model.safetensors"  # of the UNet, in a checkpoint's folder
MODEL_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
KNOWN_PARTS = {*MODEL_PARTS, "tokenizer", "scheduler", "safety_checker", "feature_extractor", "image_encoder"}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by mixed precision
HUB_TIMEOUT = 10  # seconds for the hub's first answer

transformers_logging.disable_progress_bar()  # while weights load
diffusers_logging.disable_progress_bar()


def find_model(name: str) -> Path:
    """The directory of a model's files: `name` itself, or what the hub's cache holds of it; downloaded if it must be.

    Raises UserError where there is no such model or the hub gives no answer.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        raise UserError(f"{name} is a single file; a diffusers folder is needed, made by: {convert_command(name)}")
    missing = f"there is no directory {name}"
    if name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir()):  # no hub id, then
        raise UserError(f"{missing}: name one that holds a model")
    download = functools.partial(Pipeline.download, name, use_safetensors=True, safety_checker=None)
    with contextlib.suppress(Exception):  # not in the cache, or not all of it
        folder = Path(download(local_files_only=True))
        check_weights_are_there(folder)
        return folder
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)  # `download` may wait forever
        folder = Path(download())
        with contextlib.suppress(Exception):  # only models trained here have one
            hf_hub_download(name, TRAINING_CONFIG)
        return folder
    except Exception as error:  # the network, the hub, its libraries: the list of what they raise is long
        failure = f"no such model could be fetched from {os.environ.get('HF_ENDPOINT', 'the hub')} ({one_line(error)})"
        advice = f"{hub_advice(error)}, or name a directory that holds a model"
        raise UserError(f"{missing}, and {failure}: {advice}") from error


def convert_command(name: str) -> str:
    """The shell command that makes a diffusers folder of a single file of weights."""
    save = f".from_single_file({name!r}).save_pretrained({os.path.splitext(name)[0]!r})"
    return f"python -c {shlex.quote(f'from diffusers import StableDiffusionInstructPix2PixPipeline as P; P{save}')}"


def hub_advice(error: Exception) -> str:
    """What a user can do about an error of the hub."""
    if isinstance(error, GatedRepoError):
        return "accept the model's license on its page and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "check its spelling; where it is private log in with `hf auth login`"
    if isinstance(error, json.JSONDecodeError):
        return "that address answers with a web page, perhaps your network's login page"
    return "set HF_ENDPOINT to a mirror you can reach"


def check_weights_are_there(folder: Path) -> None:
    """Raises UserError where a directory holds no Stable Diffusion pipeline whose weights are safetensors."""
    if not (folder / PIPELINE_INDEX).is_file():
        hint = ""
        if (folder / CHECKPOINT_WEIGHTS).is_file():
            hint = "; it is a checkpoint: MODEL_DIR samples from it, RESUME goes on with it"
        elif (folder.parent / PIPELINE_INDEX).is_file():
            hint = f"; it is a part of one: name {folder.parent}"
        elif any(folder.glob("*lora*.safetensors")):
            hint = "; it holds LoRA weights: name the folder of the whole pipeline"
        raise UserError(f"it holds no diffusers pipeline (no {PIPELINE_INDEX}){hint}")
    index = json.loads((folder / PIPELINE_INDEX).read_bytes())
    for part, of_library in index.items():
        if part not in KNOWN_PARTS and isinstance(of_library, list) and of_library[0]:
            family = "Stable Diffusion 1 or 2, or InstructPix2Pix, is needed"
            raise UserError(f"it is a {index.get('_class_name')}, with a part {part}; {family}")
    for part in MODEL_PARTS:
        if not any((folder / part).glob("*.safetensors")):
            raise UserError(f"{part}/ holds no *.safetensors; pickles (*.bin) are not read")


def load_pipeline(folder: Path) -> Pipeline:
    """Loads a diffusers pipeline from a directory, in float32, without its safety checker.

    A plain Stable Diffusion pipeline loads as well; its UNet then has half the input channels. Raises UserError where
    a part or a weight is missing or cannot be read.
    """
    try:
        check_weights_are_there(folder)
        models = {}
        for part, model_class in MODEL_PARTS.items():
            names = [path.name for path in (folder / part).glob("*.safetensors")]
            models[part], report = model_class.from_pretrained(
                folder,
                subfolder=part,
                variant="fp16" if all(".fp16." in name for name in names) else None,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            if missing := sorted(report["missing_keys"]):
                raise UserError(f"{len(missing)} weights are missing in {part}/ ({missing[0]}, …)")
        # Nothing here uses a feature extractor; a saved one's name may be unknown to another version of transformers.
        unused = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
        pipeline = Pipeline.from_pretrained(folder, **models, **unused, local_files_only=True)
        if len(pipeline.tokenizer) <= len(pipeline.tokenizer.all_special_ids):
            raise UserError("tokenizer/ has no vocabulary")
        channels, in_channels = pipeline.vae.config.latent_channels, pipeline.unet.config.in_channels
        if in_channels not in (channels, 2 * channels):
            raise UserError(f"its UNet has {in_channels} input channels; {channels} or {2 * channels} are needed")
        return pipeline.to(torch.float32)
    except Exception as error:  # whatever a broken model makes the libraries raise, only the model can be mended
        reason = one_line(error)
        raise UserError(f"the model {folder} cannot be loaded: {reason}; copy it again, or name another") from error


def round_weights(model: torch.nn.Module, mixed_precision: str) -> None:
    """Rounds the matrices that are not trained to the precision ("no", "fp16", "bf16") that autocast computes with.

    It would do so anew in every pass. Saves half of their memory, and changes no result.
    """
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.requires_grad and mixed_precision != "no":
            weight.data = weight.data.to(DTYPES[mixed_precision])


def read_training_config(folder: Path) -> dict[str, Any]:
    """The arguments a model, or a checkpoint, was trained with; empty where its directory has no record of them.

    Those that earlier versions recorded otherwise are returned as this one records them.
    """
    path = folder / TRAINING_CONFIG
    if not path.is_file():
        return {}
    try:
        arguments = dict(json.loads(path.read_bytes())["arguments"])
        if isinstance(arguments.get("target_frame_idx"), int):
            if arguments.get("horizon") or arguments["input_frame_idx"] == "any":
                del arguments["target_frame_idx"]
            settle_frames(arguments)
        nearest = {"ddim": "euler", "dpmsolver++": "dpmsolver++karras"}.get(arguments["scheduler"])
        return arguments | ({"scheduler": nearest} if nearest else {})
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"is not a training config written by train_instruct_pix2pix.py ({one_line(error)})"
        advice = "copy the model again, or delete the file to sample without it"
        raise UserError(f"{path} {problem}; {advice}") from error


def digest(parts: Iterable[bytes]) -> str:
    """A short name for some bytes: equal names mean equal bytes."""
    return hashlib.blake2b(b"".join(hashlib.sha256(part).digest() for part in parts), digest_size=16).hexdigest()


def module_bytes(module: torch.nn.Module) -> Iterator[bytes]:
    """Everything that determines what a frozen model computes: its configuration and its weights."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    # Where the model was found and what wrote it down does not change what it computes.
    notes = {"transformers_version", "architectures", "dtype"}
    config = {name: value for name, value in config.items() if name[0] != "_" and name not in notes}
    yield json.dumps(config, sort_keys=True, default=str).encode()
    for name, tensor in sorted(module.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def too_long(pipeline: Pipeline, edit_prompts: Sequence[str]) -> list[int]:
    """The places of the prompts that have more tokens than the text encoder reads."""
    tokens = pipeline.tokenizer(list(edit_prompts), verbose=False).input_ids
    return [place for place, ids in enumerate(tokens) if len(ids) > pipeline.tokenizer.model_max_length]


def tokenize(pipeline: Pipeline, edit_prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (N, 77), padded to the model's length. Of a longer prompt the caption is cut, not what follows it."""
    tokenizer = pipeline.tokenizer
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    tokens = tokenizer(list(edit_prompts), **length, return_tensors="pt").input_ids
    for place in too_long(pipeline, edit_prompts):
        if told := TOLD.search(edit_prompts[place]):
            ids = tokenizer(told[0], return_tensors="pt").input_ids[0, 1:]  # without the token that begins a text
            tokens[place, -len(ids) :] = ids
    return tokens


def warn_of_cuts(pipeline: Pipeline, edit_prompts: Sequence[str]) -> None:
    """Says how many of the prompts `tokenize` cuts."""
    if places := too_long(pipeline, edit_prompts):
        limit = f"more than {pipeline.tokenizer.model_max_length} tokens"
        warn(f"{len(places)} of {len(edit_prompts)} prompts have {limit}: the ends of their captions are cut")


def encode_prompts(pipeline: Pipeline, edit_prompts: Sequence[str]) -> torch.Tensor:
    """The text encoder's states (N, 77, d)."""
    encoder = pipeline.text_encoder
    return encoder(tokenize(pipeline, edit_prompts).to(encoder.device))[0]


def encode_pictures(pipeline: Pipeline, pictures: Sequence[np.ndarray]) -> DiagonalGaussianDistribution:
    """The VAE's posterior over the latents (N, C, h, w), not scaled, of uint8 RGB pictures (H, W, 3)."""
    pixels = pipeline.image_processor.preprocess([*map(Image.fromarray, pictures)]).to(pipeline.vae.device)
    with torch.autocast(pixels.device.type, enabled=False):  # in float32, as Stable Diffusion's overflows in fp16
        return pipeline.vae.encode(pixels).latent_dist


def decode_latents(pipeline: Pipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures of unscaled latents: float32 RGB (N, H, W, 3) in levels of 0..255, clipped; NaN stays."""
    with torch.autocast(latents.device.type, enabled=False):
        decoded = pipeline.vae.decode(latents.float()).sample
    return ((decoded + 1) * 127.5).clip(0, 255).permute(0, 2, 3, 1).cpu().numpy()


def to_picture(levels: np.ndarray) -> np.ndarray:
    """float32 levels of 0..255 as uint8."""
    return levels.round().astype(np.uint8)
