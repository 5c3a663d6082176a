"""Pre-training of the demo's text encoder: it learns to tell the sentences apart before the UNet reads them.

Trained together with the UNet, the encoder returned the same for every text: after 7,000 steps a swapped left and right
changed no prediction. Stable Diffusion's encoder is trained before the UNet too.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from data.clips import derive_seed
from data.prompts import build_prompt
from demo.pretraining.clips import CLIP_SEED, NUM_HELD_OUT_CLIPS
from demo.pretraining.stages import train_stage
from demo.renderer.clip import plan_clip
from demo.renderer.templates import ACTIONS
from pecn.model import Pipeline, tokenize

TEMPLATES = sorted({action.template for actions in ACTIONS.values() for action in actions})
MAX_HORIZON = 10  # frames between input and target
TOLD = 0.75  # share of the prompts that tell the progress, and of those that tell the horizon
# The number of classes of each property. Progress: tenths, 0 to 9, or 10 where it is not told; horizon: 1 to
# MAX_HORIZON, or 0 where it is not told.
NUM_CLASSES = {"template": len(TEMPLATES), "progress": 11, "horizon": MAX_HORIZON + 1}


def sentence_batch(step: int, seed: int, num_clips: int, batch_size: int) -> tuple[list[str], torch.Tensor]:
    """Prompts of training clips, and their classes (B, 3) of the properties in NUM_CLASSES. A pure function."""
    rng = np.random.default_rng(derive_seed(seed, "sentences", step))
    prompts, classes = [], []
    for clip_index in NUM_HELD_OUT_CLIPS + rng.integers(0, num_clips, batch_size):
        annotation = plan_clip(CLIP_SEED, "pretrain", int(clip_index)).annotation
        progress = int(rng.integers(10)) if rng.random() < TOLD else None
        horizon = int(rng.integers(1, MAX_HORIZON + 1)) if rng.random() < TOLD else None
        prompts.append(build_prompt(annotation["label"], None if progress is None else 10 * progress, horizon))
        classes.append((TEMPLATES.index(annotation["template"]), 10 if progress is None else progress, horizon or 0))
    return prompts, torch.tensor(classes)


def read_sentences(
    pipeline: Pipeline, reader: torch.nn.Linear, prompts: list[str], classes: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each property the reader's scores (S, number of classes), and the right classes (S,).

    It reads all states from the end token to the 77th: most of the states that the UNet attends to, none of them a
    word's own.
    """
    device, tokens = reader.weight.device, tokenize(pipeline, prompts)
    row, position = torch.nonzero(tokens == pipeline.tokenizer.eos_token_id, as_tuple=True)  # it also pads
    states = pipeline.text_encoder(tokens.to(device))[0][row.to(device), position.to(device)]
    scores = reader(states).split(list(NUM_CLASSES.values()), dim=1)
    return list(zip(scores, classes[row].to(device).T))


def train_text_encoder(pipeline: Pipeline, args: argparse.Namespace, logs: SummaryWriter) -> float:
    """Trains the text encoder in place: a linear layer has to tell template, progress and horizon from its states.

    Returns for which share of another batch all three are right.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(args.seed, "sentence reader"))
        reader = torch.nn.Linear(pipeline.text_encoder.config.hidden_size, sum(NUM_CLASSES.values()))
    reader.to(pipeline.text_encoder.device)

    def read_batch(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batch = sentence_batch(step, args.seed, args.num_clips, args.text_batch_size)
        return read_sentences(pipeline, reader, *batch)

    def loss_of_step(step: int) -> torch.Tensor:
        return sum(F.cross_entropy(scores, right) for scores, right in read_batch(step))

    models = torch.nn.ModuleList([pipeline.text_encoder, reader])
    train_stage("text", models, loss_of_step, args, logs, learning_rate=1e-3, weight_decay=1e-2, warmup_steps=20)
    with torch.no_grad():
        correct = [scores.argmax(dim=1) == right for scores, right in read_batch(args.text_train_steps)]
    return torch.stack(correct).all(dim=0).float().mean().item()
