"""Pre-training of the demo's text encoder: it learns to tell the sentences apart before the UNet reads them.

Trained from scratch together with the UNet, the encoder went blank: as long as the UNet could not use the text, the
text was noise to it, and the encoder learned to let nothing through (after 7,000 steps a swapped left and right
changed no prediction). Stable Diffusion's encoder comes trained as well, and stays frozen while the UNet learns.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInstructPix2PixPipeline
from tqdm import tqdm

from data.sthv2_dataset_hf import build_prompt, derive_seed
from demo.pretraining.clips import CLIP_SEED, NUM_HELD_OUT_CLIPS
from demo.renderer.clip import plan_clip
from demo.renderer.templates import ACTIONS
from pecn.model import tokenize

TEXT_BATCH_SIZE, TEXT_LEARNING_RATE = 32, 1e-3
TEMPLATES = sorted({action.template for actions in ACTIONS.values() for action in actions})
NOT_TOLD = 10  # the class of a sentence without progress; 0 to 9 are tenths


def sentence_batch(step: int, seed: int, num_clips: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Prompts of the training clips, and what each says, int64 (B,): its template and its progress.

    The template's place in TEMPLATES; tenths, 0 to 9, or NOT_TOLD, as in half of the prompts. A pure function.
    """
    rng = np.random.default_rng(derive_seed(seed, "sentences", step))
    prompts, templates, progresses = [], [], []
    for clip_index in NUM_HELD_OUT_CLIPS + rng.integers(0, num_clips, TEXT_BATCH_SIZE):
        annotation = plan_clip(CLIP_SEED, "pretrain", int(clip_index)).annotation
        progress = int(rng.integers(NOT_TOLD)) if rng.random() < 0.5 else None
        prompts.append(build_prompt(annotation["label"], None if progress is None else 10 * progress))
        templates.append(TEMPLATES.index(annotation["template"]))
        progresses.append(NOT_TOLD if progress is None else progress)
    return prompts, torch.tensor(templates), torch.tensor(progresses)


def train_text_encoder(
    pipeline: StableDiffusionInstructPix2PixPipeline, steps: int, num_clips: int, seed: int, device: torch.device
) -> float:
    """Trains the text encoder in place (AdamW) and returns the share of the last batch that is classified correctly.

    A linear layer has to name template and progress from every state from the end token to the 77th: those hold no word
    of their own, so most of what the UNet attends to then says what the sentence means.
    """
    encoder, num_classes = pipeline.text_encoder.to(device).train(), [len(TEMPLATES), NOT_TOLD + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "sentence reader"))
        reader = torch.nn.Linear(encoder.config.hidden_size, sum(num_classes)).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=TEXT_LEARNING_RATE)
    right = 0.0
    with tqdm(range(steps), desc="training the text encoder", unit="step") as bar:
        for step in bar:
            prompts, templates, progresses = sentence_batch(step, seed, num_clips)
            tokens = tokenize(pipeline, prompts)
            row, position = torch.nonzero(tokens == pipeline.tokenizer.eos_token_id, as_tuple=True)  # it also pads
            states = encoder(tokens.to(device))[0][row.to(device), position.to(device)]
            template_scores, progress_scores = reader(states).split(num_classes, dim=1)
            template, progress = templates[row].to(device), progresses[row].to(device)
            loss = F.cross_entropy(template_scores, template) + F.cross_entropy(progress_scores, progress)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            both = (template_scores.argmax(1) == template) & (progress_scores.argmax(1) == progress)
            right = both.float().mean().item()
            bar.set_postfix_str(f"{right:.0%} correct", refresh=False)
    encoder.eval()
    return right
