"""Scores of pairs and their statistics, by hand-computed examples and by properties that must hold for any scores."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from data.cli import UserError
from pecn.sampling import Prediction
from pecn.scores import (
    HIGHEST_PSNR,
    MOVING_THRESHOLD,
    bootstrap_intervals,
    format_table,
    gradient_energy,
    load_lpips,
    moving_region,
    paired_difference,
    psnr,
    psnr_gain,
    score_prediction,
    share,
    summarize,
    verdict,
)

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
quick = settings(deadline=None, max_examples=40)


def noise(side=48, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (side, side, 3), dtype=np.uint8)


def pair(moved=True, several=True):
    """A red square that moves by 12 pixels on a still background; the sample gets half of it right.

    The expected frame is the mean of input and target.
    """
    background = noise()
    frames = {name: background.copy() for name in ("input", "target", "sample")}
    frames["input"][8:20, 4:16] = frames["sample"][8:20, 4:16] = (255, 0, 0)
    if moved:
        frames["target"][8:20, 16:28] = frames["sample"][8:20, 16:28] = (255, 0, 0)
    else:
        frames["target"] = frames["input"].copy()
    ceiling = np.clip(frames["target"].astype(int) + 3, 0, 255).astype(np.uint8)
    mean = ((frames["input"].astype(int) + frames["target"]) // 2).astype(np.uint8) if several else None
    return Prediction(
        video_id="1", task="a", edit_prompt="", expected=mean, uncertainty=None, vae_ceiling=ceiling, **frames
    )


def record(task, sample, copy, moving=True, expected=None):
    """What `score_prediction` returns, made up, with the pair's task; `sample`, `copy`, `expected`: PSNR in dB."""
    psnr = {"sample": sample, "expected": expected, "copy": copy, "vae_ceiling": copy + 5}
    psnr = {way: value for way, value in psnr.items() if value is not None}
    ssim = {way: value / 100 for way, value in psnr.items()}
    part = {"psnr": {way: value - 9 for way, value in psnr.items()}, "ssim": ssim, "share": 0.25}
    part["mae"] = {way: 50 - value for way, value in psnr.items()}
    part["sharpness"] = {way: value / 30 for way, value in psnr.items()}
    part["is_frame"] = {way: value > copy for way, value in psnr.items()}
    return {"task": task, "psnr": psnr, "ssim": ssim, "moving": part if moving else None}


def means(compared):
    return {way: figures["mean"] for way, figures in compared.items()}


UNSCORED = {"task": "a", "psnr": None, "ssim": None, "moving": None}
FIELDS = {"sample": "sample", "expected": "expected", "copy": "input", "vae_ceiling": "vae_ceiling"}


def test_scores_are_those_of_scikit_image():
    """Of the whole picture; in the region SSIM is the mean of its map, computed once for the whole picture."""
    result = pair()
    scores, region = score_prediction(result), moving_region(result.input, result.target)
    assert list(scores["psnr"]) == list(scores["moving"]["psnr"]) == list(FIELDS)
    for way, field in FIELDS.items():
        frame = getattr(result, field)
        assert scores["psnr"][way] == pytest.approx(peak_signal_noise_ratio(result.target, frame, data_range=255))
        whole, full = structural_similarity(result.target, frame, channel_axis=2, data_range=255, full=True)
        assert scores["ssim"][way] == pytest.approx(whole)
        assert scores["moving"]["ssim"][way] == pytest.approx(full[region].mean()) != pytest.approx(whole)
    assert psnr_gain(scores) == scores["moving"]["psnr"]["sample"] - scores["moving"]["psnr"]["copy"] > 0


def test_one_prediction_has_no_expected_frame_in_its_scores():
    scores = [score_prediction(pair(several=False)) | {"task": "a"}]
    summary = summarize(scores)
    assert "expected" not in json.dumps([scores, summary]) + format_table(summary)
    assert list(summary["moving"]["frames"]) == ["sample", "copy", "vae_ceiling"]


def test_gradients_of_a_ramp():
    rows, columns = np.indices((12, 12))
    ramp = np.repeat((3 * rows + 4 * columns)[..., None], 3, axis=2).astype(np.uint8)
    region = np.zeros((12, 12), bool)
    region[4:8, 4:8] = True
    assert gradient_energy(ramp, region) == pytest.approx(5 / 255)  # hypot(3, 4)
    assert gradient_energy(ramp // 255, region) == 0


def test_a_blur_is_no_frame_and_an_exact_prediction_is_one():
    result = pair()
    blur = cv2.GaussianBlur(result.target, (0, 0), 0.6)
    moving = score_prediction(replace(result, sample=blur, expected=result.target))["moving"]
    assert 0.6 < moving["sharpness"]["sample"] < 0.7 and not moving["is_frame"]["sample"]
    assert moving["ssim"]["sample"] > moving["ssim"]["copy"]  # so it is its sharpness that tells
    assert moving["sharpness"]["expected"] == 1 and moving["is_frame"]["expected"]
    too_sharp = np.clip(127 + 1.5 * (result.target.astype(float) - 127), 0, 255).astype(np.uint8)
    moving = score_prediction(replace(result, sample=too_sharp))["moving"]
    assert moving["sharpness"]["sample"] > 1.25 and not moving["is_frame"]["sample"]
    assert moving["ssim"]["sample"] > moving["ssim"]["copy"]


@quick
@given(st.integers(0, 10_000), st.integers(0, 36), st.integers(0, 36))
def test_a_copy_is_never_a_frame(seed, row, column):
    """It is as sharp as the target, but its SSIM is not above its own."""
    background = noise(seed=seed)
    target = background.copy()
    target[row : row + 12, column : column + 12] = 255 - target[row : row + 12, column : column + 12]
    copied = replace(pair(), input=background, sample=background, target=target)
    moving = score_prediction(copied)["moving"]
    assert 0.8 < moving["sharpness"]["copy"] < 1.25
    assert not moving["is_frame"]["copy"] and not moving["is_frame"]["sample"]


def test_a_plain_target_has_a_finite_sharpness():
    plain = np.full((48, 48, 3), 10, np.uint8)
    moving = score_prediction(replace(pair(), target=plain, vae_ceiling=plain))["moving"]
    assert moving["sharpness"]["vae_ceiling"] == 0 and math.isfinite(moving["sharpness"]["sample"])


def test_identical_pictures_have_finite_scores():
    frame = noise()
    assert psnr(frame, frame) == HIGHEST_PSNR
    assert 48.1 < psnr(frame + 1, frame) < 48.2  # an error of one level everywhere


def test_a_nearly_identical_picture_is_not_better_than_an_identical_one():
    large = np.zeros((256, 256, 3), np.uint8)
    other = large.copy()
    other[0, 0, 0] = 1
    assert psnr(other, large) == HIGHEST_PSNR


def test_region_is_what_differs_in_any_color_and_its_rim():
    still = np.full((96, 96, 3), 100, np.uint8)
    changed = still.copy()
    changed[40, 50, 2] = 100 - MOVING_THRESHOLD - 1
    changed[10, 10] = 100 + MOVING_THRESHOLD  # not more than the threshold
    region = moving_region(still, changed)
    rows, columns = np.indices(region.shape)
    assert np.array_equal(region, (rows - 40) ** 2 + (columns - 50) ** 2 <= 2**2)
    assert np.array_equal(region, moving_region(changed, still))


def test_psnr_in_the_region_counts_its_pixels_alone():
    result = pair()
    region = moving_region(result.input, result.target)
    moving = score_prediction(result)["moving"]
    assert moving["share"] == region.mean()
    error = (result.input.astype(float) - result.target)[region]
    assert moving["psnr"]["copy"] == pytest.approx(10 * math.log10(255**2 / (error**2).mean()))
    spoilt = result.sample.copy()
    spoilt[~region] = 0
    spoilt_psnr = score_prediction(replace(result, sample=spoilt))["moving"]["psnr"]
    assert spoilt_psnr["sample"] == pytest.approx(moving["psnr"]["sample"])


def test_pairs_without_motion_or_target_have_no_moving_region():
    still = score_prediction(pair(moved=False))
    assert still["moving"] is None and still["psnr"]["copy"] == HIGHEST_PSNR
    without = score_prediction(replace(pair(), target=None, vae_ceiling=None))
    assert without == {"psnr": None, "ssim": None, "moving": None} and psnr_gain(without) is None


@quick
@given(st.lists(numbers, min_size=2, max_size=40))
def test_interval_holds_the_mean_and_lies_within_the_values(values):
    [(low, high), (shifted_low, shifted_high)] = bootstrap_intervals(
        np.column_stack([values, 2 * np.array(values) + 1])
    )
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack
    assert (shifted_low, shifted_high) == pytest.approx((2 * low + 1, 2 * high + 1), abs=100 * slack)  # one resampling


def test_interval_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(3, 2, 500)
    [(low, high)] = bootstrap_intervals(values[:, None])
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_one_value_has_no_interval():
    assert bootstrap_intervals(np.array([[3.0]])) == [None]
    assert bootstrap_intervals(np.zeros((0, 2))) == [None, None]


def test_share_has_wilsons_interval():
    assert share([True] * 10) == {"share": 1, "share_interval": pytest.approx((0.7225, 1.0), abs=1e-4)}
    most = share([True] * 85 + [False] * 15, "better")
    assert most == {"better": 0.85, "better_interval": pytest.approx((0.7672, 0.9069), abs=1e-4)}


def test_summary_of_hand_made_scores():
    scores = [record("a", 30, 28), record("a", 26, 27, moving=False), record("b", 24, 20), UNSCORED]
    summary = summarize(scores)
    assert (summary["num_samples"], summary["num_without_target"]) == (3, 1)
    assert means(summary["psnr"]) == pytest.approx({"sample": 80 / 3, "copy": 25, "vae_ceiling": 30})
    of_sample = summary["psnr"]["sample"]
    assert (of_sample["median"], of_sample["gain"]) == (26, pytest.approx(5 / 3))
    assert of_sample["better"] == pytest.approx(2 / 3)
    assert of_sample["better_interval"] == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert summary["psnr"]["copy"]["gain"] == summary["psnr"]["copy"]["better"] == 0
    low, high = summary["psnr"]["copy"]["interval"]
    assert 20 <= low < 25 < high <= 28
    moving = summary["moving"]
    assert (moving["num_samples"], moving["share"], moving["psnr"]["sample"]["gain"]) == (2, 0.25, 3)
    assert means(moving["psnr"]) == {"sample": 18, "copy": 15, "vae_ceiling": 20}
    assert moving["sharpness"]["sample"]["median"] == pytest.approx(0.9)
    assert (moving["frames"]["sample"]["share"], moving["frames"]["copy"]["share"]) == (1, 0)
    assert {task: part["num_samples"] for task, part in summary["per_task"].items()} == {"a": 2, "b": 1}
    assert summary["per_task"]["a"]["psnr"]["sample"]["gain"] == pytest.approx(0.5)
    assert summary["per_task"]["b"]["psnr"]["copy"]["interval"] is None
    assert summary["per_task"]["a"]["moving"]["num_samples"] == 1


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), numbers, numbers, st.booleans()), max_size=8))
def test_swapped_roles_flip_every_gain(rows):
    summary = summarize([record(*row) for row in rows])
    json.dumps(summary, allow_nan=False)
    swapped = summarize([record(task, copy, sample, moving) for task, sample, copy, moving in rows])
    groups = [(summary, swapped), (summary["moving"], swapped["moving"])]
    groups += [(summary["per_task"][task], swapped["per_task"][task]) for task in summary["per_task"]]
    for group, other in groups:
        if group["num_samples"] == 0:
            assert group["psnr"] == other["psnr"] == {}
            continue
        assert group["psnr"]["sample"]["mean"] == other["psnr"]["copy"]["mean"]
        one, turned = group["psnr"]["sample"], other["psnr"]["sample"]
        assert one["gain"] == pytest.approx(-turned["gain"], abs=1e-9)
        if group["num_samples"] > 1:
            low, high = one["gain_interval"]
            assert turned["gain_interval"] == pytest.approx((-high, -low), abs=1e-6)
        assert one["better"] + turned["better"] <= 1 + 1e-9  # ties are better for none


def test_table_shows_every_number_a_reader_needs_in_a_terminal():
    rng = np.random.default_rng(5)
    tasks = ("move_object", "drop_object", "cover_object")
    scores = [
        record(tasks[n % 3], 27 + rng.normal(), 25 + rng.normal(), n % 5 > 0, 28 + rng.normal()) for n in range(60)
    ]
    summary = summarize(scores)
    table = format_table(summary)
    assert max(map(len, table.splitlines())) <= 110
    assert "where something moves (25% of the picture)" in table
    assert all(f"{task}: 20 pairs, something moves in 16\n" in table for task in tasks)
    rows = table.split("all: 60 pairs, something moves in 48\n")[1].splitlines()
    moving = summary["moving"]
    for way, name, row in zip(FIELDS, ("sample", "expected", "copy", "VAE ceiling"), rows):
        assert row.startswith(f"  {name} ")
        low, high = moving["frames"][way]["share_interval"]
        figures = [f"{moving['sharpness'][way]['median']:.2f}", f"{moving['ssim'][way]['mean']:.3f} ± "]
        figures += [f"{moving['psnr'][way]['mean']:.2f} ± ", f" {moving['mae'][way]['mean']:.1f} "]
        figures += [f"{moving['frames'][way]['share']:.0%} ({low:.0%} to "]
        assert_in_order(row, *figures, f"{summary['psnr'][way]['mean']:.2f} ± ", f"{summary['ssim'][way]['mean']:.3f}")
    for way, row in zip(("sample", "expected"), rows[4:]):
        assert row.startswith(f"  {way} - copy ")
        low, high = moving["psnr"][way]["better_interval"]
        figures = [f"{moving['ssim'][way]['gain']:+.3f} ± ", f"{moving['psnr'][way]['gain']:+.2f} ± "]
        figures += [
            f" {moving['mae'][way]['gain']:+.1f} ",
            f"better {moving['psnr'][way]['better']:.0%} ({low:.0%} to {high:.0%})",
        ]
        assert_in_order(row, *figures, f"{summary['psnr'][way]['gain']:+.2f} ±", f"{summary['ssim'][way]['gain']:+.3f}")


def assert_in_order(text, *parts):
    for part in parts:
        assert part in text
        text = text.split(part, 1)[1]


def test_table_without_scores_or_intervals():
    table = format_table(summarize([record("a", 30, 28)]))
    assert "30.00   0.300" in table and "+2.00" in table and "±" not in table.split("sharpness:")[0]
    still = format_table(summarize([record("a", 30, 28, moving=False)]))
    assert "a: 1 pairs, something moves in 0" in still and "30.00   0.300" in still
    nothing = format_table(summarize([UNSCORED]))
    assert "nan" not in nothing and "nothing moves" in nothing
    assert max(len(line) for line in nothing.splitlines()) <= 110


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((2.0, 1.0, 3.0, 2.0), "is better than copying, by +2.0 ± 0.8 dB, on 4 of 4 pairs; 100% deserve"),
        ((-2.0, -1.0, -3.0, -2.0), "is worse than copying, by -2.0 ± 0.8 dB, on 0 of 4 pairs; 0% deserve"),
        ((2.0, -1.0, 3.0, -2.0), "is not clearly better than copying, by +0.5 ± 2.0 dB, on 2 of 4 pairs; 50% deserve"),
        ((2.0,), "is not clearly better than copying, by +2.0 dB, on 1 of 1 pairs; 100% deserve"),  # one says little
    ],
)
def test_verdict_is_as_sure_as_the_interval(gains, said):
    summary = summarize([*(record("a", 30 + gain, 30) for gain in gains), record("a", 30, 30, moving=False)])
    assert verdict(summary).startswith(f"{len(gains) + 1} pairs: where something moves the prediction {said}")


def test_verdict_without_motion():
    assert "nothing moves" in verdict(summarize([record("a", 30, 28, moving=False)]))


def records(*psnrs, copy=20, **changes):
    """Pairs named "0", "1", …, the PSNR of whose samples is given."""
    return [record("a", psnr, copy, **changes) | {"video_id": str(number)} for number, psnr in enumerate(psnrs)]


def test_two_systems_are_compared_pair_by_pair():
    """The pairs differ by far more than the systems do; the third has no counterpart."""
    ours, theirs = records(22, 31, 25), records(21, 29)
    difference = paired_difference(ours, theirs[::-1])  # the order does not matter
    assert (difference["num_samples"], difference["unpaired"]) == (2, [("2", "in one of the two only")])
    for group in (difference, difference["moving"]):
        of_sample = group["psnr"]["sample"]
        assert (of_sample["gain"], of_sample["better"]) == (1.5, 1)
        assert 1 <= of_sample["gain_interval"][0] <= of_sample["gain_interval"][1] <= 2
    assert means(difference["psnr"]) == {"sample": 26.5, "other": 25}
    assert difference["moving"]["mae"]["sample"]["better"] == 1  # where lower is better
    table = format_table(difference)
    assert "a: 2 pairs, something moves in 2" in table and "  other  " in table and "copy  " not in table
    assert "+1.50 ± 0.50" in next(line for line in table.splitlines() if line.startswith("  sample - other"))
    assert "the prediction is better than theirs, by +1.5 ± 0.5 dB, on 2 of 2 pairs" in verdict(difference, "theirs")
    assert "the prediction is worse than ours, by -1.5" in verdict(paired_difference(theirs, ours), "ours")


def test_systems_without_common_frames_are_not_compared():
    unscored = [UNSCORED | {"video_id": "0"}]
    for others in ([], unscored):
        with pytest.raises(UserError, match="no video in common"):
            paired_difference(records(22), others)
    with pytest.raises(UserError, match="video 1 was scored on other frames"):
        paired_difference(records(22, 31), records(22) + records(22, 31, copy=21)[1:])
    still = paired_difference(records(22, moving=False), records(21, moving=False))
    assert still["moving"]["num_samples"] == 0 and "+1.00" in format_table(still)


# LPIPS, with a stand-in for its package.


def stand_in(error=None):
    """A module like lpips; its map is the mean absolute difference over the colors, in -1..1."""

    class LPIPS:
        def __init__(self, net, spatial, verbose):
            assert (net, spatial, verbose) == ("alex", True, False)
            if error:
                raise error

        def __call__(self, one, other):
            return (one - other).abs().mean(dim=1, keepdim=True)

    def im2tensor(image):
        return torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]

    return SimpleNamespace(LPIPS=LPIPS, im2tensor=im2tensor)


def test_lpips_is_the_mean_of_its_map_where_something_moves(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", stand_in())
    result, lpips_map = pair(), load_lpips()
    scores = score_prediction(result, lpips_map) | {"task": "a"}
    region = moving_region(result.input, result.target)
    for way, field in FIELDS.items():
        difference = np.abs(getattr(result, field).astype(float) - result.target) / 127.5
        assert scores["moving"]["lpips"][way] == pytest.approx(difference[region].mean())
    assert "lpips" not in score_prediction(result)["moving"] and "lpips" not in scores
    summary = summarize([scores])
    lpips = summary["moving"]["lpips"]
    assert lpips["sample"]["gain"] < 0 and lpips["sample"]["better"] == 1 and lpips["copy"]["better"] == 0  # lower
    line = ", ".join(
        f"{name} {lpips[way]['mean']:.3f}" for way, name in zip(FIELDS, ("sample", "expected", "copy", "VAE ceiling"))
    )
    table = format_table(summary).splitlines()
    assert f"  LPIPS where something moves, lower is better: {line}" in table and max(map(len, table)) <= 110
    assert "LPIPS" not in format_table(summarize([record("a", 30, 28)]))
    without_motion = summarize([score_prediction(pair(moved=False), lpips_map) | {"task": "a"}])
    assert "LPIPS" not in format_table(without_motion)


@pytest.mark.parametrize(
    "module", [None, stand_in(OSError("no connection")), stand_in(RuntimeError("operator nms\ndoes not exist"))]
)
def test_lpips_that_cannot_be_had_is_one_line(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "lpips", module)
    with pytest.raises(UserError) as refusal:
        load_lpips()
    message = str(refusal.value)
    assert "\n" not in message and "pip install lpips (its dependency torchvision must match torch)" in message
    assert "weights are fetched on first use" in message
