"""Checkpoints and the trained pipeline: saved whole or not at all.

A checkpoint is the folder `<output_dir>/checkpoint-<step>`: it gets this name when all of it is written.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import HfApi
from peft.utils import get_peft_model_state_dict

from data.cli import UserError, one_line
from data.files import partial_path, parts_replaced, whole_or_absent, write_json
from pecn import lora
from pecn.model import PIPELINE_INDEX, TRAINING_CONFIG, Pipeline, load_pipeline, read_training_config

HOW_TO_RESUME = "RESUME=latest (--resume_from_checkpoint latest)"


# Saving.


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, config: dict[str, Any], total_limit: int | None = None
) -> Path:
    """Saves all that resuming needs as `checkpoint-<step>`, whole or not at all; call it on every process.

    The newest `total_limit` checkpoints are kept. Raises UserError where it cannot be saved.
    """
    final, is_main = output_dir / f"checkpoint-{step}", accelerator.is_main_process
    with (
        failure_in_one_line(str(final), output_dir),
        whole_or_absent(final) if is_main else contextlib.nullcontext(partial_path(final)) as partial,
    ):
        accelerator.wait_for_everyone()  # the main process has removed what an earlier run left unfinished
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if is_main:
            write_json(partial / TRAINING_CONFIG, config)
    if is_main and total_limit:
        for surplus in checkpoint_steps(output_dir)[:-total_limit]:
            shutil.rmtree(output_dir / f"checkpoint-{surplus}", ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def save_pipeline(pipeline: Pipeline, output_dir: Path, config: dict[str, Any]) -> None:
    """Puts the whole pipeline and its training config into the output directory, beside the checkpoints.

    Where its UNet has an adapter, an ordinary UNet that the adapter is part of is saved, and the adapter beside it, as
    a pipeline's `load_lora_weights` loads it, without the first convolution.
    """
    with (
        failure_in_one_line(f"the pipeline in {output_dir}", output_dir),
        parts_replaced(output_dir, last=PIPELINE_INDEX) as folder,
    ):
        trained = pipeline.unet
        if hasattr(trained, "peft_config"):
            Pipeline.save_lora_weights(folder, get_peft_model_state_dict(trained))
            pipeline.unet = lora.merged(trained)
        pipeline.save_pretrained(folder, safe_serialization=True)
        pipeline.unet = trained
        write_json(folder / TRAINING_CONFIG, config)


def create_hub_repository(name: str, token: str | None) -> str:
    """Makes the private repository to upload to, or finds it; returns its full name. Raises UserError if it cannot."""
    try:
        return HfApi(token=token).create_repo(name, private=True, exist_ok=True).repo_id
    except Exception as error:
        raise UserError(
            f"cannot upload to {name}: {one_line(error)}; log in with `hf auth login`, or leave --push_to_hub out"
        ) from error


def upload(output_dir: Path, repository: str, token: str | None) -> None:
    """Uploads the trained pipeline and its training config, and nothing else: no video's frames."""
    try:
        load_pipeline(output_dir).push_to_hub(repository, token=token, private=True)
        HfApi(token=token).upload_file(
            path_or_fileobj=output_dir / TRAINING_CONFIG, path_in_repo=TRAINING_CONFIG, repo_id=repository
        )
    except Exception as error:
        raise UserError(f"the trained pipeline is in {output_dir}, but its upload failed: {one_line(error)}") from error


@contextlib.contextmanager
def failure_in_one_line(what: str, output_dir: Path) -> Iterator[None]:
    """Turns whatever saving raises, which differs from library to library, into a UserError."""
    try:
        yield
    except Exception as error:
        free, steps = shutil.disk_usage(output_dir).free / 1e6, checkpoint_steps(output_dir)
        go_on = f"go on from checkpoint-{steps[-1]} with {HOW_TO_RESUME}" if steps else "start again"
        raise UserError(
            f"{what} cannot be saved: {one_line(error)} ({free:,.0f} MB are free there); fix the cause and {go_on}"
        ) from error


def training_config(args: argparse.Namespace, **derived: Any) -> dict[str, Any]:
    """What `training_config.json` records: all arguments but the token, derived figures, library versions."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["hub_token"]
    libraries = (torch, diffusers, transformers, accelerate, datasets)
    versions = {library.__name__: library.__version__ for library in libraries}
    return {"arguments": arguments | derived, "library_versions": versions | {"python": platform.python_version()}}


# Finding and loading.


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    names = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def find_checkpoint(output_dir: Path, asked: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    None means to start afresh: nothing was asked for, or 'latest' where there is none yet. Raises UserError where
    the one asked for is absent, or where the run would mix with an earlier one or overwrite its model.
    """
    steps, checkpoint = checkpoint_steps(output_dir), None
    if asked == "latest":
        checkpoint = output_dir / f"checkpoint-{steps[-1]}" if steps else None
    elif asked:
        checkpoint = Path(asked)
        if not checkpoint.is_dir() or not checkpoint.name.removeprefix("checkpoint-").isdigit():
            raise UserError(f"there is no checkpoint {checkpoint}; name a checkpoint-<step> directory, or 'latest'")
    if checkpoint and checkpoint.parent.resolve() == output_dir.resolve():
        return checkpoint
    if steps:
        raise UserError(
            f"{output_dir} has checkpoints of an earlier run (checkpoint-{steps[-1]}): go on with it (RESUME=latest),"
            " delete them, or choose another OUTPUT_DIR"
        )
    if (output_dir / PIPELINE_INDEX).is_file():
        raise UserError(f"{output_dir} holds a model, which training would overwrite: choose another OUTPUT_DIR")
    return checkpoint


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, arguments: Mapping[str, Any], frozen: Sequence[str]
) -> int:
    """Loads a checkpoint; returns the number of steps done. Call it on every process.

    Raises UserError where one of the `frozen` arguments was another when it was saved, or it cannot be loaded.
    """
    saved = read_training_config(checkpoint)
    changed = [
        f"{name} was {saved.get(name)}, is {arguments[name]}" for name in frozen if saved.get(name) != arguments[name]
    ]
    if saved and changed:
        raise UserError(
            f"{checkpoint} belongs to other settings ({'; '.join(changed)}); resume with the same ones, or train into"
            " another OUTPUT_DIR"
        )
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # whatever a damaged or missing file makes the libraries raise
        raise UserError(
            f"{checkpoint} cannot be loaded ({one_line(error)}); delete it to go on from the one before:"
            f" rm -r {shlex.quote(str(checkpoint))}"
        ) from error
    accelerator.step = 0  # of its passes, which may be divided otherwise now; checkpoints lie between steps
    return int(checkpoint.name.removeprefix("checkpoint-"))
