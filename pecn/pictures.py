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
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from data.layout import UserError, make_folder, parts_replaced_together
from pecn.sampling import Prediction
from pecn.scores import psnr_gain, score_prediction, summarize

PANEL_SIDE = 256  # pixels; smaller frames are enlarged by a whole factor until they reach it
GAP = 8
FONT_SIZE = 15
LINE_HEIGHT = 20
MAX_PROMPT_LENGTH = 600  # characters shown
MAX_NOTE_LENGTH = 120  # the same for the note above the plot
DIFFERENCE_SCALE = 64  # gray levels at which the difference map reaches its brightest color
UNCERTAINTY_SCALE = 32  # the same for the uncertainty map
DIFFERENCE_COLORS, UNCERTAINTY_COLORS = "inferno", "viridis"  # both perceptually uniform

SAMPLES, METRICS_FILE = "samples", "metrics.json"

OVERVIEW_PER_GROUP = 3  # best, median and worst pairs
TITLE_COLORS = {"Best": (20, 95, 50), "Median": (60, 60, 60), "Worst": (140, 35, 30)}

BEYOND_PLOT = 60.0  # dB; hardly any error is left, so pairs up here must not squeeze the others together
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
TASK_MARKERS = ("o", "s", "D", "v", "P", "X", "*")


# Comparison of one prediction.


def comparison_picture(prediction: Prediction, note: str = "", scores: dict[str, Any] | None = None) -> np.ndarray:
    """input | prediction | target | difference to the target | uncertainty, uint8 RGB, with the words below.

    `scores` is what `score_prediction` returns for it, computed here if not given. The last panel is there only where
    there is an uncertainty. The panels are enlarged by a whole factor to at least PANEL_SIDE pixels; without a target
    the places of target and difference stay gray.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    panels = _panels(prediction)
    height, width = (
        side * max(1, -(-PANEL_SIDE // min(prediction.input.shape[:2]))) for side in prediction.input.shape[:2]
    )
    total_width = len(panels) * (width + GAP) + GAP
    prompt = prediction.edit_prompt
    if len(prompt) > MAX_PROMPT_LENGTH:
        prompt = prompt[:MAX_PROMPT_LENGTH] + " …"
    words = [prompt, *describe_scores(score_prediction(prediction) if scores is None else scores), note]
    lines = [line for text in words for line in wrap_text(text, font, total_width - 2 * GAP)]
    top = LINE_HEIGHT + GAP
    text_top = top + height + GAP
    picture = Image.new("RGB", (total_width, text_top + len(lines) * LINE_HEIGHT + GAP), "white")
    draw = ImageDraw.Draw(picture)
    draw.fontmode = "L"
    for column, (title, frame, resampling) in enumerate(panels):
        left = GAP + column * (width + GAP)
        draw.text((left, GAP // 2), title, fill="black", font=font)
        if frame is None:
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=(235, 235, 235))
            draw.text((left + width // 2, top + height // 2), "no target frame", "black", font, anchor="mm")
            continue
        picture.paste(Image.fromarray(frame).resize((width, height), resampling), (left, top))
    for row, line in enumerate(lines):
        draw.text((GAP, text_top + row * LINE_HEIGHT), line, fill="black", font=font)
    return np.asarray(picture)


def _panels(prediction: Prediction) -> list[tuple[str, np.ndarray | None, Image.Resampling]]:
    """(title, uint8 RGB picture or None, how it is enlarged) of each panel; maps say the gray levels at their end."""
    target, uncertainty = prediction.target, prediction.uncertainty
    frames = {"input": prediction.input, "prediction": prediction.prediction, "target": target}
    panels = [(title, frame, Image.Resampling.BICUBIC) for title, frame in frames.items()]
    difference = None
    if target is not None:
        error = np.abs(prediction.prediction.astype(np.float32) - target).mean(axis=2)
        difference = color_map(error, DIFFERENCE_COLORS, DIFFERENCE_SCALE)
    title = f"|prediction - target|, 0 to {DIFFERENCE_SCALE}+"
    panels.append((title, difference, Image.Resampling.NEAREST))
    if uncertainty is not None:
        colors = color_map(uncertainty, UNCERTAINTY_COLORS, UNCERTAINTY_SCALE)
        panels.append((f"standard deviation, 0 to {UNCERTAINTY_SCALE}+", colors, Image.Resampling.NEAREST))
    return panels


def color_map(values: np.ndarray, colors: str, highest: float) -> np.ndarray:
    """Values of any shape in matplotlib's color map named `colors`, from 0 to `highest` and more; uint8 RGB."""
    table = (matplotlib.colormaps[colors](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return table[(np.clip(values / highest, 0, 1) * 255).round().astype(np.uint8)]


def describe_scores(scores: dict[str, Any]) -> list[str]:
    """One pair's scores, as `score_prediction` returns them, in a line for the picture and one for what moves."""
    if scores["psnr"] is None:
        return ["no target frame, not scored"]
    ssim = scores["ssim"]
    lines = [
        f"Whole picture: {_describe_psnr(scores['psnr'])}.   SSIM {ssim['prediction']:.3f}"
        f" (copying {ssim['copy']:.3f}, VAE ceiling {ssim['vae_ceiling']:.3f})."
    ]
    moving = scores["moving"]
    if moving is None:
        return [*lines, "Nothing moves."]
    return [*lines, f"Where something moves ({moving['share']:.0%} of the picture): {_describe_psnr(moving['psnr'])}."]


def _describe_psnr(psnr: dict[str, float]) -> str:
    gain = describe_gain(psnr["prediction"] - psnr["copy"])
    return f"PSNR {psnr['prediction']:.1f} dB, {gain} ({psnr['copy']:.1f}); VAE ceiling {psnr['vae_ceiling']:.1f}"


def describe_gain(gain: float) -> str:
    """A difference in PSNR (dB) to copying, in words."""
    return f"{abs(gain):.1f} dB {'better' if gain > 0 else 'worse'} than copying" if gain else "as good as copying"


def wrap_text(text: str, font: Any, width: int) -> list[str]:
    """Breaks a text into lines of about 0.9 of `width` pixels, judged by the average width of its characters."""
    text = " ".join(text.split())
    return textwrap.wrap(text, max(1, int(0.9 * width * len(text) / font.getlength(text)))) if text else []


# Overview of all predictions.


def choose_for_overview(gains: Sequence[float | None]) -> list[tuple[int, str]]:
    """The pairs to show, best first: (index, title) of the best, median and worst ones by their `psnr_gain`.

    Up to three times OVERVIEW_PER_GROUP pairs are all shown. Pairs without a target (None) are shown only where
    no pair has one.
    """
    ranked = sorted((index for index, gain in enumerate(gains) if gain is not None), key=lambda i: -gains[i])
    if not ranked:
        return [(index, "not scored") for index in range(min(len(gains), 3 * OVERVIEW_PER_GROUP))]
    count, group = len(ranked), OVERVIEW_PER_GROUP
    if count <= 3 * group:
        return [(i, f"{rank} of {count}: {describe_gain(gains[i])}") for rank, i in enumerate(ranked, 1)]
    middle = (count - group) // 2
    chosen = []
    for name, first in (("Best", 0), ("Median", middle), ("Worst", count - group)):
        for rank in range(first, first + group):
            gain = describe_gain(gains[ranked[rank]])
            chosen.append((ranked[rank], f"{name}: rank {rank + 1} of {count}, {gain}"))
    return chosen


def titled(picture: np.ndarray, title: str) -> np.ndarray:
    """A uint8 RGB picture below a colored bar with a title."""
    color = TITLE_COLORS.get(title.partition(":")[0], TITLE_COLORS["Median"])
    bar = Image.new("RGB", (picture.shape[1], LINE_HEIGHT + 8), color)
    draw = ImageDraw.Draw(bar)
    draw.text((GAP, 4), title, fill="white", font=ImageFont.load_default(size=FONT_SIZE + 2))
    return np.concatenate([np.asarray(bar), picture])


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) one below the other, white beside narrower ones."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded)


# Plot of all scores.


def save_scores_plot(path: Path, scores: Sequence[dict[str, Any]], note: str = "") -> None:
    """Plots each pair's prediction against copying, in PSNR, over the whole picture and where something moves.

    `scores` holds what `score_prediction` returned for each pair, and its `task`. Dots above the diagonal are
    predictions better than copying. Pairs of BEYOND_PLOT dB and more are drawn at the plot's edge.
    """
    tasks = sorted({row["task"] for row in scores})
    moving = [row["moving"] and row["moving"] | {"task": row["task"]} for row in scores]
    figure = Figure(figsize=(12, 7.2), dpi=100)
    legend: dict[str, Any] = {}
    for left, title, rows in ((0.065, "Whole picture", scores), (0.565, "Where something moves", moving)):
        axes = figure.add_axes((left, 0.17, 0.41, 0.41 * 12 / 7.2))
        rows = [row for row in rows if row is not None and row["psnr"] is not None]
        legend = _plot_against_copy(axes, title, rows, tasks) | legend
    if legend:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.005), "ncols": 4}
        words = figure.legend(legend.values(), legend.keys(), fontsize=12, frameon=False, **place)
        for text in words.get_texts():
            text.set_parse_math(False)
    shown = note if len(note) <= MAX_NOTE_LENGTH else "…" + note[-MAX_NOTE_LENGTH:]
    figure.text(0.5, 0.985, shown, fontsize=12, ha="center", va="top", parse_math=False)
    figure.savefig(path, metadata={"Software": None})


def _plot_against_copy(axes: Axes, title: str, rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Fills one panel; returns the legend's handles by label."""
    axes.set_title(title, fontsize=14)
    axes.set_xlabel("PSNR of copying the input (dB)", fontsize=12)
    axes.set_ylabel("PSNR of the prediction (dB)", fontsize=12)
    if not rows:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no pair to show", ha="center", va="center", fontsize=14, transform=axes.transAxes)
        return {}
    points = np.array([(row["psnr"]["copy"], row["psnr"]["prediction"]) for row in rows])
    num_better = int(np.count_nonzero(points[:, 1] > points[:, 0]))
    axes.set_title(f"{title}: better than copying\non {num_better} of {len(rows)} pairs", fontsize=14)
    shown = points[points < BEYOND_PLOT]
    low, high = (shown.min(), shown.max()) if len(shown) else (0.0, BEYOND_PLOT)
    margin = max(1.0, 0.04 * (high - low))
    low, high = low - margin, high + margin
    axes.set(xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    diagonal = axes.plot([low, high], [low, high], color="black", linestyle="--", linewidth=1.5, zorder=4)
    handles = {"as good as copying": diagonal[0]}
    for number, task in enumerate(tasks):
        of_task = points[[row["task"] == task for row in rows]]
        is_beyond = (of_task >= BEYOND_PLOT).any(axis=1)
        look = {"color": TASK_COLORS[number % len(TASK_COLORS)], "marker": TASK_MARKERS[number % len(TASK_MARKERS)]}
        axes.scatter(*of_task[~is_beyond].T, s=30, alpha=0.8, linewidths=0, **look)
        handles[task] = axes.scatter([], [], s=40, linewidths=0, **look)
        edge = np.clip(of_task[is_beyond], low, high)
        axes.scatter(*edge.T, s=50, edgecolors="black", clip_on=False, zorder=5, **look)
    if (points >= BEYOND_PLOT).any():
        label = f"black rim: {BEYOND_PLOT:.0f} dB or more, drawn at the edge"
        handles[label] = axes.scatter([], [], s=50, color="white", edgecolors="black")
    return handles


# The folder of results.


def save_results(predictions: Iterable[Prediction], output_dir: Path, note: str) -> dict[str, Any]:
    """Writes samples/<video id>/*.png, overview.png, scores.png and metrics.json; returns metrics.json's summary.

    The predictions may be a generator: only their scores are kept. A sample's folder holds comparison.png and the
    frames input.png, prediction.png, target.png as they are, and uncertainty.png with 16 bits: 256 times the standard
    deviation. A run that is interrupted, or that the disk stops (UserError), leaves former results whole.
    """
    records = []
    try:
        with parts_replaced_together(output_dir, last=METRICS_FILE) as new:
            for prediction in predictions:
                scores = score_prediction(prediction)
                record = {name: getattr(prediction, name) for name in ("video_id", "task", "edit_prompt")}
                records.append(record | scores)
                _save_sample(
                    new / SAMPLES / prediction.video_id, prediction, comparison_picture(prediction, note, scores)
                )
            overview = []
            for index, title in choose_for_overview([psnr_gain(record) for record in records]):
                comparison = new / SAMPLES / records[index]["video_id"] / "comparison.png"
                overview.append(titled(np.asarray(Image.open(comparison)), title))
            save_picture(new / "overview.png", stack(overview))
            save_scores_plot(new / "scores.png", records, note)
            metrics = {"summary": summarize(records), "samples": records}
            text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
            (new / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the results to {output_dir}: {error.strerror or error}") from error
    return metrics["summary"]


def check_output_dir(output_dir: Path) -> None:
    """Makes the folder for results. Raises UserError where it holds a folder `samples` that is not of such results."""
    make_folder(output_dir)
    if (output_dir / SAMPLES).exists() and not (output_dir / METRICS_FILE).is_file():
        raise UserError(
            f"{output_dir}/{SAMPLES} is not from an earlier run (no {METRICS_FILE} beside it) and would be replaced:"
            " move it, or choose another OUTPUT_DIR"
        )


def _save_sample(folder: Path, prediction: Prediction, comparison: np.ndarray) -> None:
    folder.mkdir(parents=True)
    save_picture(folder / "comparison.png", comparison)
    for name in ("input", "prediction", "target"):
        if (picture := getattr(prediction, name)) is not None:
            save_picture(folder / f"{name}.png", picture)
    if prediction.uncertainty is not None:
        levels = np.clip(prediction.uncertainty * 256.0, 0, 65535)
        save_picture(folder / "uncertainty.png", levels.round().astype(np.uint16))


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes a PNG of a uint8 RGB picture (H, W, 3), or of uint16 gray levels (H, W)."""
    # Run lengths only: three times as fast as the default, and an eighth larger.
    Image.fromarray(picture).save(path, compress_level=1, compress_type=zlib.Z_RLE)
