"""Predictions of a few validation pairs while training goes on, and how TensorBoard or wandb shows them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.tensorboard import SummaryWriter

from data.cli import UserError, one_line, warn
from data.clips import FramePair
from pecn.diffusion import diffusion_loss
from pecn.encoded_frames import TrainingBatches
from pecn.model import Pipeline
from pecn.optimization import averaged_weights
from pecn.pictures import comparison_picture, frame_panels, panel_row, save_picture, short_prompt
from pecn.processes import on_main_process
from pecn.sampling import predict_pairs
from pecn.sampling_options import SamplingOptions
from pecn.scores import WAYS, score_prediction, summarize, verdict


def check_wandb() -> None:
    """Raises UserError where wandb would ask for a key when training begins."""
    import wandb  # optional

    try:
        is_ready = os.environ.get("WANDB_MODE", "online") != "online" or wandb.login(prompt=False)
    except Exception as error:
        raise UserError(f"wandb cannot log in ({one_line(error)}): set WANDB_MODE=offline, or mend it") from error
    if not is_ready:
        raise UserError("wandb has no key: run `wandb login`, or set WANDB_MODE=offline")


def start_trackers(accelerator: Accelerator, project: str, arguments: dict[str, Any], steps_done: int) -> None:
    """Starts the trackers, which go on after `steps_done` steps: what a killed run logged beyond them is dropped.

    wandb's gets the arguments too, which training_config.json has in any case.
    """
    name = Path(arguments["output_dir"]).name
    wandb = {"id": arguments["run_id"], "name": name, "resume": "allow"}
    accelerator.init_trackers(project, init_kwargs={"tensorboard": {"purge_step": steps_done + 1}, "wandb": wandb})
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration({name: str(value) for name, value in arguments.items()})


def log(accelerator: Accelerator, run: str, scalars: dict[str, float], step: int) -> None:
    """Logs scalars; in TensorBoard as a run of their own, so that one chart shows all runs' lines of one name."""
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.log({f"{name}/{run}": value for name, value in scalars.items()}, step=step)
            continue
        with SummaryWriter(f"{tracker.logging_dir}/{run}", purge_step=step) as writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)


@dataclass(frozen=True)
class Validation:
    """The pairs that are predicted while a model is trained, how, and where the pictures go."""

    pairs: Sequence[FramePair]
    batches: TrainingBatches  # of all held-out pairs: their loss, at noise and timesteps that are always the same
    noise_scheduler: Any
    guidance: float  # of the loss
    options: SamplingOptions
    folder: Path

    def run_or_warn(
        self, pipeline: Pipeline, ema: EMAModel | None, accelerator: Accelerator, step: int
    ) -> tuple[float, str]:
        """Validates with the UNet as trained so far; a failure is a warning, training goes on. Call it everywhere.

        Returns the held-out loss and the scores in words.
        """

        def attempt() -> tuple[float, str]:
            try:
                with averaged_weights(ema, pipeline.unet):
                    return self.run(pipeline, accelerator, step)
            except Exception as error:  # out of memory, a full disk, …: no reason to lose the steps
                warn(f"the validation of step {step} failed ({one_line(error)}); training is not affected")
                return math.inf, ""

        return on_main_process(attempt)

    @torch.no_grad()
    def run(self, pipeline: Pipeline, accelerator: Accelerator, step: int) -> tuple[float, str]:
        """Computes the held-out loss, predicts the pairs, saves the pictures and logs them with their scores."""
        pipeline.unet.eval()
        try:
            pipeline.to(accelerator.device)
            how = (self.batches.seed, self.batches.train_batch_size, self.options)
            with accelerator.autocast():
                passes = self.batches.load(0, pipeline, accelerator)
                losses = [diffusion_loss(pipeline.unet, self.noise_scheduler, batch, self.guidance) for batch in passes]
                predictions = list(predict_pairs(pipeline, self.pairs, *how))
        finally:
            for frozen in (pipeline.vae, pipeline.text_encoder):
                frozen.to("cpu")
            pipeline.unet.train()

        self.folder.mkdir(exist_ok=True)
        rows = [score_prediction(prediction) for prediction in predictions]
        for prediction, row in zip(predictions, rows):
            picture = comparison_picture(prediction, row, f"step {step}")
            save_picture(self.folder / f"step-{step:06}_{prediction.video_id}.png", picture)
        group = summarize(rows)["all"]
        for way in (way for way in WAYS if way in group):
            log(accelerator, way, {f"validation/{name}": of_way["value"] for name, of_way in group[way].items()}, step)
        rows_of_frames = {
            f"validation_{one.task}/{short_prompt(one)} ({one.video_id})": panel_row(frame_panels(one))[None]
            for one in predictions
        }
        for tracker in accelerator.trackers:
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(rows_of_frames, step=step, **form)
        loss = torch.stack(losses).mean().item()
        log(accelerator, "held_out", {"train/loss": loss}, step)  # in one chart with the training loss
        words = f"Held-out loss {loss:.4f}; {verdict(group)}."
        accelerator.print(f"step {step}: {words} Pictures: {self.folder}")
        return loss, words
