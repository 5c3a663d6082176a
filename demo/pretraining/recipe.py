"""The whole recipe of the demo's base model: clips, VAE, text encoder, latents, UNet. `demo.make_model` runs it."""

from __future__ import annotations

import argparse
import functools

import torch
from torch.utils.tensorboard import SummaryWriter

from demo.pretraining.clips import RESOLUTIONS, rendered_clips
from demo.pretraining.text_encoder import train_text_encoder
from demo.pretraining.unet import train_unet
from demo.pretraining.vae import encoded_clips, latent_scaling_factor, train_vae
from demo.pretraining.validation import held_out_pairs, vae_ceiling, validate
from pecn.model import Pipeline, digest, module_bytes


def pretrain(pipeline: Pipeline, args: argparse.Namespace) -> None:
    """Trains the pipeline's models in place, as demo.make_model's options say; a stage of 0 steps is skipped.

    Steps whose results are in the work folder are not repeated.
    """
    models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
    args.start_weights = digest(part for model in models for part in module_bytes(model))  # for the checkpoints
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    frames = [rendered_clips(args.work_dir, args.num_clips, side) for side in RESOLUTIONS]
    pairs = held_out_pairs(frames[0])
    with SummaryWriter(str(args.work_dir / "logs")) as logs:
        if args.vae_train_steps:
            train_vae(pipeline.vae, frames, args, logs)
        print(f"VAE, the best that a prediction could be: {vae_ceiling(pipeline, pairs)}", flush=True)
        if args.text_train_steps:
            share = train_text_encoder(pipeline, args, logs)
            print(f"text encoder: {share:.0%} of a batch read correctly", flush=True)
        latents = [encoded_clips(pipeline.vae, of_size, args) for of_size in frames]
        if args.vae_train_steps or not args.pretrained_model_name_or_path:  # a given UNet knows the factor of its VAE
            pipeline.vae.register_to_config(scaling_factor=latent_scaling_factor(latents))
        train_unet(pipeline, latents, args, logs, functools.partial(validate, pipeline, pairs, args, logs))
