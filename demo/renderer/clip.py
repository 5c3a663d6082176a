"""One rendered clip: what it shows, and its frames.

A clip is a pure function of (seed, split, index): more clips leave the earlier ones as they are, and different splits
share no random numbers.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from demo.renderer.actions import Director
from demo.renderer.hand import SKIN_TONES, draw_hands
from demo.renderer.scene import Actor, Light, Pose, draw_background, make_stage, render_frame
from demo.renderer.sprites import COLORS, KINDS, ObjectSpec, draw_object
from demo.renderer.templates import ACTIONS, Action

MIN_FRAMES, TYPICAL_FRAMES, MAX_FRAMES = 24, 43, 72  # SSv2's median is 41 to 47
OTHER_EVERY = 20  # one clip in this many is of a template that belongs to no task
TASKS = ("move_object", "drop_object", "cover_object")
SPLIT_CODES = {"train": 1, "val": 2, "pretrain": 3}  # first digit of the ids; "pretrain" is never written to disk
NAMES = {"paper": "piece of paper"}  # kinds whose name in a sentence differs


@dataclass(frozen=True)
class ClipPlan:
    """What a clip shows, decided before anything is drawn."""

    action: Action
    objects: list[ObjectSpec]
    num_frames: int
    annotation: dict


def clip_id(split: str, index: int) -> str:
    """The clip's id, a string of digits: the split's digit, then the index."""
    return f"{SPLIT_CODES[split]}{index:06d}"


def plan_clip(seed: int, split: str, index: int) -> ClipPlan:
    """Chooses template, objects, sentence and length of one clip. `split` is "train", "val" or "pretrain"."""
    if split not in SPLIT_CODES:
        raise ValueError(f"split must be one of {tuple(SPLIT_CODES)}, got {split!r}")
    rng = np.random.default_rng([seed, SPLIT_CODES[split], index, 0])
    if index % OTHER_EVERY == OTHER_EVERY - 1:
        choices, turn = ACTIONS["other"], index // OTHER_EVERY
    else:
        choices, turn = ACTIONS[TASKS[index % 3]], index // 3
    action = choices[turn % len(choices)]
    objects = _choose_objects(rng, action)
    phrases = [spec.phrase for spec in objects]
    words = iter(phrases)
    label = re.sub(r"\[something\]", lambda place: next(words), action.template, flags=re.IGNORECASE)
    num_frames = int(rng.triangular(MIN_FRAMES, TYPICAL_FRAMES, MAX_FRAMES + 1))
    annotation = {
        "id": clip_id(split, index),
        "label": label.lower(),
        "template": action.template,
        "placeholders": phrases,
    }
    return ClipPlan(action, objects, num_frames, annotation)


def _choose_objects(rng: np.random.Generator, action: Action) -> list[ObjectSpec]:
    """One object per place of the template, of different kinds and colors, each with the words for it."""
    objects: list[ObjectSpec] = []
    taken: list[str] = []
    for place, kinds in enumerate(action.kinds):
        kind_names = [k for k in kinds if k not in [o.kind_name for o in objects]]
        kind_name = str(rng.choice(kind_names))
        colors = [c for c in KINDS[kind_name].colors if c not in taken] or KINDS[kind_name].colors
        color_name = str(rng.choice(colors))
        taken.append(color_name)
        size = rng.uniform(1.0, 1.2) if place == 1 else rng.uniform(0.95, 1.2)
        if kind_name in ("cloth", "towel", "scarf"):
            size = rng.uniform(1.12, 1.25)
        elif place == 0 and len(action.kinds) == 2 and action.kinds[1][0] in ("bowl", "cloth"):
            size = rng.uniform(0.85, 0.95)  # what goes into or under something has to be smaller than it
        noun = NAMES.get(kind_name, kind_name)
        words = f"{color_name} {noun}" if rng.random() < 0.7 else noun
        if rng.random() < 0.5:
            words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        objects.append(
            ObjectSpec(kind_name, _vary_color(rng, COLORS[color_name]), float(size), int(rng.integers(2**31)), words)
        )
    return objects


def _vary_color(rng: np.random.Generator, color: tuple[int, int, int]) -> tuple[int, int, int]:
    """A shade near the named color (RGB, 0..255), which its name still fits."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in color))
    hue += rng.uniform(-0.012, 0.012)
    saturation = min(saturation * rng.uniform(0.85, 1.1), 1.0)
    value = min(value * rng.uniform(0.88, 1.1), 1.0)
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def render_clip(seed: int, split: str, index: int) -> tuple[dict, Iterator[np.ndarray]]:
    """One clip before compression.

    Returns its annotation entry (id, label, template, placeholders) and an iterator over its frames, uint8
    RGB of shape (240, 320, 3). `split` is "train", "val" or "pretrain"; different splits share no random
    numbers.
    """
    plan = plan_clip(seed, split, index)
    return plan.annotation, _render(plan, np.random.default_rng([seed, SPLIT_CODES[split], index, 1]))


def _render(plan: ClipPlan, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Sets the stage, draws the sprites, and yields the frames one by one."""
    elevation = rng.uniform(0.5, 0.72)
    slant = rng.uniform(0.25, 0.6) * (1 if rng.random() < 0.5 else -1)
    light = Light(-np.sign(slant) * rng.uniform(0.5, 0.9), slant, rng.uniform(-0.12, 0.25), rng.uniform(0.3, 0.5))
    skin = SKIN_TONES[rng.integers(len(SKIN_TONES))]
    sleeve = _vary_color(rng, list(COLORS.values())[rng.integers(len(COLORS))])
    sleeve_start, mirrored = rng.uniform(104, 150), bool(rng.random() < 0.5)
    openness = (rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.15))
    hands = draw_hands(skin, sleeve, sleeve_start, openness, mirrored, light.direction_x)
    director = Director(rng, plan.objects, hands, light, elevation)
    table_back, falls_right = rng.uniform(30, 84), bool(rng.random() < 0.5)
    if plan.action.needs_table_side:
        table_back = rng.uniform(36, 70)
        director.table_side = rng.uniform(192, 216) if falls_right else rng.uniform(104, 128)
    elif rng.random() < 0.25:
        table_back = -20.0
    background = draw_background(rng, table_back, director.table_side, falls_right)
    stage = make_stage(rng, plan.num_frames, background, light)
    if not plan.action.needs_table_side:
        stage.add_props(_clutter(rng, plan, director, table_back))
    actors = plan.action.choreograph(director)
    for frame_index in range(plan.num_frames):
        yield render_frame(stage, actors, frame_index, frame_index / plan.num_frames)


def _clutter(rng: np.random.Generator, plan: ClipPlan, director: Director, table_back: float) -> list[Actor]:
    """Up to two things at the back of the table, of kinds that the sentence does not name."""
    named = {spec.kind_name for spec in plan.objects}
    kinds = [k for k in ("bottle", "book", "box", "jar", "can", "candle", "bowl", "cup") if k not in named]
    props = []
    for side in rng.permutation([-1, 1])[: rng.integers(0, 3)]:
        kind_name = str(rng.choice(kinds))
        color = _vary_color(rng, COLORS[str(rng.choice(KINDS[kind_name].colors))])
        spec = ObjectSpec(kind_name, color, float(rng.uniform(0.85, 1.05)), int(rng.integers(2**31)), kind_name)
        x, y = 160 + side * rng.uniform(95, 150), rng.uniform(max(table_back + 24, 70), 118)
        sprite = draw_object(spec, director.elevation, director.light.direction_x)
        props.append(Actor(sprite, lambda u, x=x, y=y: Pose(x, y)))
    return props
