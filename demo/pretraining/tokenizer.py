"""The tokenizer of the demo's base model: CLIP's kind of byte pairs, learned from the demo's own sentences."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data.dataset import TASK_TEMPLATES
from data.prompts import build_prompt
from demo.renderer.sprites import COLORS, KINDS

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77  # CLIP's context length, which every Stable Diffusion pipeline expects
VOCABULARY_SIZE = 1024


def tokenizer_corpus() -> list[str]:
    """The text whose words get tokens of their own: templates, names of rendered objects, and the prompt."""
    templates = [template for templates in TASK_TEMPLATES.values() for template in templates]
    objects = [f"{color} {kind}" for kind in KINDS for color in COLORS]
    prompts = [build_prompt("", 10 * tenth, horizon=tenth) for tenth in range(11)]
    # The prompt's fixed words stand in every prompt, so they weigh as much as all templates together.
    return templates + objects + prompts * (len(templates) // len(prompts))


def train_byte_level_bpe(corpus: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary (token -> id) and merges in CLIP's layout, the same for the same corpus.

    First all 256 bytes, then all 256 bytes as the end of a word (so no text has an unknown token), then the
    merges, then the start and end tokens.
    """
    suffix = "</w>"
    byte_symbols = list(bytes_to_unicode().values())
    base_symbols = byte_symbols + [symbol + suffix for symbol in byte_symbols]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    clip = CLIPTokenizer().backend_tokenizer  # CLIP's own rule for lower case, white space and words
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        special_tokens=base_symbols,  # fixes their ids, whose order would otherwise be a hash's
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = base_symbols + [left + right for left, right in merges] + [START_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of at most `VOCABULARY_SIZE` tokens. It pads with its end token."""
    vocabulary, merges = train_byte_level_bpe(tokenizer_corpus())
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
