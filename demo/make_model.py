"""Make the demo's base model: a small InstructPix2Pix that any machine can fine-tune.

    python -m demo.make_model

writes `demo/base_model`, which stock `StableDiffusionInstructPix2PixPipeline.from_pretrained` loads: a UNet with
8 input channels, a VAE, a CLIP text encoder with its tokenizer, and a scheduler, together under 10 million
parameters. It stands in for `timbrooks/instruct-pix2pix` on the clips of `demo.make_clips`. `demo.pretraining.training` trains
it on rendered clips: the VAE, the text encoder, then the UNet. `--initial_model DIR` goes on from a model written
before. With 0 steps of all three the weights come from `--seed` alone and take seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.dataset import TASK_TEMPLATES
from data.layout import UserError, run_command
from data.sthv2_dataset_hf import build_prompt

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

DEFAULT_OUTPUT_DIR = Path("demo/base_model")
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
DEFAULT_SEED = 0
DEFAULT_NUM_CLIPS = 3000
DEFAULT_VAE_STEPS, DEFAULT_TEXT_STEPS, DEFAULT_UNET_STEPS = 2500, 300, 7000
MAX_TOKENS = 77  # CLIP's context length, which every Stable Diffusion pipeline expects
VOCABULARY_SIZE = 1024
TEXT_WIDTH = 128


def tokenizer_corpus() -> list[str]:
    """The text whose words get tokens of their own: templates, names of rendered objects, and the prompt."""
    from demo.renderer.sprites import COLORS, KINDS

    templates = [template for templates in TASK_TEMPLATES.values() for template in templates]
    objects = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    progress = [build_prompt("", percent) for percent in range(0, 101, 10)]
    # The prompt's fixed words stand in every prompt, so they weigh as much as all templates together.
    return templates + objects + progress * (len(templates) // len(progress))


def train_byte_level_bpe(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary (token -> id) and merges in CLIP's layout, the same for the same corpus.

    First all 256 bytes, then all 256 bytes as the end of a word (so no text has an unknown token), then the
    merges, then the start and end tokens.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    suffix = "</w>"
    byte_symbols = list(bytes_to_unicode().values())
    base_symbols = byte_symbols + [symbol + suffix for symbol in byte_symbols]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    clip = CLIPTokenizer().backend_tokenizer  # CLIP's own rule for lower case, white space and words
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        special_tokens=base_symbols,  # fixes their ids, whose order would otherwise be a hash's
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = base_symbols + [left + right for left, right in merges] + [START_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of at most `VOCABULARY_SIZE` tokens. It pads with its end token."""
    from transformers import CLIPTokenizer

    vocabulary, merges = train_byte_level_bpe(tokenizer_corpus())
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of 2 layers, `TEXT_WIDTH` wide."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    # At CLIP's own 0.02 words and their order are lost beside what the layers add to these embeddings.
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.embeddings.position_embedding):
            embedding.weight *= 0.3 / embedding.weight.std()
    return model


def build_vae() -> AutoencoderKL:
    """A VAE from RGB in [-1, 1] of side S to 4 channels of side S / 4, untrained but for `start_as_resizing`.

    Stable Diffusion's divides by 8. Of rendered frames the best linear map to 4 channels keeps 28 dB at 8 and 31 at 4.
    """
    from diffusers import AutoencoderKL

    from demo.pretraining.vae_start import start_as_resizing

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # the start needs it: more groups lose the picture's mean color
        mid_block_add_attention=False,  # convolutions alone: what is learned on crops holds for any size
        sample_size=128,
        scaling_factor=1.0,
    )
    start_as_resizing(vae)
    return vae


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet for latents of side 24 or 32: 4 noisy channels, then the input frame's 4.

    Beside cross-attention, which this UNet has at its two coarsest levels alone, a summary of the sentence is added to
    the timestep's embedding and so reaches every layer.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        in_channels=8,
        out_channels=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96, 144),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def build_pipeline(seed: int) -> StableDiffusionInstructPix2PixPipeline:
    """The untrained base model (float32, on the CPU); the same `seed` gives the same weights."""
    import torch
    from diffusers import EulerAncestralDiscreteScheduler

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder, vae, unet = build_text_encoder(tokenizer), build_vae(), build_unet()
    scheduler = EulerAncestralDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",  # its loss also counts where all is noise, and there the motion is decided
        timestep_spacing="linspace",
    )
    return assemble_pipeline(vae, text_encoder, tokenizer, unet, scheduler)


def assemble_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: EulerAncestralDiscreteScheduler,
) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline of these parts, ready to predict, without a safety checker."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def count_parameters(pipeline: StableDiffusionInstructPix2PixPipeline) -> int:
    """The number of weights of UNet, VAE and text encoder together."""
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def check_output_dir(output_dir: Path) -> None:
    """Refuses a path that holds anything but a model written before (which a new one replaces)."""
    if output_dir.is_dir() and (not any(output_dir.iterdir()) or (output_dir / "model_index.json").is_file()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise UserError(f"{output_dir} exists and is no model directory; name another one with --output_dir")


def save_pipeline(pipeline: StableDiffusionInstructPix2PixPipeline, output_dir: Path) -> None:
    """Writes the pipeline (safetensors, float16) so that `output_dir` is whole or untouched.

    float16 halves the size and is exact enough; `from_pretrained` gives float32, as the configurations say.
    `vocab.json` and `merges.txt` lie beside `tokenizer.json` for versions of transformers that read those.
    """
    from safetensors.torch import load_file, save_file

    output_dir = output_dir.absolute()
    check_output_dir(output_dir)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    replaced = output_dir.with_name(f".{output_dir.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    pipeline.save_pretrained(partial)
    for weights_path in sorted(partial.rglob("*.safetensors")):
        weights = {name: tensor.half() for name, tensor in load_file(weights_path).items()}
        save_file(weights, weights_path, metadata={"format": "pt"})
    for config_path in (partial / "model_index.json", *partial.glob("*/config.json")):
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # the directory it was loaded from says nothing to anyone else
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pipeline.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))
    if output_dir.exists():
        os.replace(output_dir, replaced)
    os.replace(partial, output_dir)
    shutil.rmtree(replaced, ignore_errors=True)


def parse_args() -> argparse.Namespace:
    """The command line; see `--help`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--output_dir", type=Path, default=DEFAULT_OUTPUT_DIR, help="default: %(default)s")
    parser.add_argument("--initial_model", type=Path, help="a model directory to start from instead of random weights")
    parser.add_argument(
        "--vae_train_steps", type=int, default=DEFAULT_VAE_STEPS, help="0 leaves the VAE as it is; default: %(default)s"
    )
    parser.add_argument(
        "--text_train_steps",
        type=int,
        default=DEFAULT_TEXT_STEPS,
        help="0 leaves the text encoder as it is; default: %(default)s",
    )
    parser.add_argument(
        "--unet_train_steps",
        type=int,
        default=DEFAULT_UNET_STEPS,
        help="0 leaves the UNet as it is; default: %(default)s",
    )
    parser.add_argument(
        "--num_clips",
        type=int,
        default=DEFAULT_NUM_CLIPS,
        help="how many clips to render for training; default: %(default)s",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="of the weights and of training, not of the clips; default: %(default)s",
    )
    args = parser.parse_args()
    if min(args.vae_train_steps, args.text_train_steps, args.unet_train_steps) < 0 or args.num_clips < 1:
        parser.error("steps must be 0 or more, and --num_clips 1 or more")
    if args.initial_model and args.text_train_steps and not args.unet_train_steps:
        parser.error("a UNet has to be trained after its text encoder; add --text_train_steps 0 or more UNet steps")
    return args


def load_initial_model(directory: Path) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline in `directory`, float32, on the CPU."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline.from_pretrained(directory, local_files_only=True)


def main() -> None:
    """Builds or loads the base model, trains it, and saves it."""
    args = parse_args()
    check_output_dir(args.output_dir)
    initial = args.initial_model
    if initial and not (initial / "model_index.json").is_file():
        raise UserError(f"--initial_model {initial} is not a model directory: it has no model_index.json")

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = load_initial_model(initial) if initial else build_pipeline(args.seed)
    steps = (args.vae_train_steps, args.text_train_steps, args.unet_train_steps)
    if any(steps):
        from demo.pretraining.training import pretrain

        try:
            pretrain(pipeline, *steps, args.num_clips, args.seed)
        except KeyboardInterrupt:
            print("interrupted: nothing was written; the same command starts afresh", file=sys.stderr)
            sys.exit(130)
        pipeline.to("cpu")
    save_pipeline(pipeline, args.output_dir)
    print(f"wrote {args.output_dir}: {count_parameters(pipeline) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    run_command(main)
