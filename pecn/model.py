"""Load a diffusers pipeline from a directory or the hub, and say in one line what is wrong where that fails.

Nothing is guessed or filled in: a model that lacks weights, a tokenizer or a part is refused, as the libraries would
silently start from random numbers or an empty vocabulary. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from data.layout import UserError

# Each part, the class it must have (None: any), and a file that its folder must hold (one of the patterns).
PARTS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "unet": ("UNet2DConditionModel", ("*.safetensors",)),
    "vae": ("AutoencoderKL", ("*.safetensors",)),
    "text_encoder": ("CLIPTextModel", ("*.safetensors",)),
    "tokenizer": (None, ("tokenizer.json", "vocab.json")),
    "scheduler": (None, ("scheduler_config.json",)),
}
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
HUB_PATIENCE = 10  # seconds to wait for the hub's first answer; an error has to appear within 30 with all imports


def load_pipeline(
    name: str, dtype: torch.dtype | None = None, **hub_options: str | None
) -> StableDiffusionInstructPix2PixPipeline:
    """Loads a diffusers pipeline from a directory or the hub, without its safety checker.

    `hub_options` are `revision`, `variant` and `cache_dir`. Only safetensors weights are read, never pickles.
    A plain Stable Diffusion pipeline loads as well, its UNet then has 4 input channels. Raises UserError where
    the model cannot be found, reached or read, where a part or a weight is missing, and where the parts do not fit
    together.
    """
    hub_options = {option: value for option, value in hub_options.items() if value}
    folder = Path(name) if os.path.isdir(name) else fetch_from_hub(name, hub_options)
    quiet_libraries()

    try:
        check_files(folder)
        pipeline = load_parts(folder, dtype or torch.float32, hub_options.get("variant"))
        check_parts_fit(pipeline)
    except Exception as error:  # whatever a broken model makes the libraries raise, the user can only mend the model
        raise UserError(f"the model {name} cannot be loaded: {one_line(error)}") from error
    return pipeline


def quiet_libraries() -> None:
    """Keeps transformers' and diffusers' notes (a missing torchvision, bars while weights load) out of the output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# The directory.


def check_files(folder: Path) -> None:
    """Raises UserError where a pipeline's directory lacks a part, or has its weights in pickles only."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError("it holds no diffusers pipeline (no model_index.json); train one or name another")
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"model_index.json is not valid JSON ({error}); copy the model again") from error
    if not isinstance(index, dict):
        raise UserError("model_index.json must hold an object with the pipeline's parts; copy the model again")
    for part, (wanted_class, patterns) in PARTS.items():
        described = index.get(part)
        if not isinstance(described, list) or len(described) != 2 or not all(described):
            raise UserError(f"model_index.json names no {part}; name a Stable Diffusion or InstructPix2Pix pipeline")
        if wanted_class and described[1] != wanted_class:
            raise UserError(f"its {part} is a {described[1]}, but must be a {wanted_class}")
        if not (folder / part).is_dir():
            raise UserError(f"the folder {part}/ is missing; copy the model again, or name another")
        if any(any((folder / part).glob(pattern)) for pattern in patterns):
            check_weights_files(folder / part)
            continue
        pickles = [path.name for pattern in PICKLES for path in sorted((folder / part).glob(pattern))]
        if pickles:
            raise UserError(
                f"{part}/ has its weights in a pickle only ({pickles[0]}), which can run any code when it is loaded:"
                " it is not; save the model again with safe_serialization=True, or name another"
            )
        raise UserError(f"{part}/ holds no {' or '.join(patterns)}; copy the model again, or name another")


def check_weights_files(part: Path) -> None:
    """Raises UserError where safetensors files are cut or something else, or an index of several leads elsewhere."""
    for path in sorted(part.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):  # reads the header, and compares it with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{part.name}/{path.name} is no whole safetensors file ({one_line(error)}); copy the model again"
            ) from error
    for index in part.glob("*.safetensors.index*.json"):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors") or not (part / shard).is_file():
                raise UserError(f"{part.name}/{index.name} names {shard}, which is no safetensors file beside it")


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
            raise UserError(
                f"the weights in {part}/ are not whole: {len(missing)} are missing ({missing[0]}, …);"
                " copy the model again, or name another"
            )
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(
        folder, **models, safety_checker=None, requires_safety_checker=False, dtype=dtype, local_files_only=True
    )


def check_parts_fit(pipeline: StableDiffusionInstructPix2PixPipeline) -> None:
    """Raises UserError where UNet, VAE, text encoder and tokenizer do not belong together."""
    unet, vae, text = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    if unet.in_channels not in (4, 8):
        raise UserError(f"its UNet has {unet.in_channels} input channels; 8 (or 4, for training) are needed")
    if unet.out_channels != 4 or vae.latent_channels != 4:
        raise UserError(
            f"its UNet predicts {unet.out_channels} channels and its VAE has {vae.latent_channels}; 4 are needed"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise UserError(
            f"its UNet reads prompts {unet.cross_attention_dim} wide, but its text encoder writes {text.hidden_size}"
        )
    vocabulary = len(pipeline.tokenizer)
    if not len(pipeline.tokenizer.all_special_ids) < vocabulary <= text.vocab_size:
        raise UserError(f"its tokenizer has {vocabulary} words, but its text encoder knows {text.vocab_size}")


# The hub.


def fetch_from_hub(name: str, hub_options: dict[str, str]) -> Path:
    """The directory of a hub model's files, downloaded now or before. Raises UserError where there are none."""
    problem = hub_problem(name, hub_options.get("revision"))
    try:
        where = {option: hub_options.get(option) for option in ("cache_dir", "revision")}
        if problem and not isinstance(try_to_load_from_cache(name, "model_index.json", **where), str):
            raise UserError(problem)  # before the libraries are loaded, which takes as long again
        quiet_libraries()

        folder = StableDiffusionInstructPix2PixPipeline.download(
            name, use_safetensors=True, safety_checker=None, local_files_only=problem is not None, **hub_options
        )
    except Exception as error:  # the network, the hub, its libraries: the list of what they raise is long
        raise UserError(
            f"there is no directory {name}, and no such model could be fetched from"
            f" {os.environ.get('HF_ENDPOINT', 'the hub')}: set HF_ENDPOINT to a mirror you can reach, or name a"
            f" directory that holds a model (your own training's output, or one made by `python -m demo.make_model`)."
            f" Reason: {problem or one_line(error)}"
        ) from error
    if problem and os.environ.get("RANK", "0") == "0":
        print(f"warning: using the copy of {name} fetched earlier: {problem}", file=sys.stderr)
    return Path(folder)


@functools.cache
def hub_problem(name: str, revision: str | None = None) -> str | None:
    """Why the hub cannot be asked for a model at present; None if it answers, even by saying that it has no such model.

    Asks in a thread of its own: the library waits without limit for an answer, and as long as it takes for the name
    of the hub's computer to be looked up and for each of its addresses to be tried.
    """
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_PATIENCE)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    if not outcome:
        return f"the hub gave no answer within {HUB_PATIENCE} seconds"
    error = outcome[0]
    if error is None or isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)):
        return None
    return f"the hub cannot be reached ({one_line(error)})"


TRAINING_CONFIG = "training_config.json"


def read_training_config(model_dir: str, **hub_options: str | None) -> dict[str, Any]:
    """The arguments a model, in a directory or on the hub, was trained with; empty where there is no such record."""
    path = Path(model_dir) / TRAINING_CONFIG
    if not os.path.isdir(model_dir):
        unreachable = hub_problem(model_dir, hub_options.get("revision")) is not None
        try:
            path = Path(hf_hub_download(model_dir, TRAINING_CONFIG, local_files_only=unreachable, **hub_options))
        except (OSError, ValueError):  # no such file there, or no such model: loading the model will say which
            return {}
    if not path.is_file():
        return {}
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        arguments.keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a training config written by train_instruct_pix2pix.py ({one_line(error)}); copy the model"
            " again, or delete the file to sample without it"
        ) from error
    return arguments


def encode_prompts(pipeline: StableDiffusionInstructPix2PixPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """The text encoder's states (N, 77, d)."""

    encoder = pipeline.text_encoder
    return encoder(tokenize(pipeline, prompts).to(encoder.device))[0]


def encode_frames(pipeline: StableDiffusionInstructPix2PixPipeline, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The posterior's mode of uint8 RGB frames (H, W, 3): unscaled latents (N, 4, h, w)."""
    pixels = pipeline.image_processor.preprocess([Image.fromarray(image) for image in images])
    return pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mode()


def decode_latents(pipeline: StableDiffusionInstructPix2PixPipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures of unscaled latents: float32 RGB (N, H, W, 3) in grey levels, not clipped to 0..255."""
    decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample
    if not decoded.isfinite().all():
        raise UserError("the model's output is not finite: predict with --mixed_precision no, or bf16")
    return ((decoded.float() + 1) * 127.5).permute(0, 2, 3, 1).cpu().numpy()


def to_picture(grey_levels: np.ndarray) -> np.ndarray:
    return grey_levels.clip(0, 255).round().astype(np.uint8)


def tokenize(pipeline: StableDiffusionInstructPix2PixPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (B, 77), as the pipeline makes them when it samples."""
    length = pipeline.tokenizer.model_max_length
    tokens = pipeline.tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids
