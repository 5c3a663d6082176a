"""The tokenizer of the demo's base model."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import TASK_TEMPLATES, plain_template
from data.prompts import build_prompt
from demo.pretraining.tokenizer import build_tokenizer
from pecn.model import tokenize, warn_of_cuts

TOKENIZER = build_tokenizer()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_can_be_read_back_from_its_tokens(text):
    for word in ("<|startoftext|>", "<|endoftext|>", "</w>"):
        text = text.replace(word, "")
    ids = TOKENIZER(text).input_ids
    assert ids[0] == TOKENIZER.bos_token_id and ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.unk_token_id not in ids[1:-1]
    decoded = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    normalized = TOKENIZER.backend_tokenizer.normalizer.normalize_str(text)  # CLIP's own rule: lower case, normal form
    assert re.sub(r"\s", "", decoded) == re.sub(r"\s", "", normalized)


def test_words_of_a_prompt_in_another_order_or_another_percentage_are_other_tokens():
    prompts = [
        build_prompt(f"pushing a cup from {one} to {other}", progress, horizon)
        for one, other in (("left", "right"), ("right", "left"))
        for progress in (None, 50, 60)
        for horizon in (None, *range(1, 11))
    ]
    assert len({tuple(TOKENIZER(prompt).input_ids) for prompt in prompts}) == len(prompts)


def test_every_template_in_a_prompt_stays_far_below_77_tokens():
    labels = [
        plain_template(template).lower().replace("something", "a light blue piece of paper")
        for templates in TASK_TEMPLATES.values()
        for template in templates
    ]
    lengths = {label: len(TOKENIZER(build_prompt(label, 60, 10)).input_ids) for label in labels}
    assert max(lengths.values()) <= 66, max(lengths, key=lengths.get)


@pytest.mark.parametrize(("progress", "horizon"), [(None, None), (60, None), (None, 5), (60, 10)])
def test_of_a_long_prompt_the_caption_is_cut_and_not_what_follows(capsys, progress, horizon):
    pipeline = SimpleNamespace(tokenizer=TOKENIZER)
    prompts = [build_prompt(f"pushing a {'big ' * times}cup", progress, horizon) for times in (1, 90)]
    tokens = tokenize(pipeline, prompts)
    assert tokens.shape == (2, 77) and tokens[1, -1] == TOKENIZER.eos_token_id
    short, cut = (TOKENIZER.decode(row, skip_special_tokens=True) for row in tokens)
    assert cut.startswith("generate a future frame of this action : pushing a big big ")
    told = short.partition(" cup")[2].strip()
    assert cut.endswith(told)
    warn_of_cuts(pipeline, prompts)
    assert "1 of 2 prompts have more than 77 tokens: the ends of their captions are cut" in capsys.readouterr().err
