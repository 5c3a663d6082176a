"""Scores of predicted frames, and how far they can be trusted.

Two predictions are judged, a single `sample` and the `expected` frame (the mean of several), beside two others:
`copy` hands back the input frame, the simplest prediction there is, and `vae_ceiling` is the target after one trip
through the VAE. Because most of a picture does not move, and copying is right there, what counts is the moving region.
In it three figures are read together: a copy is a real frame in the wrong place, a blur is near the truth but no
frame, colored noise is neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from scipy import stats
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.morphology import dilation, disk

from data.cli import UserError
from pecn.sampling import Prediction

LpipsMap = Callable[[np.ndarray, np.ndarray], np.ndarray]

HIGHEST_PSNR = 100.0  # stands for the infinite PSNR of identical pictures, so that means and JSON stay finite
WAYS = ("sample", "expected", "copy", "vae_ceiling")  # `expected` only where several predictions were made
PREDICTED = WAYS[:2]
METRICS, MOVING_METRICS = ("psnr", "ssim"), ("psnr", "ssim", "mae", "sharpness")
LOWER_IS_BETTER = ("mae", "lpips")

# A pixel moves where any color channel of input and target differs by more than this many levels of 0..255.
# Where nothing moves, sensor noise and VP9 at 96 and 128 pixels made 99.99% of pixels differ by at most 10 levels
# and none by more than 14 (30 rendered clips, frame 20 to 25).
MOVING_THRESHOLD = 20
# Dilation takes in the soft rim of what moves: 2 pixels at a side of 96, 3 at 128.
DILATION_RADIUS = 1 / 48  # of the picture's longer side
SHARP_ENOUGH, TOO_SHARP = 0.8, 1.25  # a frame's sharpness lies between; a blur has 0.4, the copy about 1

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


# One pair.


def psnr(values: np.ndarray, target: np.ndarray) -> float:
    """PSNR in dB, at most HIGHEST_PSNR, of uint8 values of any shape against those they should be."""
    with np.errstate(divide="ignore"):  # infinite for identical ones
        return min(float(peak_signal_noise_ratio(target, values, data_range=255)), HIGHEST_PSNR)


def ssim_map(frame: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """SSIM of a uint8 RGB picture (H, W, 3) against its target, and the map (H, W, 3) that it is the mean of."""
    return structural_similarity(target, frame, channel_axis=2, data_range=255, full=True)


def moving_region(input_frame: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where something moves between two uint8 RGB pictures (H, W, 3): a boolean mask (H, W).

    Pixels that differ by more than MOVING_THRESHOLD in any channel, dilated by a disk.
    """
    difference = np.abs(input_frame.astype(np.int16) - target.astype(np.int16)).max(axis=2)
    return dilation(difference > MOVING_THRESHOLD, disk(round(DILATION_RADIUS * max(target.shape[:2]))))


def gradient_energy(frame: np.ndarray, region: np.ndarray) -> float:
    """Mean length of the gradient of the gray picture over the region: of uint8 RGB (H, W, 3), levels in 0..1."""
    return float(np.hypot(*np.gradient(rgb2gray(frame)))[region].mean())


def load_lpips() -> LpipsMap:
    """LPIPS with AlexNet (Zhang et al., 2018): its map (H, W) for two uint8 RGB pictures (H, W, 3).

    Raises UserError where it cannot be had.
    """
    try:
        import lpips  # not required: it needs torchvision, and a build that matches torch

        network = lpips.LPIPS(net="alex", spatial=True, verbose=False)
    except (ImportError, OSError, RuntimeError) as error:  # no package, no weights, a torchvision for another torch
        raise UserError(
            "--lpips needs: pip install lpips (its dependency torchvision must match torch); its weights are fetched"
            f" on first use ({error!r:.200})"
        ) from error

    def lpips_map(frame: np.ndarray, target: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(lpips.im2tensor(frame), lpips.im2tensor(target))[0, 0].numpy()

    return lpips_map


def score_prediction(prediction: Prediction, lpips_map: LpipsMap | None = None) -> dict[str, Any]:
    """Scores one pair against its target, for each of WAYS that there is.

    Returns {"psnr": {way: dB}, "ssim": {way: -1..1}, "moving": {"psnr": {way: dB}, "ssim": {way: -1..1}, "mae": {way:
    mean absolute error, 0..255}, "sharpness": {way: gradient energy over the target's}, "is_frame": {way: bool},
    "share": the region's part of the picture, 0..1}}, with `lpips_map` also "lpips": {way: 0..}. A way deserves the
    name of a frame where it is as sharp as one and has a higher SSIM than the copy. `moving` is None where nothing
    moves, all three are None without a target.
    """
    target = prediction.target
    if target is None:
        return {"psnr": None, "ssim": None, "moving": None}
    frames = dict(zip(WAYS, (prediction.sample, prediction.expected, prediction.input, prediction.vae_ceiling)))
    frames = {way: frame for way, frame in frames.items() if frame is not None}
    ssims = {way: ssim_map(frame, target) for way, frame in frames.items()}
    maps = {"ssim": {way: full for way, (_, full) in ssims.items()}}
    if lpips_map is not None:
        maps["lpips"] = {way: lpips_map(frame, target) for way, frame in frames.items()}
    return {
        "psnr": {way: psnr(frame, target) for way, frame in frames.items()},
        "ssim": {way: float(mean) for way, (mean, _) in ssims.items()},
        "moving": _score_region(frames, target, maps),
    }


def _score_region(
    frames: dict[str, np.ndarray], target: np.ndarray, maps: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any] | None:
    region = moving_region(frames["copy"], target)
    if not region.any():
        return None
    of_target = gradient_energy(target, region)
    means = {name: {way: float(full[region].mean()) for way, full in of.items()} for name, of in maps.items()}
    ssim = means["ssim"]
    # A target without any gradient (a plain surface) has no sharpness to compare with.
    sharpness = {way: gradient_energy(frame, region) / max(of_target, 1e-6) for way, frame in frames.items()}
    return means | {
        "psnr": {way: psnr(frame[region], target[region]) for way, frame in frames.items()},
        "mae": {way: float(cv2.absdiff(frame, target)[region].mean()) for way, frame in frames.items()},
        "sharpness": sharpness,
        "is_frame": {way: SHARP_ENOUGH <= sharpness[way] <= TOO_SHARP and ssim[way] > ssim["copy"] for way in frames},
        "share": float(region.mean()),
    }


def psnr_gain(scores: dict[str, Any]) -> float | None:
    """How many dB the sample is above copying where something moves; None without a target, or if nothing moves."""
    if scores["moving"] is None:
        return None
    of_pair = scores["moving"]["psnr"]
    return of_pair["sample"] - of_pair["copy"]


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


def share(flags: Sequence[bool] | np.ndarray, name: str = "share") -> dict[str, Any]:
    """The part of the flags that are set, 0..1, and its 95% interval (Wilson, 1927).

    The bootstrap would give an interval of no width where all pairs agree, however few they are.
    """
    interval = stats.binomtest(int(np.sum(flags)), len(flags)).proportion_ci(CONFIDENCE, method="wilson")
    return {name: float(np.mean(flags)), f"{name}_interval": (interval.low, interval.high)}


# All pairs.


def summarize(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of metrics.json: every way compared with copying, for all pairs and for each task.

    `scores` holds one dictionary a pair: what `score_prediction` returned, and `task`. The summary and each task's
    entry in `per_task` are what `summarize_group` returns; the whole summary also has `num_without_target`.
    """
    summary = summarize_group(scores)
    summary["num_without_target"] = len(scores) - summary["num_samples"]
    tasks = sorted({row["task"] for row in scores})
    summary["per_task"] = {task: summarize_group([row for row in scores if row["task"] == task]) for task in tasks}
    return summary


def summarize_group(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`num_samples` and each metric's `compare` of the pairs that have a target, and the same where something moves.

    `moving` also has the mean `share` of the picture, and `frames`: for each way the part of the pairs (0..1) that
    deserve the name of a frame, with its interval.
    """
    scored = [row for row in scores if row["psnr"] is not None]
    moving = [row["moving"] for row in scored if row["moving"] is not None]
    metrics = MOVING_METRICS if not moving or "lpips" not in moving[0] else (*MOVING_METRICS, "lpips")
    of_region = {metric: compare([row[metric] for row in moving], metric in LOWER_IS_BETTER) for metric in metrics}
    ways = moving[0]["is_frame"] if moving else ()
    frames = {way: share([row["is_frame"][way] for row in moving]) for way in ways}
    region = float(np.mean([row["share"] for row in moving])) if moving else None
    whole = {metric: compare([row[metric] for row in scored]) for metric in METRICS}
    where = {"num_samples": len(moving), "share": region, "frames": frames, **of_region}
    return {"num_samples": len(scored), **whole, "moving": where}


def compare(rows: Sequence[dict[str, float]], lower_is_better: bool = False) -> dict[str, dict[str, Any]]:
    """One metric's values {way: value} for each pair, summed up for each way.

    Each has its `mean`, `median` and `interval` (95% bootstrap, [low, high]), its `gain` (mean difference to `base_of`
    the ways, pair by pair) with its `gain_interval`, and its `better` (part of the pairs, 0..1, that score better than
    that) with its `better_interval`. An interval is None for one pair.
    """
    if not rows:
        return {}
    ways = list(rows[0])
    table = np.array([[row[way] for way in ways] for row in rows])
    gains = table - table[:, [ways.index(base_of(ways))]]
    intervals = bootstrap_intervals(np.column_stack([table, gains]))
    better = gains < 0 if lower_is_better else gains > 0
    return {
        way: {
            "mean": float(table[:, column].mean()),
            "median": float(np.median(table[:, column])),
            "interval": intervals[column],
            "gain": float(gains[:, column].mean()),
            "gain_interval": intervals[len(ways) + column],
            **share(better[:, column], "better"),
        }
        for column, way in enumerate(ways)
    }


def base_of(ways: Iterable[str]) -> str:
    """The way that the others are compared with: the copy, or another system's sample (`paired_difference`)."""
    return "copy" if "copy" in ways else "other"


def paired_difference(scores: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compares two systems on the videos of both: `summarize`'s summary of the ways "sample" and "other".

    Both lists are as metrics.json's `samples`; `others` gives the samples called "other". The summary also has
    `unpaired`: the videos that only one of the two has scores of, as `describe_left_out` takes them. Raises UserError
    where they have no video in common, or where copying scores differently in them, which means other frames.
    """
    ours, theirs = ({row["video_id"]: row for row in rows if row["psnr"] is not None} for rows in (scores, others))
    pairs = [(row, theirs[video_id]) for video_id, row in ours.items() if video_id in theirs]
    if not pairs:
        raise UserError("the two have scores of no video in common; predict the same videos with both")
    rows = []
    for one, two in pairs:
        if not math.isclose(one["psnr"]["copy"], two["psnr"]["copy"], abs_tol=0.01):
            raise UserError(f"video {one['video_id']} was scored on other frames in the two; use the same for both")
        rows.append({"task": one["task"], **_side_by_side(one, two, METRICS), "moving": None})
        if one["moving"] and two["moving"]:
            of_region = _side_by_side(one["moving"], two["moving"], (*MOVING_METRICS, "is_frame"))
            rows[-1]["moving"] = {"share": one["moving"]["share"], **of_region}
    unpaired = [(video_id, "in one of the two only") for video_id in sorted(ours.keys() ^ theirs.keys())]
    return summarize(rows) | {"unpaired": unpaired}


def _side_by_side(one: dict[str, Any], two: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    return {metric: {"sample": one[metric]["sample"], "other": two[metric]["sample"]} for metric in metrics}


# In one sentence, and as a table.


def verdict(summary: dict[str, Any], base: str = "copying") -> str:
    """One sentence on whether a sample is better than `base` where something moves, and how sure that is."""
    pairs, moving = f"{summary['num_samples']} pairs", summary["moving"]
    count = moving["num_samples"]
    if not count:
        return f"{pairs}: nothing moves in them, so that they do not tell whether the model is worth using"
    of_sample, frames = moving["psnr"]["sample"], moving["frames"]["sample"]["share"]
    gain, interval = of_sample["gain"], of_sample["gain_interval"]
    low, high = interval or (-math.inf, math.inf)
    others = f", of the other run's {moving['frames']['other']['share']:.0%}" if "other" in moving["frames"] else ""
    clearly = "is worse than" if high < 0 else "is better than" if low > 0 else "is not clearly better than"
    return (
        f"{pairs}: where something moves the prediction {clearly} {base}, by {gain:+.1f}"
        f"{_half_width(gain, interval, '.1f')} dB, on {round(of_sample['better'] * count)} of {count} pairs;"
        f" {frames:.0%} deserve the name of a frame{others}"
    )


ROW = "{:17}{:>10}{:>15}{:>14}{:>7}{:>26}{:>13}{:>8}"


def format_table(summary: dict[str, Any]) -> str:
    """`summarize`'s summary as text of at most 110 columns: a block for each task and one for all."""
    region = summary["moving"]["share"]
    where = "nothing moves" if region is None else f"where something moves ({region:.0%} of the picture)"
    titles = ("", "sharpness", "SSIM", "PSNR, dB", "MAE", "frames", "PSNR, dB", "SSIM")
    lines = [f"{'':17}{where:^72}{'whole picture':>21}", ROW.format(*titles)]
    for task, group in {**summary["per_task"], "all": summary}.items():
        lines.append(f"{task}: {group['num_samples']} pairs, something moves in {group['moving']['num_samples']}")
        names = {way: way.replace("vae_", "VAE ") for way in group["psnr"]}
        lines += [ROW.format(f"  {name}", *_cells(group, way)) for way, name in names.items()]
        base = base_of(names)
        lines += [ROW.format(f"  {way} - {base}", *_cells(group, way, True)) for way in names if way in PREDICTED]
        if lpips := group["moving"].get("lpips"):
            means = ", ".join(f"{name} {lpips[way]['mean']:.3f}" for way, name in names.items())
            lines.append(f"  LPIPS where something moves, lower is better: {means}")
    lines += [
        f"sharpness: gradients over the target's, median; frames: pairs with {SHARP_ENOUGH} to {TOO_SHARP} of it and",
        "an SSIM above the copy's; better: pairs with the higher PSNR; MAE: mean absolute error of 255 levels;",
        "±: the 95% interval's wider half",
    ]
    return "\n".join(lines)


def _cells(group: dict[str, Any], way: str, of_gain: bool = False) -> list[str]:
    """A way's own figures, or what it gains over the copy."""
    mean, sign = ("gain", "+") if of_gain else ("mean", "")
    moving, cells = group["moving"], ["-"] * 5
    if moving["num_samples"]:
        cells = [
            "" if of_gain else f"{moving['sharpness'][way]['median']:.2f}",
            with_spread(moving["ssim"][way], mean, f"{sign}.3f"),
            with_spread(moving["psnr"][way], mean, f"{sign}.2f"),
            f"{moving['mae'][way][mean]:{sign}.1f}",
            share_cell(moving["psnr"][way], "better") if of_gain else share_cell(moving["frames"][way], "share"),
        ]
    return [*cells, with_spread(group["psnr"][way], mean, f"{sign}.2f"), f"{group['ssim'][way][mean]:{sign}.3f}"]


def with_spread(figures: dict[str, Any], name: str, form: str) -> str:
    value, interval = figures[name], figures["gain_interval" if name == "gain" else "interval"]
    return f"{value:{form}}{_half_width(value, interval, form.lstrip('+'))}"


def _half_width(value: float, interval: tuple[float, float] | None, form: str) -> str:
    """The wider half of an interval around a value; nothing where there is no interval."""
    return "" if interval is None else f" ± {max(value - interval[0], interval[1] - value):{form}}"


def share_cell(figures: dict[str, Any], name: str) -> str:
    low, high = figures[f"{name}_interval"]
    return f"{'better ' if name == 'better' else ''}{figures[name]:.0%} ({low:.0%} to {high:.0%})"
