"""Predictions of a few validation pairs while training goes on, and how TensorBoard or wandb shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.utils.tensorboard import SummaryWriter

from data.cli import one_line, warn
from data.clips import FramePair
from pecn.model import Pipeline
from pecn.optimization import averaged_weights
from pecn.pictures import comparison_picture, frame_panels, panel_row, save_picture, short_prompt
from pecn.sampling import predict_pairs
from pecn.sampling_options import SamplingOptions
from pecn.scores import WAYS, score_prediction, summarize, verdict


def start_trackers(accelerator: Accelerator, project: str, arguments: dict[str, Any]) -> None:
    """Starts the trackers; wandb's gets the arguments too, which training_config.json has in any case."""
    accelerator.init_trackers(project)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration({name: str(value) for name, value in arguments.items()})


def log_scores(accelerator: Accelerator, group: dict[str, Any], step: int) -> None:
    """Logs a group of `summarize`; in TensorBoard each way is a run of its own, so that one chart shows all of them."""
    for tracker in accelerator.trackers:
        for way in (way for way in WAYS if way in group):
            scores = {f"validation/{metric}": figures["value"] for metric, figures in group[way].items()}
            if tracker.name != "tensorboard":
                tracker.log({f"{name}/{way}": value for name, value in scores.items()}, step=step)
                continue
            with SummaryWriter(f"{tracker.logging_dir}/{way}") as writer:
                for name, value in scores.items():
                    writer.add_scalar(name, value, step)


@dataclass(frozen=True)
class Validation:
    """The pairs that are predicted while a model is trained, how, and where the pictures go."""

    pairs: Sequence[FramePair]
    seed: int
    batch_size: int
    options: SamplingOptions
    folder: Path

    def run_or_warn(self, pipeline: Pipeline, ema: EMAModel | None, accelerator: Accelerator, step: int) -> None:
        """Validates with the UNet as trained so far; a failure is a warning, training goes on. Call it everywhere."""
        if accelerator.is_main_process and self.pairs:
            try:
                with averaged_weights(ema, pipeline.unet):
                    self.run(pipeline, accelerator, step)
            except Exception as error:  # out of memory, a full disk, …: no reason to lose the steps
                warn(f"the validation of step {step} failed ({one_line(error)}); training is not affected")
        accelerator.wait_for_everyone()

    def run(self, pipeline: Pipeline, accelerator: Accelerator, step: int) -> None:
        """Predicts the pairs, saves the pictures and logs them with their scores."""
        pipeline.unet.eval()
        try:
            pipeline.to(accelerator.device)
            with accelerator.autocast():
                predictions = list(predict_pairs(pipeline, self.pairs, self.seed, self.batch_size, self.options, False))
        finally:
            for frozen in (pipeline.vae, pipeline.text_encoder):
                frozen.to("cpu")
            pipeline.unet.train()

        self.folder.mkdir(exist_ok=True)
        rows = [score_prediction(prediction) | {"task": prediction.task} for prediction in predictions]
        for prediction, row in zip(predictions, rows):
            picture = comparison_picture(prediction, row, f"step {step}")
            save_picture(self.folder / f"step-{step:06}_{prediction.video_id}.png", picture)
        group = summarize(rows)["all"]
        log_scores(accelerator, group, step)
        rows_of_frames = {
            f"validation_{one.task}/{short_prompt(one)} ({one.video_id})": panel_row(frame_panels(one))[None]
            for one in predictions
        }
        for tracker in accelerator.trackers:
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(rows_of_frames, step=step, **form)
        accelerator.print(f"step {step}: {verdict(group)}; pictures in {self.folder}")
