"""What each training step gives, on its way to the trackers, and the check that it is finite."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from data.dataset import UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

HOW_TO_KEEP_FINITE = (
    "training stopped, earlier checkpoints are untouched. Lower LEARNING_RATE, or use bf16 or no mixed precision"
)


class StepLog:
    """Collects each step's figures and hands them to the trackers every few steps.

    Losses stay on the device until then, since reading one waits for all work before it. Raises UserError where
    a loss is not finite.
    """

    def __init__(self, accelerator: Accelerator, samples_per_step: int) -> None:
        self.accelerator, self.samples_per_step = accelerator, samples_per_step
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the samples per second what was not training."""
        self.started = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor | float | None, learning_rate: float) -> None:
        self.pending.append((step, loss, grad_norm, learning_rate))

    def flush(self) -> dict[str, float]:
        """Writes what was collected; returns the last step's figures."""
        import torch

        if not self.pending:
            return {}
        losses = self.accelerator.reduce(torch.stack([loss for _, loss, _, _ in self.pending]), "mean").tolist()
        # DeepSpeed gives a number or nothing in place of a tensor.
        grad_norms = [math.nan if norm is None else float(norm) for _, _, norm, _ in self.pending]
        samples_per_second = len(self.pending) * self.samples_per_step / (time.perf_counter() - self.started)
        figures: dict[str, float] = {}
        for (step, _, _, learning_rate), loss, grad_norm in zip(self.pending, losses, grad_norms):
            figures = {
                "train/loss": loss,
                "train/learning_rate": learning_rate,
                "train/grad_norm": grad_norm,
                "train/samples_per_second": samples_per_second,
            }
            self.accelerator.log(figures, step=step)
            if not math.isfinite(loss):
                raise UserError(f"the loss of step {step} is {loss}; {HOW_TO_KEEP_FINITE}")
        self.pending.clear()
        self.restart_clock()
        return figures


def check_weights(accelerator: Accelerator, unet: torch.nn.Module, step: int) -> None:
    """Raises UserError where a weight is not finite, so that only good weights are ever saved."""
    import torch

    finite = torch.stack([parameter.detach().isfinite().all() for parameter in unet.parameters()]).all()
    if accelerator.reduce(finite.float(), "sum").item() < accelerator.num_processes:
        raise UserError(f"after step {step} the weights are not finite; {HOW_TO_KEEP_FINITE}")
