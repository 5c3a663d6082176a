"""Uploading a trained pipeline to the Hugging Face hub."""

from __future__ import annotations

import argparse

from huggingface_hub import HfApi

from data.layout import UserError


def create_hub_repository(args: argparse.Namespace) -> str:
    """Makes the repository to upload to, or finds it; returns its full name. Done before training, to fail early."""

    name = args.hub_model_id or args.output_dir.name
    try:
        return HfApi(token=args.hub_token).create_repo(name, exist_ok=True).repo_id
    except (OSError, ValueError) as error:  # the library's own errors are of these kinds
        raise UserError(
            f"cannot upload to {name}: {first_words(error)}; log in with `hf auth login`, or leave --push_to_hub out"
        ) from error


def upload(args: argparse.Namespace, repository: str) -> None:
    """Uploads the trained pipeline, without checkpoints and logs."""

    ignored = ["checkpoint-*/**", f"{args.logging_dir}/**", ".*", "train.log"]
    api = HfApi(token=args.hub_token)
    try:
        api.upload_folder(repo_id=repository, folder_path=args.output_dir, ignore_patterns=ignored)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the trained pipeline is in {args.output_dir}, but its upload failed: {first_words(error)}; upload it"
            f" with: hf upload {repository} {args.output_dir} --exclude 'checkpoint-*/**'"
        ) from error


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
