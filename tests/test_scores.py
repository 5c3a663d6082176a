"""Scores of pairs and their statistics, by hand-computed examples and by properties that must hold for any scores."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pecn.sampling import Prediction
from pecn.scores import (
    HIGHEST_PSNR,
    MOVING_THRESHOLD,
    SCORED,
    bootstrap_intervals,
    format_table,
    moving_region,
    psnr,
    psnr_gain,
    score_prediction,
    share_interval,
    ssim,
    summarize,
)

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
quick = settings(deadline=None, max_examples=40)


def noise(side=48, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (side, side, 3), dtype=np.uint8)


def pair(moved=True):
    """A red square that moves by 12 pixels on a still background; the prediction gets half of it right."""
    background = noise()
    frames = {name: background.copy() for name in ("input", "target", "prediction")}
    frames["input"][8:20, 4:16] = frames["prediction"][8:20, 4:16] = (255, 0, 0)
    if moved:
        frames["target"][8:20, 16:28] = frames["prediction"][8:20, 16:28] = (255, 0, 0)
    else:
        frames["target"] = frames["input"].copy()
    ceiling = np.clip(frames["target"].astype(int) + 3, 0, 255).astype(np.uint8)
    return Prediction(video_id="1", task="a", edit_prompt="", uncertainty=None, vae_ceiling=ceiling, **frames)


def record(task, prediction, copy, moving=True):
    """What `score_prediction` returns, made up, with the pair's task."""
    psnr = {"prediction": prediction, "copy": copy, "vae_ceiling": copy + 5}
    part = {"psnr": {name: value - 9 for name, value in psnr.items()}, "share": 0.25}
    ssim = {name: value / 100 for name, value in psnr.items()}
    return {"task": task, "psnr": psnr, "ssim": ssim, "moving": part if moving else None}


UNSCORED = {"task": "a", "psnr": None, "ssim": None, "moving": None}


def test_scores_are_those_of_scikit_image():
    result = pair()
    scores = score_prediction(result)
    for name, key in zip(SCORED, ("prediction", "input", "vae_ceiling")):
        expected = peak_signal_noise_ratio(result.target, getattr(result, key), data_range=255)
        assert scores["psnr"][name] == pytest.approx(expected)
        expected = structural_similarity(result.target, getattr(result, key), channel_axis=2, data_range=255)
        assert scores["ssim"][name] == pytest.approx(expected)
    assert psnr_gain(scores) == scores["psnr"]["prediction"] - scores["psnr"]["copy"] > 0


def test_identical_pictures_have_finite_scores():
    frame = noise()
    assert psnr(frame, frame) == HIGHEST_PSNR and ssim(frame, frame) == 1
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
    spoilt = result.prediction.copy()
    spoilt[~region] = 0
    assert score_prediction(replace(result, prediction=spoilt))["moving"]["psnr"]["prediction"] == pytest.approx(
        moving["psnr"]["prediction"]
    )


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


def test_share_interval_is_wilsons():
    assert share_interval(0, 0) is None
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert share_interval(85, 100) == pytest.approx((0.7672, 0.9069), abs=1e-4)
    low, high = share_interval(15, 100)
    assert (1 - high, 1 - low) == pytest.approx(share_interval(85, 100))


def test_summary_of_hand_made_scores():
    scores = [record("a", 30, 28), record("a", 26, 27, moving=False), record("b", 24, 20), UNSCORED]
    summary = summarize(scores)
    assert (summary["num_samples"], summary["num_without_target"]) == (3, 1)
    assert summary["psnr"] == pytest.approx({"prediction": 80 / 3, "copy": 25, "vae_ceiling": 30})
    assert summary["difference"]["psnr"] == pytest.approx(5 / 3)
    assert summary["share_better"]["psnr"] == pytest.approx(2 / 3)
    assert summary["share_better"]["psnr_interval"] == pytest.approx((0.2077, 0.9385), abs=1e-4)
    low, high = summary["psnr_interval"]["copy"]
    assert 20 <= low < 25 < high <= 28
    moving = summary["moving"]
    assert (moving["num_samples"], moving["share"], moving["difference"]["psnr"]) == (2, 0.25, 3)
    assert moving["psnr"] == {"prediction": 18, "copy": 15, "vae_ceiling": 20}
    assert moving["share_better"]["psnr"] == 1
    assert {task: part["num_samples"] for task, part in summary["per_task"].items()} == {"a": 2, "b": 1}
    assert summary["per_task"]["a"]["difference"]["psnr"] == pytest.approx(0.5)
    assert summary["per_task"]["b"]["psnr_interval"]["copy"] is None
    assert summary["per_task"]["a"]["moving"]["num_samples"] == 1


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), numbers, numbers, st.booleans()), max_size=8))
def test_swapped_roles_flip_every_difference(rows):
    summary = summarize([record(*row) for row in rows])
    json.dumps(summary, allow_nan=False)
    swapped = summarize([record(task, copy, prediction, moving) for task, prediction, copy, moving in rows])
    groups = [(summary, swapped), (summary["moving"], swapped["moving"])]
    groups += [(summary["per_task"][task], swapped["per_task"][task]) for task in summary["per_task"]]
    for group, other in groups:
        if group["num_samples"] == 0:
            assert group["difference"]["psnr"] is group["share_better"]["psnr"] is None
            continue
        assert group["psnr"]["prediction"] == other["psnr"]["copy"]
        assert group["difference"]["psnr"] == pytest.approx(-other["difference"]["psnr"], abs=1e-9)
        if group["num_samples"] > 1:
            low, high = group["difference"]["psnr_interval"]
            assert other["difference"]["psnr_interval"] == pytest.approx((-high, -low), abs=1e-6)
        assert group["share_better"]["psnr"] + other["share_better"]["psnr"] <= 1 + 1e-9  # ties are better for none


def test_table_shows_every_number_a_reader_needs_in_a_terminal():
    rng = np.random.default_rng(5)
    tasks = ("move_object", "drop_object", "cover_object")
    scores = [record(tasks[n % 3], 27 + rng.normal(), 25 + rng.normal()) for n in range(60)]
    summary = summarize(scores)
    table = format_table(summary)
    assert max(map(len, table.splitlines())) <= 110
    for part in (summary, *summary["per_task"].values(), summary["moving"]):
        for name in SCORED:
            assert f"{part['psnr'][name]:.2f} ±" in table
        assert f"{part['difference']['psnr']:+.2f} ±" in table
        low, high = part["share_better"]["psnr_interval"]
        assert f"{part['share_better']['psnr']:.0%} ({low:.0%} to {high:.0%})" in table
    assert "on average 25% of the picture" in table
    assert all(table.count(task) == 3 for task in tasks)


def test_table_without_scores_or_intervals():
    assert "30.00           28.00" in format_table(summarize([record("a", 30, 28)]))
    nothing = format_table(summarize([UNSCORED]))
    assert "nan" not in nothing and "nothing moves" in nothing
    assert max(len(line) for line in nothing.splitlines()) <= 110
