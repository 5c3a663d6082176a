"""Render clips of a hand acting on household objects, in Something-Something V2's layout.

    python -m demo.make_clips

writes `data/demo/annotations/train.json`, `validation.json` and `videos/<id>.webm`: VP9, 320 x 240, 12 frames
per second, 24 to 72 frames. Then `python -m data.dataset --data_dir data/demo` filters them like SSv2.

A clip is a pure function of (seed, split, index): more clips leave the earlier ones as they are, and training
and validation clips share no random numbers. The same command writes the same bytes on the same machine and
library versions (one encoder thread; no date and no random identifier in the container).

The action fills the whole clip, so a long clip is a slow action, and how far along it is decides what happens
next: hands move along minimum-jerk curves, and what is let go falls with constant acceleration, bounces and
comes to rest. This motion profile is the same for every split and seed; its figures and the reasons for them
are documented at the top of `demo/renderer/actions.py`.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.layout import UserError, make_folder, run_command, video_path, write_annotations
from demo.renderer.actions import Director
from demo.renderer.hand import SKIN_TONES, draw_hands
from demo.renderer.scene import (
    FPS,
    FRAME_HEIGHT,
    FRAME_WIDTH,
    Actor,
    Light,
    Pose,
    draw_background,
    make_stage,
    render_frame,
)
from demo.renderer.sprites import COLORS, KINDS, ObjectSpec, draw_object
from demo.renderer.templates import ACTIONS, Action

RENDERER_VERSION = 1  # raised whenever the pictures change, so that old and new clips never mix in one folder
MIN_FRAMES, TYPICAL_FRAMES, MAX_FRAMES = 24, 43, 72  # SSv2's median is 41 to 47
OTHER_EVERY = 20  # one clip in this many is of a template that belongs to no task
TASKS = ("move_object", "drop_object", "cover_object")
SPLIT_CODES = {"train": 1, "val": 2, "pretrain": 3}  # first digit of the ids; "pretrain" is never written to disk
ANNOTATION_NAMES = {"train": "train.json", "val": "validation.json"}
SETTINGS_NAME = "rendered_clips.json"
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
    label = action.template
    for phrase in phrases:
        label = (
            label.replace("[Something]", phrase, 1)
            if "[Something]" in label
            else label.replace("[something]", phrase, 1)
        )
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


def write_video(path: Path, frames: Iterator[np.ndarray]) -> None:
    """Encodes uint8 RGB frames as a VP9 .webm; the file appears under its name only when it is whole.

    PyAV is used because OpenCV's VideoWriter cannot set the encoder's speed (it takes 100 ms a frame).
    """
    import av  # here, because only the worker processes need it

    partial = path.with_name(f".{path.name}.partial")
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "26", "lag-in-frames": "0", "flags": "+bitexact"}
    with av.open(str(partial), "w", format="webm", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = FRAME_WIDTH, FRAME_HEIGHT, "yuv420p"
        stream.codec_context.bit_rate, stream.codec_context.thread_count = 0, 1
        for frame in frames:
            planes = cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420)  # quicker than the encoder's own conversion
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))
    os.replace(partial, path)


def _prepare_worker() -> None:
    """A worker uses one core, leaves Ctrl-C to its parent, and ends when the parent is gone."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _render_to_file(output_dir: Path, seed: int, split: str, index: int) -> int:
    """Renders one clip to its place and returns its number of frames. Runs in a worker process."""
    annotation, frames = render_clip(seed, split, index)
    num_frames = plan_clip(seed, split, index).num_frames
    write_video(video_path(output_dir, annotation["id"]), frames)
    return num_frames


def make_clips(output_dir: Path, num_train_clips: int, num_val_clips: int, seed: int, num_workers: int) -> None:
    """Renders the clips that are missing in `output_dir`, then writes the annotations of all asked for."""
    _claim_folder(output_dir, seed)
    wanted = [
        (split, index)
        for split, count in (("train", num_train_clips), ("val", num_val_clips))
        for index in range(count)
    ]
    missing = [(split, index) for split, index in wanted if not video_path(output_dir, clip_id(split, index)).is_file()]
    with tqdm(total=len(missing), desc="rendering", unit="clip", disable=not missing) as bar:
        frames = 0
        for num_frames in _render_all(output_dir, seed, missing, num_workers):
            frames += num_frames
            bar.set_postfix(frames=frames, refresh=False)
            bar.update()
    for split, count in (("train", num_train_clips), ("val", num_val_clips)):
        entries = [plan_clip(seed, split, index).annotation for index in range(count)]
        write_annotations(output_dir / "annotations" / ANNOTATION_NAMES[split], entries)
    print(
        f"{len(missing)} clips rendered, {len(wanted) - len(missing)} were there already: {output_dir} now "
        f"lists {num_train_clips} training and {num_val_clips} validation clips.\n"
        f"Next: python -m data.dataset --data_dir {output_dir}"
    )


def _render_all(output_dir: Path, seed: int, clips: list[tuple[str, int]], num_workers: int) -> Iterator[int]:
    """Renders clips in worker processes and yields each one's number of frames as it is finished."""
    if num_workers == 1 or len(clips) <= 1:
        for split, index in clips:
            yield _render_to_file(output_dir, seed, split, index)
        return
    pool = ProcessPoolExecutor(min(num_workers, len(clips)), get_context("spawn"), _prepare_worker)
    try:
        jobs = [pool.submit(_render_to_file, output_dir, seed, split, index) for split, index in clips]
        for job in as_completed(jobs):
            yield job.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a rendering process was killed (out of memory?); run the same command again, perhaps with "
            "--num_workers 1: finished clips are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _claim_folder(output_dir: Path, seed: int) -> None:
    """Makes sure that `output_dir` is new or holds clips of this seed and renderer; removes partial files."""
    settings_path = output_dir / SETTINGS_NAME
    settings = {"seed": seed, "renderer_version": RENDERER_VERSION}
    way_out = "choose another --output_dir or delete this one"
    if settings_path.is_file():
        try:
            found = json.loads(settings_path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            raise UserError(f"{output_dir} holds clips of other settings ({found}; asked for {settings}): {way_out}")
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists and was not made by this command: {way_out}")
    for folder in ("annotations", "videos"):
        make_folder(output_dir / folder)
    partial = settings_path.with_name(f".{SETTINGS_NAME}.partial")
    partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    os.replace(partial, settings_path)
    for stale in (output_dir / "videos").glob(".*.partial"):
        stale.unlink()


def parse_arguments() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.make_clips",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo"), help="data directory to make")
    parser.add_argument("--num_train_clips", type=int, default=240, help="number of training clips")
    parser.add_argument("--num_val_clips", type=int, default=60, help="number of validation clips")
    parser.add_argument("--seed", type=int, default=42, help="other seeds give other clips")
    parser.add_argument("--num_workers", type=int, default=cores, help="processes that render (default: one per core)")
    arguments = parser.parse_args()
    for name, least, most in (
        ("num_train_clips", 0, 999_999),
        ("num_val_clips", 0, 999_999),
        ("seed", 0, 2**63),
        ("num_workers", 1, 1024),
    ):
        if not least <= getattr(arguments, name) <= most:
            parser.error(f"--{name} must be {least} to {most}, got {getattr(arguments, name)}")
    return arguments


def main() -> None:
    """Runs the command."""
    arguments = parse_arguments()
    make_clips(
        arguments.output_dir, arguments.num_train_clips, arguments.num_val_clips, arguments.seed, arguments.num_workers
    )


if __name__ == "__main__":
    run_command(main)
