"""Scores of predicted frames against what really happened, and how far they can be trusted.

Each way of predicting has the same scores: a single `sample`, the `expected` frame (the mean of several), `copy` (the
input frame handed back, the simplest prediction there is), and `vae_ceiling` (the target after one trip through the
VAE). Because most of a picture does not move, and copying is right there, what counts is the moving region. In it
figures are read together: a copy is a real frame in the wrong place, a blur is near the truth but no frame.

To add a metric to metrics.json and to the table, add a line to METRICS.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.morphology import dilation, disk

from data.cli import UserError
from pecn.sampling import Prediction

WAYS = ("sample", "expected", "copy", "vae_ceiling")  # `expected` only where several predictions were made
PREDICTED = WAYS[:2]

HIGHEST_PSNR = 100.0  # stands for the infinite PSNR of identical pictures, so that means and JSON stay finite
# A pixel moves where any color channel of input and target differs by more than this many levels of 0..255.
# Where nothing moves, noise and VP9 made no pixel differ by more than 14 (30 rendered clips, frame 20 to 25).
MOVING_THRESHOLD = 20
# Dilation takes in the soft rim of what moves: 2 pixels at a side of 96, 3 at 128.
DILATION_RADIUS = 1 / 48  # of the picture's longer side
SHARP_ENOUGH, TOO_SHARP = 0.8, 1.25  # a good frame's sharpness lies between; a blur has 0.4, the copy about 1
CLOSER = 0.1  # and its SSIM closes at least this part of what the copy's lacks


# One pair.


@dataclass(frozen=True)
class Comparison:
    """A frame, uint8 RGB (H, W, 3), beside the target and the copy; `region` (H, W) is where something moves."""

    frame: np.ndarray
    target: np.ndarray
    copy: np.ndarray
    region: np.ndarray

    @functools.cached_property
    def ssim(self) -> tuple[float, np.ndarray]:
        """The mean SSIM of the whole picture, and the map (H, W, 3)."""
        return structural_similarity(self.target, self.frame, channel_axis=2, data_range=255, full=True)

    @property
    def ssim_where_moving(self) -> float:
        return float(self.ssim[1][self.region].mean())

    @property
    def sharpness(self) -> float:
        """Gradient energy over the target's; a plain target has none to compare with."""
        return gradient_energy(self.frame, self.region) / max(gradient_energy(self.target, self.region), 1e-6)

    @property
    def is_good(self) -> bool:
        """Whether it is as sharp as a frame, and clearly nearer to the target's structure than the copy."""
        ssim_of_copy = Comparison(self.copy, self.target, self.copy, self.region).ssim_where_moving
        closed = (self.ssim_where_moving - ssim_of_copy) / max(1 - ssim_of_copy, 1e-6)
        return SHARP_ENOUGH <= self.sharpness <= TOO_SHARP and closed >= CLOSER


def psnr(values: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB, at most HIGHEST_PSNR, of uint8 values of any shape against those they should be."""
    with np.errstate(divide="ignore"):  # infinite for identical ones
        return min(float(peak_signal_noise_ratio(target, values, data_range=255)), HIGHEST_PSNR)


def moving_region(input_frame: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where something moves between two uint8 RGB pictures (H, W, 3): a boolean mask (H, W).

    Pixels that differ by more than MOVING_THRESHOLD in any channel, dilated by a disk.
    """
    difference = np.abs(input_frame.astype(np.int16) - target.astype(np.int16)).max(axis=2)
    return dilation(difference > MOVING_THRESHOLD, disk(round(DILATION_RADIUS * max(target.shape[:2]))))


def gradient_energy(frame: np.ndarray, region: np.ndarray) -> float:
    """Mean length of the gradient of the gray picture over the region: of uint8 RGB (H, W, 3), levels in 0..1."""
    return float(np.hypot(*np.gradient(rgb2gray(frame)))[region].mean())


@dataclass(frozen=True)
class Metric:
    """A figure of one frame, and its column in the table."""

    title: str
    function: Callable[[Comparison], float]
    form: str = ".2f"  # how it is written
    summary: str = "mean"  # over the pairs, or "median"
    gain: bool = False  # whether the table has the paired difference to copying too
    whole: bool = False  # of the whole picture, so that it is defined where nothing moves too
    best: float = math.inf  # the best value there is: a pair is better where it is nearer to it; 0 for an error


METRICS = {
    "sharpness": Metric("sharpness", lambda c: c.sharpness, summary="median", best=1),
    "good_frame": Metric("good frames", lambda c: float(c.is_good), form=".0%"),
    "ssim": Metric("SSIM", lambda c: c.ssim_where_moving, form=".3f", gain=True),
    "psnr": Metric("PSNR", lambda c: psnr(c.frame[c.region], c.target[c.region]), gain=True),
    "whole_psnr": Metric("whole PSNR", lambda c: psnr(c.frame, c.target), whole=True),
    "whole_ssim": Metric("whole SSIM", lambda c: float(c.ssim[0]), form=".3f", whole=True),
}


def score_prediction(prediction: Prediction) -> dict[str, Any]:
    """Scores one pair, as a row of metrics.json: whose it is, `moving_share`, and {way: {metric: figure}}.

    `moving_share` is the region's part of the picture, 0..1. Where nothing moves only figures of the whole picture are
    there, the others are None; without a target it is None and no way is there.
    """
    target, copy, predicted = prediction.target, prediction.input, prediction.predicted
    scores = {name: getattr(prediction, name) for name in ("video_id", "task", "edit_prompt")}
    if target is None:
        return scores | {"moving_share": None}
    region = moving_region(copy, target)
    scores["moving_share"] = float(region.mean())
    for way, frame in zip(WAYS, (predicted.sample, predicted.expected, copy, prediction.vae_ceiling)):
        if frame is not None:
            compared = Comparison(frame, target, copy, region)
            scores[way] = {
                name: metric.function(compared) if metric.whole or region.any() else None
                for name, metric in METRICS.items()
            }
    return scores


# Many pairs.


def half_width(values: pd.Series) -> float:
    """Half of the 95% interval of the mean (Student's t); not a number for fewer than two values."""
    return float(stats.t.ppf(0.975, len(values) - 1) * values.sem()) if len(values) > 1 else math.nan


def compare(ours: pd.Series, theirs: pd.Series, best: float = math.inf) -> dict[str, float | None]:
    """What is gained pair by pair: the mean, half of its 95% interval, and the share of better pairs (0..1).

    Better are those nearer to `best`.
    """
    gains = (ours - theirs).dropna()
    spread = half_width(gains)
    spread = None if math.isnan(spread) else spread
    better = gains > 0 if best == math.inf else ((ours - best).abs() < (theirs - best).abs())[gains.index]
    return {"gain": float(gains.mean()), "gain_half_width": spread, "better": float(better.mean())}


def table_of(rows: Sequence[dict[str, Any]], way: str) -> pd.DataFrame:
    """The scores of one way, a line for each pair that has them."""
    return pd.DataFrame([row.get(way) or {} for row in rows], dtype=float)


def summarize(rows: Sequence[dict[str, Any]], by: str = "task") -> dict[str, Any]:
    """The summary of metrics.json: for "all" and for each value of the column `by` the figures of each way.

    `rows` are those of `score_prediction`, with the column `by`. A group has `num_pairs` (with a target), `num_moving`,
    `num_without_target`, and for each way {metric: {"value": mean or median, "gain", "gain_half_width", "better"}}: the
    last three are against the copy.
    """
    groups = {"all": list(rows)}
    for value in sorted({row[by] for row in rows}):
        groups[str(value)] = [row for row in rows if row[by] == value]
    summary = {}
    for name, group in groups.items():
        scored = [row for row in group if row["moving_share"] is not None]
        summary[name] = {
            "num_pairs": len(scored),
            "num_moving": sum(row["moving_share"] > 0 for row in scored),
            "num_without_target": len(group) - len(scored),
        }
        copy = table_of(scored, "copy")
        for way in (way for way in WAYS if scored and way in scored[0]):
            table = table_of(scored, way)
            summary[name][way] = {
                key: {"value": float(table[key].agg(metric.summary)), **compare(table[key], copy[key], metric.best)}
                for key, metric in METRICS.items()
                if table[key].notna().any()
            }
    return summary


def format_table(summary: dict[str, Any]) -> str:
    """`summarize`'s summary as text: for each group a line for each way, where something moves but for "whole"."""
    lines = []
    for name, group in summary.items():
        label = f"{name}, {group['num_pairs']} pair{'' if group['num_pairs'] == 1 else 's'}"
        for way in (way for way in WAYS if way in group):
            line = {"": label, " ": way.replace("vae_", "VAE ")}
            for key, metric in METRICS.items():
                figures = group[way].get(key)
                line[metric.title] = f"{figures['value']:{metric.form}}" if figures else "-"
                if metric.gain:
                    gains = figures and way in PREDICTED
                    line[f"{metric.title} - copy"] = gain_in_words(figures, metric.form) if gains else ""
            lines.append(line)
            label = ""
    return pd.DataFrame(lines).to_string(index=False) if lines else "no pair has a frame to compare with"


def gain_in_words(figures: dict[str, Any], form: str = ".2f") -> str:
    """A gain with its 95% interval: "+2.41 ± 0.31"."""
    spread = figures["gain_half_width"]
    return f"{figures['gain']:+{form}}" + ("" if spread is None else f" ± {spread:{form}}")


def paired_difference(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Compares the samples of two runs on the videos of both where something moves: {metric: what `compare` returns}.

    Both lists are as metrics.json's `samples`. Returns also the videos that are not in both, as `describe_left_out`
    takes them. Raises UserError where no video is in both with the same frames.
    """
    ours, theirs = ({row["video_id"]: row for row in run if row["moving_share"]} for run in (rows, others))
    ids = [name for name in ours if name in theirs and ours[name]["copy"]["psnr"] == theirs[name]["copy"]["psnr"]]
    if not ids:
        raise UserError("the two have scores of no video and frames in common; predict the same with both")
    one, two = (table_of([run[video_id] for video_id in ids], "sample") for run in (ours, theirs))
    shared = [key for key in METRICS if key in one and key in two]
    compared = {key: compare(one[key], two[key], METRICS[key].best) for key in shared}
    unpaired = [(video_id, "not scored alike in both") for video_id in sorted({*ours, *theirs} - {*ids})]
    return compared | {"num_moving": len(ids), "good_frames": (one.good_frame.mean(), two.good_frame.mean())}, unpaired


def verdict(group: dict[str, Any]) -> str:
    """One sentence on whether the sample of a group of `summarize` is better than copying, and how sure that is."""
    if not group["num_moving"]:
        return "nothing moves: these pairs do not tell if the model is good"
    sample = group["sample"]
    copy = group["copy"]["psnr"]["value"]
    if "vae_ceiling" in group and (ceiling := group["vae_ceiling"]["psnr"]["value"]) < copy:
        compared = f"the true frames have {ceiling:.1f} dB after one trip through it, copies {copy:.1f} dB"
        return f"this model's VAE cannot draw such pictures: {compared}"
    words = better_or_not(sample["psnr"], group["num_moving"], "copying")
    return f"where something moves the prediction is {words}; good frames {sample['good_frame']['value']:.0%}"


def better_or_not(figures: dict[str, Any], num_moving: int, base: str) -> str:
    """A gain in PSNR in words: "better than copying: +2.41 ± 0.31 dB, better on 50 of 57 pairs"."""
    gain, spread = figures["gain"], figures["gain_half_width"]
    spread = math.inf if spread is None else spread
    clearly = "better than" if gain > spread else "worse than" if gain < -spread else "not clearly better than"
    pairs = "pair" if num_moving == 1 else "pairs"
    better = f"better on {round(figures['better'] * num_moving)} of {num_moving} {pairs}"
    return f"{clearly} {base}: {gain_in_words(figures)} dB, {better}"
