"""Pictures of predicted frames and of their scores."""

import textwrap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from skimage.util import montage

from data.prompts import PROMPT_PREFIX
from pecn.sampling import Prediction
from pecn.scores import PREDICTED, SHARP_ENOUGH, TOO_SHARP

PANEL_SIDE = 192  # pixels; smaller frames are enlarged by a whole factor until they reach it
GAP, LINE_HEIGHT = 8, 20
FONT = ImageFont.load_default(size=15)
CHARACTER_WIDTH = 8  # pixels that a line of text is given for each character; on average it takes 7
DIFFERENCE_SCALE = 64  # of 255: where the difference map reaches its brightest color
UNCERTAINTY_SCALE = 32  # the same for the uncertainty map

Panel = tuple[str, np.ndarray]  # title and uint8 RGB picture (H, W, 3)


def panel_row(panels: Sequence[Panel], text: Sequence[str] = ()) -> np.ndarray:
    """Panels side by side, enlarged to at least PANEL_SIDE pixels, below their titles and lines of text; uint8 RGB."""
    factor = max(1, -(-PANEL_SIDE // min(panels[0][1].shape[:2])))
    height, width = (factor * side for side in panels[0][1].shape[:2])
    total_width = len(panels) * (width + GAP) + GAP
    lines = [line for words in text for line in textwrap.wrap(words, total_width // CHARACTER_WIDTH)]
    top = (len(lines) + 1) * LINE_HEIGHT + GAP
    picture = Image.new("RGB", (total_width, top + height + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((GAP, GAP // 2 + row * LINE_HEIGHT), line, fill="black", font=FONT)
    for column, (title, frame) in enumerate(panels):
        left = GAP + column * (width + GAP)
        draw.text((left, top - LINE_HEIGHT - GAP // 2), title, fill="dimgray", font=FONT)
        picture.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return np.asarray(picture)


def sheet(rows: Sequence[np.ndarray], columns: int = 1) -> np.ndarray:
    """Pictures one below the other, in `columns` columns, white where one is smaller; uint8 RGB."""
    height, width = (max(row.shape[axis] for row in rows) for axis in (0, 1))
    padded = [
        np.pad(row, ((0, height - row.shape[0]), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    columns = min(columns, len(rows))
    shape = (-(-len(rows) // columns), columns)
    return montage(padded, fill=(255, 255, 255), grid_shape=shape, channel_axis=3)


def frame_panels(prediction: Prediction) -> list[Panel]:
    """Input, sample, expected frame and target, those that there are."""
    frames = (prediction.input, prediction.predicted.sample, prediction.predicted.expected, prediction.target)
    titles = ("input", "sample", "expected", "target")
    return [(title, frame) for title, frame in zip(titles, frames) if frame is not None]


def short_prompt(prediction: Prediction) -> str:
    """The sentence without the words that all have in common."""
    return prediction.edit_prompt.removeprefix(PROMPT_PREFIX)


def comparison_picture(prediction: Prediction, scores: dict[str, Any], note: str) -> np.ndarray:
    """All of a prediction's frames and maps side by side, below its sentence and its scores; uint8 RGB."""
    panels = frame_panels(prediction)
    if prediction.target is not None:
        error = np.abs(prediction.predicted.sample.astype(np.float32) - prediction.target).mean(axis=2)
        panels.append((f"|sample - target|, 0..{DIFFERENCE_SCALE}", color_map(error, "inferno", DIFFERENCE_SCALE)))
    if prediction.predicted.uncertainty is not None:
        spread = color_map(prediction.predicted.uncertainty, "viridis", UNCERTAINTY_SCALE)
        panels.append((f"standard deviation, 0..{UNCERTAINTY_SCALE}", spread))
    return panel_row(panels, [short_prompt(prediction), describe_scores(scores), note])


def color_map(values: np.ndarray, colors: str, highest: float) -> np.ndarray:
    """An array's values in matplotlib's color map named `colors`, from 0 to `highest` and more; uint8 RGB."""
    return matplotlib.colormaps[colors](values / highest, bytes=True)[..., :3]


def describe_scores(scores: dict[str, Any]) -> str:
    """One pair's scores, as `score_prediction` returns them, in one line."""
    if scores["moving_share"] is None:
        return "no target frame, not scored"
    if not scores["moving_share"]:
        return f"nothing moves; PSNR of the whole picture: sample {scores['sample']['whole_psnr']:.1f} dB"
    words = []
    for way in (way for way in (*PREDICTED, "copy") if way in scores):
        one = scores[way]
        kind = " (good frame)" if one["good_frame"] else ""
        words.append(f"{way} {one['psnr']:.1f} dB, SSIM {one['ssim']:.3f}, sharpness {one['sharpness']:.2f}{kind}")
    return f"where something moves ({scores['moving_share']:.0%} of the picture): {'; '.join(words)}"


def save_scores_plot(path: Path, rows: Sequence[dict[str, Any]], note: str) -> None:
    """Plots each pair where something moves: a dot for the sample and one for the expected frame.

    PSNR gained over copying against sharpness: the best place is to the right, at 1.
    """
    moving = [row for row in rows if row["moving_share"]]
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for way, color in (("expected", "tab:cyan"), ("sample", "tab:red")):
        of_way = [row for row in moving if way in row]
        if of_way:
            gains = [row[way]["psnr"] - row["copy"]["psnr"] for row in of_way]
            axes.scatter(gains, [row[way]["sharpness"] for row in of_way], alpha=0.7, color=color, label=way)
    axes.plot(0, 1, "k*", markersize=14, label="copy")
    axes.axhspan(SHARP_ENOUGH, TOO_SHARP, color="0.92", zorder=0, label="as sharp as a frame")
    num_good = sum(row["sample"]["good_frame"] for row in moving)
    axes.set_title(f"{note}\ngood frames: {num_good:.0f} of {len(moving)}", parse_math=False)
    axes.set_xlabel("PSNR gained over copying where something moves (dB)")
    axes.set_ylabel("sharpness (gradients over the target's)")
    axes.legend()
    figure.savefig(path)


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Writes a PNG of a uint8 RGB picture (H, W, 3), or of uint16 gray levels (H, W)."""
    # Run lengths only: three times as fast as the default, and an eighth larger.
    Image.fromarray(picture).save(path, compress_level=1, compress_type=zlib.Z_RLE)


def save_gif(path: Path, pictures: Sequence[np.ndarray], seconds: Sequence[float]) -> None:
    """Writes uint8 RGB pictures (H, W, 3), each shown for so many seconds."""
    # Each picture's own 256 colors; Pillow's usual way to choose them loses those of small objects.
    first, *others = (Image.fromarray(picture).quantize(method=Image.Quantize.FASTOCTREE) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=[round(1000 * time) for time in seconds], loop=0)
