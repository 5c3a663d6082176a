"""Checkpoints and the trained pipeline: saved whole or not at all.

A checkpoint is the folder `<output_dir>/checkpoint-<step>`: it gets this name when all of it is written.
"""

import argparse
import contextlib
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from huggingface_hub import HfApi, ModelCardData
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from data.cli import UserError, one_line
from data.clips import example_prompt, frame_choice
from data.files import partial_path, parts_replaced, whole_or_absent, write_file, write_json
from pecn import lora, model
from pecn.diffusion import add_image_channels, changed_scheduler
from pecn.model import PIPELINE_INDEX, TRAINING_CONFIG, Pipeline
from pecn.optimization import averaged_weights, trained_weights

MODEL_CARD = "README.md"
HOW_TO_RESUME = "RESUME=latest (--resume_from_checkpoint latest)"


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


def save_pipeline(
    pipeline: Pipeline, output_dir: Path, config: dict[str, Any], adapter: dict[str, torch.Tensor] | None = None
) -> None:
    """Puts the whole pipeline and its training config into the output directory, beside the checkpoints.

    An adapter, which is merged into the pipeline's UNet, is saved too, as a pipeline's `load_lora_weights` loads it.
    """
    with (
        failure_in_one_line(f"the pipeline in {output_dir}", output_dir),
        parts_replaced(output_dir, last=PIPELINE_INDEX) as folder,
    ):
        if adapter:
            Pipeline.save_lora_weights(folder, adapter)
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_json(folder / TRAINING_CONFIG, config)


def save_trained(
    args: argparse.Namespace, pipeline: Pipeline, ema: EMAModel | None, folder: Path, config: dict[str, Any]
) -> None:
    """Saves the pipeline as trained so far; with LoRA the base model in float32, with the adapter merged into it."""
    with averaged_weights(ema, pipeline.unet):
        adapter = None
        if args.use_lora:
            adapter, trained = get_peft_model_state_dict(pipeline.unet), lora.trained_state(pipeline.unet)
            pipeline = load_base_model(args)
            lora.merge(pipeline.unet, trained)
        save_pipeline(pipeline, folder, config, adapter)


def save_model_card(output_dir: Path, arguments: dict[str, Any], scores: str) -> None:
    """Writes README.md: what the model was made of, how it is prompted, and what its last validation gave."""
    base, choice = arguments["pretrained_model_name_or_path"], frame_choice(arguments)
    data = ModelCardData(base_model=None if Path(base).exists() else base, library_name="diffusers")
    settings = "\n".join(f"- {name}: {value}" for name, value in sorted(arguments.items()))
    text = f"""---
{data.to_yaml()}
---
# {output_dir.name}

Predicts a future frame of a video ({choice}, {arguments["resolution"]} pixels). Fine-tuned from `{base}` with PECN.
{scores}

```python
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained("{output_dir.name}")
pipeline({arguments["example_prompt"]!r}, image=frame).images[0]
```

{settings}
"""
    write_file(output_dir / MODEL_CARD, text)


def create_hub_repository(name: str, token: str | None, private: bool) -> str:
    """Makes the repository to upload to, or finds it; returns its full name. Raises UserError if it cannot."""
    try:
        return HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:
        advice = "log in with `hf auth login`, or leave --push_to_hub out"
        raise UserError(f"cannot upload to {name}: {one_line(error)}; {advice}") from error


def upload(output_dir: Path, repository: str, token: str | None) -> None:
    """Uploads the trained pipeline, its training config and its card, and nothing else: no video's frames."""
    try:
        model.load_pipeline(output_dir).push_to_hub(repository, token=token)
        for name in (TRAINING_CONFIG, MODEL_CARD):
            HfApi(token=token).upload_file(path_or_fileobj=output_dir / name, path_in_repo=name, repo_id=repository)
    except Exception as error:
        raise UserError(f"the trained pipeline is in {output_dir}, but its upload failed: {one_line(error)}") from error


@contextlib.contextmanager
def failure_in_one_line(what: str, output_dir: Path) -> Iterator[None]:
    """Turns whatever saving raises, which differs from library to library, into a UserError."""
    try:
        yield
    except Exception as error:
        free, steps = f"{shutil.disk_usage(output_dir).free / 1e6:,.0f} MB are free there", checkpoint_steps(output_dir)
        advice = f"go on from checkpoint-{steps[-1]} with {HOW_TO_RESUME}" if steps else "start again"
        raise UserError(f"{what} cannot be saved: {one_line(error)} ({free}); fix the cause and {advice}") from error


def training_config(args: argparse.Namespace, **derived: Any) -> dict[str, Any]:
    """What `training_config.json` records: all arguments but the token, derived figures, versions, the git commit."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["hub_token"]
    arguments["example_prompt"] = example_prompt(arguments)
    libraries = ("torch", "diffusers", "transformers", "accelerate", "datasets")
    versions = {library: version(library) for library in libraries}
    versions["python"] = platform.python_version()
    command = "git describe --always --dirty --abbrev=40 --exclude='*'"  # prints nothing where this is no checkout
    commit = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    return {"arguments": arguments | derived, "library_versions": versions, "git_commit": commit.strip() or None}


def load_base_model(args: argparse.Namespace) -> Pipeline:
    """The model to start from, its UNet ready for training, with the input frame's channels where it lacks them."""
    pipeline = model.load_pipeline(model.find_model(args.pretrained_model_name_or_path))
    pipeline.scheduler = changed_scheduler(pipeline.scheduler, args.prediction_type, args.rescale_betas_zero_snr)
    lacks_channels = pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    if lacks_channels:
        add_image_channels(pipeline.unet)
    if args.use_lora:
        lora.add_adapter(pipeline.unet, args.lora_rank, args.seed, train_conv_in=lacks_channels)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    pipeline.unet.train()
    return pipeline


def load_from_checkpoint(folder: Path) -> Pipeline:
    """The pipeline that a run would have saved at a checkpoint."""
    args = argparse.Namespace(**model.read_training_config(folder))
    pipeline = load_base_model(args)
    state = load_file(folder / model.CHECKPOINT_WEIGHTS)
    state = {name.removeprefix("module."): weight for name, weight in state.items()}
    pipeline.unet.load_state_dict(state, strict=not args.use_lora)  # whose checkpoints have the trained weights alone
    if args.use_ema:
        average = torch.load(folder / "custom_checkpoint_1.pkl", map_location="cpu", weights_only=True)["shadow_params"]
        for weight, averaged in zip(trained_weights(pipeline.unet), average):
            weight.data.copy_(averaged)
    if args.use_lora:
        lora.merge(pipeline.unet, {})
    return pipeline


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
        advice = "go on with it (RESUME=latest), delete them, or choose another OUTPUT_DIR"
        raise UserError(f"{output_dir} has checkpoints of an earlier run (checkpoint-{steps[-1]}): {advice}")
    if (output_dir / PIPELINE_INDEX).is_file():
        raise UserError(f"{output_dir} holds a model, which training would overwrite: choose another OUTPUT_DIR")
    return checkpoint


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, arguments: Mapping[str, Any], frozen: Sequence[str]
) -> int:
    """Loads a checkpoint; returns the number of steps done. Call it on every process.

    Raises UserError where one of the `frozen` arguments was another when it was saved, or it cannot be loaded.
    """
    saved = model.read_training_config(checkpoint)
    changed = [name for name in frozen if saved.get(name) != arguments[name]]
    if saved and changed:
        differences = "; ".join(f"{name} was {saved.get(name)}, is {arguments[name]}" for name in changed)
        advice = "resume with the same ones, or train into another OUTPUT_DIR"
        raise UserError(f"{checkpoint} belongs to other settings ({differences}); {advice}")
    try:
        accelerator.load_state(str(checkpoint), strict=not arguments["use_lora"])  # LoRA's has few of the weights
    except Exception as error:  # whatever a damaged or missing file makes the libraries raise
        advice = f"delete it to go on from the one before: rm -r {shlex.quote(str(checkpoint))}"
        raise UserError(f"{checkpoint} cannot be loaded ({one_line(error)}); {advice}") from error
    accelerator.step = 0  # of its passes, which may be divided otherwise now; checkpoints lie between steps
    return int(checkpoint.name.removeprefix("checkpoint-"))
