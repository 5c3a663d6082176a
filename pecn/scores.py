"""Scores of predicted frames, and how far they can be trusted.

A prediction is judged beside two others: `copy` hands back the input frame, the simplest prediction there is,
and `vae_ceiling` is the target after one trip through the VAE, which a plainly decoded prediction hardly beats.
Because most of a picture does not move, and copying is right there, the same is scored inside the moving region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.morphology import dilation, disk

from pecn.sampling import Prediction

HIGHEST_PSNR = 100.0  # stands for the infinite PSNR of identical pictures, so that means and JSON stay finite
SCORED = ("prediction", "copy", "vae_ceiling")
METRICS = ("psnr", "ssim")

# A pixel moves where any color channel of input and target differs by more than this many levels of 0..255.
# Where nothing moves, sensor noise and VP9 at 96 and 128 pixels made 99.99% of pixels differ by at most 10 levels
# and none by more than 14 (30 rendered clips, frame 20 to 25).
MOVING_THRESHOLD = 20
# Dilation takes in the soft rim of what moves: 2 pixels at a side of 96, 3 at 128.
DILATION_RADIUS = 1 / 48  # of the picture's longer side

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


# One pair.


def psnr(values: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB, at most HIGHEST_PSNR, of uint8 values of any shape against those they should be."""
    with np.errstate(divide="ignore"):  # infinite for identical ones
        return min(float(peak_signal_noise_ratio(target, values, data_range=255)), HIGHEST_PSNR)


def ssim(frame: np.ndarray, target: np.ndarray) -> float:
    """SSIM of a uint8 RGB picture (H, W, 3) against its target."""
    return float(structural_similarity(target, frame, channel_axis=2, data_range=255))


def moving_region(input_frame: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where something moves between two uint8 RGB pictures (H, W, 3): a boolean mask (H, W).

    Pixels that differ by more than MOVING_THRESHOLD in any channel, dilated by a disk.
    """
    difference = np.abs(input_frame.astype(np.int16) - target.astype(np.int16)).max(axis=2)
    return dilation(difference > MOVING_THRESHOLD, disk(round(DILATION_RADIUS * max(target.shape[:2]))))


def score_prediction(prediction: Prediction) -> dict[str, Any]:
    """Scores one pair against its target.

    Returns {"psnr": {"prediction": dB, "copy": dB, "vae_ceiling": dB}, "ssim": {the same keys},
    "moving": {"psnr": {the same keys}, "share": the region's part of the picture, 0..1}}. `moving` is None where
    nothing moves, all three are None without a target.
    """
    target = prediction.target
    if target is None:
        return {"psnr": None, "ssim": None, "moving": None}
    frames = dict(zip(SCORED, (prediction.prediction, prediction.input, prediction.vae_ceiling)))
    region = moving_region(prediction.input, target)
    moving = None
    if region.any():
        in_region = {name: psnr(frame[region], target[region]) for name, frame in frames.items()}
        moving = {"psnr": in_region, "share": float(region.mean())}
    return {
        "psnr": {name: psnr(frame, target) for name, frame in frames.items()},
        "ssim": {name: ssim(frame, target) for name, frame in frames.items()},
        "moving": moving,
    }


def psnr_gain(scores: dict[str, Any]) -> float | None:
    """How many dB the prediction is above copying over the whole picture; None without a target."""
    return None if scores["psnr"] is None else scores["psnr"]["prediction"] - scores["psnr"]["copy"]


# Statistics.


def bootstrap_intervals(table: np.ndarray) -> list[tuple[float, float] | None]:
    """The 95% percentile bootstrap interval (low, high) of the mean of each column of a table (pairs, columns).

    The pairs are drawn with replacement NUM_RESAMPLES times, the same ones for all columns (Efron and Tibshirani,
    1993, section 13.3). None for fewer than two pairs: one alone says nothing about how much others would differ.
    """
    num_pairs, num_columns = table.shape
    if num_pairs < 2:
        return [None] * num_columns
    result = stats.bootstrap(
        (table,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=100,  # resampled at once: few enough for any memory
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    )
    return list(zip(*(bound.tolist() for bound in result.confidence_interval)))


def share_interval(num_successes: int, num_trials: int) -> tuple[float, float] | None:
    """Wilson's 95% interval (0..1) of a share (Wilson, 1927); None without trials.

    The bootstrap would give an interval of no width where all pairs agree, however few they are.
    """
    if num_trials == 0:
        return None
    interval = stats.binomtest(num_successes, num_trials).proportion_ci(CONFIDENCE, method="wilson")
    return interval.low, interval.high


# All pairs.


def summarize(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of metrics.json: means with intervals, the comparison with copying, all that for each task too.

    `scores` holds one dictionary a pair: what `score_prediction` returned, and `task`. The summary, its `moving` (PSNR
    alone, and the mean `share` of the picture) and each task's entry in `per_task` are what `compare` returns. The
    whole summary also has `num_without_target`.
    """
    summary = summarize_group(scores)
    summary["num_without_target"] = len(scores) - summary["num_samples"]
    tasks = sorted({row["task"] for row in scores})
    summary["per_task"] = {task: summarize_group([row for row in scores if row["task"] == task]) for task in tasks}
    return summary


def summarize_group(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`compare` of the pairs that have a target, with that of their moving regions as `moving`."""
    moving = [row["moving"] for row in scores if row["moving"] is not None]
    summary = compare([row for row in scores if row["psnr"] is not None], METRICS)
    summary["moving"] = compare(moving, ("psnr",)) | {"share": mean([row["share"] for row in moving])}
    return summary


def compare(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    """Means of the pairs' scores, and how the prediction compares with copying. What cannot be computed is None.

    Returns `num_samples`; for each metric its means by SCORED and, as `<metric>_interval`, their 95% bootstrap
    intervals [low, high]; `difference` (mean of prediction - copy over pairs) and `share_better` (part of the pairs,
    0..1, where the prediction scores higher than copying), each by metric and with its interval.
    """
    summary: dict[str, Any] = {"num_samples": len(rows), "difference": {}, "share_better": {}}
    for metric in metrics:
        table = np.array([[row[metric][name] for name in SCORED] for row in rows]).reshape(len(rows), len(SCORED))
        gain = table[:, 0] - table[:, 1]
        *of_means, of_gain = bootstrap_intervals(np.column_stack([table, gain]))
        of_share = share_interval(int(np.count_nonzero(gain > 0)), len(rows))
        summary[metric] = dict(zip(SCORED, map(mean, table.T)))
        summary[f"{metric}_interval"] = dict(zip(SCORED, of_means))
        summary["difference"] |= {metric: mean(gain), f"{metric}_interval": of_gain}
        summary["share_better"] |= {metric: mean(gain > 0), f"{metric}_interval": of_share}
    return summary


def mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


# The table.


def format_table(summary: dict[str, Any]) -> str:
    """`summarize`'s summary as text of at most 110 columns: for each score a row per task and one for all."""
    rows = {**summary["per_task"], "all": summary}
    moving = {task: row["moving"] for task, row in rows.items()}
    share = summary["moving"]["share"]
    where = "nothing moves" if share is None else f"on average {share:.0%} of the picture"
    width = max(16, *(len(task) + 2 for task in rows))
    ways = f"{'prediction':>16}{'copying':>16}{'VAE ceiling':>16}"
    lines = [f"{'':{width}}{'pairs':>7}{ways}{'difference':>17}{'better on':>20}"]
    for title, metric, digits, part in (
        ("PSNR, dB", "psnr", 2, rows),
        (f"PSNR where something moves, dB ({where})", "psnr", 2, moving),
        ("SSIM", "ssim", 3, rows),
    ):
        lines += [title, *(f"{'  ' + task:{width}}{_cells(row, metric, digits)}" for task, row in part.items())]
    lines += [
        "difference: prediction - copying, pair by pair; ± the 95% interval's wider half; better on: pairs where",
        "the prediction scores higher than copying, and its 95% interval. "
        f"Identical pictures count as {HIGHEST_PSNR:.0f} dB.",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any], metric: str, digits: int) -> str:
    number = f"{row['num_samples']:>7}"
    if not row["num_samples"]:
        return f"{number}{'-':>16}"
    means = [_with_spread(row[metric][name], row[f"{metric}_interval"][name], f".{digits}f") for name in SCORED]
    difference, better = row["difference"], row["share_better"]
    gain = _with_spread(difference[metric], difference[f"{metric}_interval"], f"+.{digits}f")
    low, high = better[f"{metric}_interval"]
    share = f"{better[metric]:.0%} ({low:.0%} to {high:.0%})"
    return "".join([number, *(f"{text:>16}" for text in means), f"{gain:>17}{share:>20}"])


def _with_spread(mean: float, interval: tuple[float, float] | None, form: str) -> str:
    if interval is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {max(mean - interval[0], interval[1] - mean):{form.lstrip('+')}}"
