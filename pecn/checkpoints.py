"""Checkpoints and the trained pipeline: saved whole or not at all, verified before they are used.

A checkpoint is the folder `<output_dir>/checkpoint-<step>`. Its manifest.json holds the checksum of every other file:
what a crash, a full disk or a careless deletion has damaged is noticed before it is loaded, and the newest complete
checkpoint is used instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionInstructPix2PixPipeline

from data.cli import UserError, one_line, warn
from data.files import partial_path, parts_replaced_together, whole_or_absent, write_file
from pecn import lora
from pecn.model import PIPELINE_INDEX, TRAINING_CONFIG

MANIFEST = "manifest.json"
HOW_TO_RESUME = "RESUME=latest (--resume_from_checkpoint latest)"


# Saving.


class CheckpointTimes:
    """When a checkpoint is due: every `every_steps` steps, or, where that is None, so that saving costs under 2%.

    Then the time since the last one is at least SPACING times what saving takes: the estimate for `num_weights`
    weights at first, then what it took the last time. `clock` tells seconds.
    """

    SPACING = 50
    BYTES_PER_WEIGHT, BYTES_PER_SECOND = 12, 400e6  # float32 and AdamW's two moments; a plain disk

    def __init__(
        self, every_steps: int | None, num_weights: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.every_steps, self.clock = every_steps, clock
        self.saving_takes = num_weights * self.BYTES_PER_WEIGHT / self.BYTES_PER_SECOND
        self.last_saved = clock()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step (counted from 1)."""
        if self.every_steps:
            return step % self.every_steps == 0
        return self.clock() - self.last_saved >= self.SPACING * self.saving_takes

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measures what is done in it: a checkpoint being saved."""
        started = self.clock()
        yield
        self.last_saved = self.clock()
        self.saving_takes = self.last_saved - started


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, config: dict[str, Any], total_limit: int | None = None
) -> Path:
    """Saves all that resuming needs as `checkpoint-<step>`, whole or not at all; call it on every process.

    Of the checkpoints up to this one the newest `total_limit` are kept. Raises UserError where it cannot be saved.
    """
    final = output_dir / f"checkpoint-{step}"
    is_main = accelerator.is_main_process
    with (
        failure_in_one_line(str(final), output_dir),
        whole_or_absent(final) if is_main else contextlib.nullcontext(partial_path(final)) as partial,
    ):
        accelerator.wait_for_everyone()  # the main process has removed what an earlier run left unfinished
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if is_main:
            write_json(partial / TRAINING_CONFIG, config)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            write_json(partial / MANIFEST, {path.relative_to(partial).as_posix(): checksum(path) for path in files})
    if is_main and total_limit:
        # Later ones are of a run that got further: damaged ones that were passed over, and must not count here.
        for surplus in [other for other in checkpoint_steps(output_dir) if other <= step][:-total_limit]:
            shutil.rmtree(output_dir / f"checkpoint-{surplus}", ignore_errors=True)
    accelerator.wait_for_everyone()
    return final


def save_pipeline(pipeline: StableDiffusionInstructPix2PixPipeline, output_dir: Path, config: dict[str, Any]) -> None:
    """Puts the whole pipeline and its training config into the output directory, beside the checkpoints.

    Where its UNet has an adapter, an ordinary UNet that the adapter is part of takes its place, and is saved; and the
    adapter alone beside it.
    """
    with (
        failure_in_one_line(f"the pipeline in {output_dir}", output_dir),
        parts_replaced_together(output_dir, last=PIPELINE_INDEX) as folder,
    ):
        if lora.has_adapter(pipeline.unet):
            lora.save_adapter(pipeline.unet, folder)
            pipeline.unet = lora.merged(pipeline.unet)
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_json(folder / TRAINING_CONFIG, config)


def write_json(path: Path, content: Any) -> None:
    write_file(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def failure_in_one_line(what: str, output_dir: Path) -> Iterator[None]:
    """Turns whatever saving raises, which differs from library to library, into a UserError."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(output_dir).free / 1e6
        newest_first = (f"checkpoint-{step}" for step in reversed(checkpoint_steps(output_dir)))
        complete = next((name for name in newest_first if not find_damage(output_dir / name)), None)
        go_on = f"go on from {complete} with {HOW_TO_RESUME}" if complete else "start again"
        raise UserError(
            f"{what} cannot be saved: {one_line(error)} ({free:,.0f} MB are free there); fix the cause and {go_on}"
        ) from error


# Finding.


def checksum(path: Path) -> int:
    """CRC-32 of a file. The damage to be found is accidental: no cryptographic hash, which takes four times as long."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(16 * 2**20):
            crc = zlib.crc32(block, crc)
    return crc


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence that begins with its name; None if it is complete."""
    try:
        for name, expected in json.loads((checkpoint / MANIFEST).read_bytes()).items():
            if checksum(checkpoint / name) != expected:
                return f"is damaged: the content of {name} has changed"
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).name}"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be read: {one_line(error)}"
    return None


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The steps that have a checkpoint, damaged ones included, ascending."""
    names = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def newest_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint without damage, with a warning about each newer one; None where there are none at all.

    Raises UserError where there are checkpoints, but none is complete.
    """
    steps = checkpoint_steps(output_dir)
    for step in reversed(steps):
        checkpoint = output_dir / f"checkpoint-{step}"
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        warn(f"{checkpoint} {damage}; it is passed over")
    if steps:
        raise UserError(
            f"no checkpoint in {output_dir} is complete: delete them to start from the base model, or put back what is"
            " missing"
        )
    return None


def find_checkpoint(output_dir: Path, asked: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; a damaged one that 'latest' passes over gets a warning.

    None means to start afresh: nothing was asked for, or 'latest' where there is none yet. Raises UserError where
    the one asked for is absent or damaged, or where the run would mix with an earlier one or overwrite its model.
    """
    checkpoint = None
    if asked == "latest":
        checkpoint = newest_complete_checkpoint(output_dir)
    elif asked:
        checkpoint = Path(asked)
        if not checkpoint.is_dir() or not checkpoint.name.removeprefix("checkpoint-").isdigit():
            raise UserError(f"there is no checkpoint {checkpoint}; name a checkpoint-<step> directory, or 'latest'")
        if damage := find_damage(checkpoint):
            raise UserError(f"{checkpoint} {damage}; {HOW_TO_RESUME} goes on from the newest complete checkpoint")
    if checkpoint and checkpoint.parent.resolve() == output_dir.resolve():
        return checkpoint
    if steps := checkpoint_steps(output_dir):
        raise UserError(
            f"{output_dir} holds checkpoints of an earlier run (checkpoint-{steps[-1]}): go on with it"
            " (RESUME=latest), delete them, or choose another OUTPUT_DIR"
        )
    if (output_dir / PIPELINE_INDEX).is_file():
        raise UserError(f"{output_dir} holds a model, which training would overwrite: choose another OUTPUT_DIR")
    return checkpoint


def check_on_other_machines(accelerator: Accelerator, checkpoint: Path) -> None:
    """Ends all processes where a machine lacks the checkpoint that the main process has found, or part of it.

    The first process of each machine raises a UserError that names it.
    """
    problems = []
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        damage = find_damage(checkpoint) if checkpoint.is_dir() else "is missing"
        problems = [f"on {platform.node()} {checkpoint} {damage}"] if damage else []
    problems = gather_object(problems)
    if problems:
        error = UserError(f"{'; '.join(problems)}: copy it there from the first machine, or use a shared directory")
        raise error if accelerator.is_local_main_process else SystemExit(1)


def load_checkpoint(
    accelerator: Accelerator, checkpoint: Path, arguments: Mapping[str, Any], frozen: Sequence[str]
) -> int:
    """Loads a checkpoint; returns the number of steps done. Call it on every process.

    Raises UserError where one of the `frozen` arguments was another when it was saved, or a machine lacks it.
    """
    check_on_other_machines(accelerator, checkpoint)
    saved = json.loads((checkpoint / TRAINING_CONFIG).read_text(encoding="utf-8"))["arguments"]
    changed = [
        f"{name} was {saved.get(name)}, is {arguments[name]}" for name in frozen if saved.get(name) != arguments[name]
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to other settings ({'; '.join(changed)}); resume with the same ones, or train into"
            " another OUTPUT_DIR"
        )
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # of its passes, which may be divided otherwise now; checkpoints lie between steps
    return int(checkpoint.name.removeprefix("checkpoint-"))


def training_config(args: argparse.Namespace, **derived: Any) -> dict[str, Any]:
    """What `training_config.json` records: all arguments but the token, derived figures, library versions."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["hub_token"]
    libraries = (torch, diffusers, transformers, accelerate, datasets)
    versions = {library.__name__: library.__version__ for library in libraries}
    return {"arguments": arguments | derived, "library_versions": versions | {"python": platform.python_version()}}
