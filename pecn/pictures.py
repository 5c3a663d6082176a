"""Pictures of predicted frames and their scores, and the folder that an evaluation leaves behind."""

from __future__ import annotations

import json
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from data.cli import UserError, one_line
from data.files import make_folder, parts_replaced_together
from pecn.sampling import Prediction
from pecn.scores import PREDICTED, SHARP_ENOUGH, TOO_SHARP, LpipsMap, psnr_gain, score_prediction, summarize

PANEL_SIDE = 256  # pixels; smaller frames are enlarged by a whole factor until they reach it
GAP = 8
FONT = ImageFont.load_default(size=15)
LINE_HEIGHT = 20
CHARACTER_WIDTH = 8  # pixels that a line of text is given for each character; on average it takes 7
DIFFERENCE_SCALE = 64  # of 255: where the difference map reaches its brightest color
UNCERTAINTY_SCALE = 32  # the same for the uncertainty map

SAMPLES, METRICS_FILE = "samples", "metrics.json"

OVERVIEW_PER_GROUP = 3  # best, median and worst pairs
RANDOM_PAIRS = 20
HIGHEST_SHOWN = 60.0  # dB in the plot; the 100 of identical pictures would squeeze all others together


# Comparison of one prediction.


def comparison_picture(prediction: Prediction, scores: dict[str, Any], note: str) -> np.ndarray:
    """input | sample | expected | target | difference to the target | uncertainty, uint8 RGB, with the words below.

    `scores` is what `score_prediction` returns for it. Panels are left out where there is no target, and expected
    frame and uncertainty where only one prediction was made; they are enlarged by a whole factor to at least PANEL_SIDE
    pixels.
    """
    panels = _panels(prediction)
    height, width = prediction.input.shape[:2]
    factor = max(1, -(-PANEL_SIDE // min(height, width)))
    height, width = factor * height, factor * width
    total_width = len(panels) * (width + GAP) + GAP
    words = [prediction.edit_prompt, *describe_scores(scores), note]
    lines = [line for text in words for line in textwrap.wrap(text, total_width // CHARACTER_WIDTH)]
    top = LINE_HEIGHT + GAP
    text_top = top + height + GAP
    picture = Image.new("RGB", (total_width, text_top + len(lines) * LINE_HEIGHT + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for column, (title, frame, resampling) in enumerate(panels):
        left = GAP + column * (width + GAP)
        draw.text((left, GAP // 2), title, fill="black", font=FONT)
        picture.paste(Image.fromarray(frame).resize((width, height), resampling), (left, top))
    for row, line in enumerate(lines):
        draw.text((GAP, text_top + row * LINE_HEIGHT), line, fill="black", font=FONT)
    return np.asarray(picture)


def _panels(prediction: Prediction) -> list[tuple[str, np.ndarray, Image.Resampling]]:
    """(title, uint8 RGB picture, how it is enlarged) of each panel; a map's title says what its colors stand for."""
    smooth, exact = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    panels = [("input", prediction.input, smooth), ("sample", prediction.sample, smooth)]
    if prediction.expected is not None:
        panels.append(("expected", prediction.expected, smooth))
    if prediction.target is not None:
        error = np.abs(prediction.sample.astype(np.float32) - prediction.target).mean(axis=2)
        panels.append(("target", prediction.target, smooth))
        title = f"|sample - target|, 0 to {DIFFERENCE_SCALE}+"
        panels.append((title, color_map(error, "inferno", DIFFERENCE_SCALE), exact))
    if prediction.uncertainty is not None:
        title = f"standard deviation, 0 to {UNCERTAINTY_SCALE}+"
        panels.append((title, color_map(prediction.uncertainty, "viridis", UNCERTAINTY_SCALE), exact))
    return panels


def color_map(values: np.ndarray, colors: str, highest: float) -> np.ndarray:
    """An array's values in matplotlib's color map named `colors`, from 0 to `highest` and more; uint8 RGB."""
    return matplotlib.colormaps[colors](values / highest, bytes=True)[..., :3]


def describe_scores(scores: dict[str, Any]) -> list[str]:
    """One pair's scores, as `score_prediction` returns them: a line for each prediction, and one for the others."""
    if scores["psnr"] is None:
        return ["no target frame, not scored"]
    whole, moving = scores["psnr"], scores["moving"]
    if moving is None:
        return [f"Nothing moves. PSNR of the whole picture: sample {whole['sample']:.1f}, copy {whole['copy']:.1f} dB."]
    lines = [f"Where something moves ({moving['share']:.0%} of the picture):"]
    for way in (way for way in PREDICTED if way in whole):
        name = "a frame" if moving["is_frame"][way] else "not a frame"
        gain = describe_gain(moving["psnr"][way] - moving["psnr"]["copy"])
        lines.append(f"{way}: {name}, sharpness {moving['sharpness'][way]:.2f}, {_describe(way, moving)}, {gain}.")
    others = {"copy": "copy", "vae_ceiling": "VAE ceiling"}
    words = [f"{name}: {_describe(way, moving)}" for way, name in others.items() if way in whole]
    return [*lines, f"{'; '.join(words)}."]


def _describe(way: str, moving: dict[str, Any]) -> str:
    return f"SSIM {moving['ssim'][way]:.3f}, PSNR {moving['psnr'][way]:.1f} dB"


def describe_gain(gain: float) -> str:
    """A difference in PSNR (dB) to copying, in words."""
    return f"{abs(gain):.1f} dB {'better' if gain > 0 else 'worse'} than copying" if gain else "as good as copying"


# Overview of all predictions.


def choose_for_overview(gains: Sequence[float | None]) -> list[tuple[int, str]]:
    """The pairs to show, best first: (index, title) of the best, median and worst ones by their `psnr_gain`.

    Up to three times OVERVIEW_PER_GROUP pairs are all shown. Pairs of which there is none (no target, or nothing
    moves) are shown only where no pair has one.
    """
    ranked = sorted((index for index, gain in enumerate(gains) if gain is not None), key=lambda i: -gains[i])
    if not ranked:
        return [(index, "not scored") for index in range(min(len(gains), 3 * OVERVIEW_PER_GROUP))]
    count, group = len(ranked), OVERVIEW_PER_GROUP
    ranks = list(range(count))
    if count > 3 * group:
        middle = (count - group) // 2
        ranks = ranks[:group] + ranks[middle : middle + group] + ranks[-group:]
    titles = [f"rank {rank + 1} of {count}: {describe_gain(gains[ranked[rank]])}" for rank in ranks]
    return [(ranked[rank], title) for rank, title in zip(ranks, titles)]


def titled(picture: np.ndarray, title: str) -> np.ndarray:
    """A uint8 RGB picture below a dark bar with a title, shortened to its width."""
    title = textwrap.shorten(title, picture.shape[1] // CHARACTER_WIDTH, placeholder=" …")
    bar = Image.new("RGB", (picture.shape[1], LINE_HEIGHT + GAP), (60, 60, 60))
    ImageDraw.Draw(bar).text((GAP, GAP // 2), title, fill="white", font=FONT)
    return np.concatenate([np.asarray(bar), picture])


def names_in_strip(prediction: Prediction) -> list[str]:
    """Which frames `strip_of_frames` shows, from left to right."""
    return [name for name in ("input", "sample", "expected", "target") if getattr(prediction, name) is not None]


def strip_of_frames(prediction: Prediction) -> np.ndarray:
    """Input, sample, expected frame and target side by side, those that there are, twice their size; uint8 RGB."""
    strip = np.concatenate([getattr(prediction, name) for name in names_in_strip(prediction)], axis=1)
    strip = Image.fromarray(strip).resize((2 * strip.shape[1], 2 * strip.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(strip)


def sheet_of_strips(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Strips in two columns, row by row: uint8 RGB, white where one is narrower or missing."""
    height, width = (max(strip.shape[axis] for strip in strips) for axis in (0, 1))
    columns = min(2, len(strips))
    sheet = np.full((-(-len(strips) // columns), columns, height, width + GAP, 3), 255, np.uint8)
    for index, strip in enumerate(strips):
        sheet[divmod(index, columns)][: strip.shape[0], : strip.shape[1]] = strip
    return sheet.swapaxes(1, 2).reshape(-1, columns * (width + GAP), 3)


# Plot of all scores.


def save_scores_plot(path: Path, scores: Sequence[dict[str, Any]], note: str) -> None:
    """Plots each pair: PSNR gained over copying against sharpness, and the sample's PSNR against copying's.

    `scores` holds what `score_prediction` returned for each pair, and its `task`.
    """
    scored = [row for row in scores if row["psnr"] is not None]
    moving = [row["moving"] | {"task": row["task"]} for row in scored if row["moving"] is not None]
    figure = Figure(figsize=(18, 6), layout="constrained")
    plane, in_region, whole = figure.subplots(1, 3)
    _plot_gain_against_sharpness(plane, moving)
    _plot_against_copy(in_region, "Where something moves", moving)
    _plot_against_copy(whole, "Whole picture", scored)
    figure.suptitle(note, parse_math=False)
    figure.savefig(path)


def _plot_gain_against_sharpness(axes: Axes, moving: Sequence[dict[str, Any]]) -> None:
    """One dot a pair for the sample and one for the expected frame; the best place is to the right, at 1."""
    for way, color in (("expected", "tab:cyan"), ("sample", "tab:red")):  # not the colors of tasks beside it
        rows = [row for row in moving if way in row["psnr"]]
        if rows:
            gains = [row["psnr"][way] - row["psnr"]["copy"] for row in rows]
            axes.scatter(gains, [row["sharpness"][way] for row in rows], alpha=0.7, color=color, label=way)
    axes.plot(0, 1, "k*", markersize=14, label="copy")
    axes.axhspan(SHARP_ENOUGH, TOO_SHARP, color="0.92", zorder=0, label="as sharp as a frame")
    count = sum(row["is_frame"]["sample"] for row in moving)
    axes.set_title(f"Where something moves: the sample deserves\nthe name of a frame on {count} of {len(moving)} pairs")
    axes.set_xlabel("PSNR gained over copying (dB)")
    axes.set_ylabel("sharpness (gradients over the target's)")
    axes.legend()


def _plot_against_copy(axes: Axes, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The sample's PSNR against copying's; dots above the diagonal are better than copying."""
    num_better = sum(row["psnr"]["sample"] > row["psnr"]["copy"] for row in rows)
    axes.set_title(f"{title}: the sample is better than copying\non {num_better} of {len(rows)} pairs")
    axes.set_xlabel(f"PSNR of copying the input (dB, at most {HIGHEST_SHOWN:.0f})")
    axes.set_ylabel(f"PSNR of the sample (dB, at most {HIGHEST_SHOWN:.0f})")
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if not rows:
        return
    points = np.minimum([(row["psnr"]["copy"], row["psnr"]["sample"]) for row in rows], HIGHEST_SHOWN)
    for task in sorted({row["task"] for row in rows}):
        of_task = points[[row["task"] == task for row in rows]]
        axes.scatter(*of_task.T, alpha=0.8, label=task)
    ends = (points.min(), points.max())
    axes.plot(ends, ends, color="black", linestyle="--", label="as good as copying")
    axes.legend()


# The folder of results.


def save_results(
    predictions: Iterable[Prediction], output_dir: Path, note: str, lpips_map: LpipsMap | None = None
) -> dict[str, Any]:
    """Writes samples/<video id>/*.png, the other pictures and metrics.json; returns metrics.json's summary.

    overview.png shows the best, median and worst pairs, random_pairs.png the first ones: whoever chose the pairs drew
    them at random. The predictions may be a generator: few are kept beyond their scores. A sample's folder holds
    comparison.png, the frames input.png, prediction.png (the sample), expected.png and target.png as they are, and
    uncertainty.png with 16 bits: 256 times the standard deviation. A run that is interrupted, or that the disk stops
    (UserError), leaves former results whole.
    """
    records, strips, names = [], [], []
    try:
        with parts_replaced_together(output_dir, last=METRICS_FILE) as new:
            for prediction in predictions:
                scores = score_prediction(prediction, lpips_map)
                record = {name: getattr(prediction, name) for name in ("video_id", "task", "edit_prompt")}
                records.append(record | scores)
                comparison = comparison_picture(prediction, scores, note)
                save_prediction(new / SAMPLES / prediction.video_id, prediction, comparison)
                if len(strips) < RANDOM_PAIRS:
                    names = max(names, names_in_strip(prediction), key=len)  # a video may lack its target
                    strips.append(titled(strip_of_frames(prediction), prediction.edit_prompt))
            overview = []
            for index, title in choose_for_overview([psnr_gain(record) for record in records]):
                comparison = new / SAMPLES / records[index]["video_id"] / "comparison.png"
                overview.append(titled(np.asarray(Image.open(comparison)), title))
            save_picture(new / "overview.png", np.concatenate(overview))
            sheet = titled(sheet_of_strips(strips), f"from left to right: {', '.join(names)}")
            save_picture(new / "random_pairs.png", sheet)
            save_scores_plot(new / "scores.png", records, note)
            metrics = {"summary": summarize(records), "samples": records}
            text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
            (new / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the results to {output_dir}: {error.strerror or error}") from error
    return metrics["summary"]


def read_scores(output_dir: Path) -> list[dict[str, Any]]:
    """The scores of each pair that an earlier run left. Raises UserError where there are none."""
    try:
        return json.loads((output_dir / METRICS_FILE).read_bytes())["samples"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{output_dir} holds no scores of an earlier run ({METRICS_FILE}): {one_line(error)}"
        ) from error


def check_output_dir(output_dir: Path, results_file: str = METRICS_FILE) -> None:
    """Makes the folder for results. Raises UserError where it holds a folder `samples` that is not of such results."""
    make_folder(output_dir)
    if (output_dir / SAMPLES).exists() and not (output_dir / results_file).is_file():
        raise UserError(
            f"{output_dir}/{SAMPLES} is not from an earlier run like this (no {results_file} beside it) and would be"
            " replaced: move it, or choose another OUTPUT_DIR"
        )


def save_prediction(folder: Path, prediction: Prediction, comparison: np.ndarray) -> None:
    """Writes the pictures of one prediction, each under its name as `save_results` says."""
    folder.mkdir(parents=True, exist_ok=True)
    save_picture(folder / "comparison.png", comparison)
    names = {"input": "input", "sample": "prediction", "expected": "expected", "target": "target"}
    for field, name in names.items():
        if (picture := getattr(prediction, field)) is not None:
            save_picture(folder / f"{name}.png", picture)
    if prediction.uncertainty is not None:
        levels = np.clip(prediction.uncertainty * 256.0, 0, 65535)
        save_picture(folder / "uncertainty.png", levels.round().astype(np.uint16))


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes a PNG of a uint8 RGB picture (H, W, 3), or of uint16 gray levels (H, W)."""
    # Run lengths only: three times as fast as the default, and an eighth larger.
    Image.fromarray(picture).save(path, compress_level=1, compress_type=zlib.Z_RLE)
