"""Scores of pairs and their statistics, by hand-computed examples and by properties that must hold for any scores."""

import json
import math

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from skimage.metrics import structural_similarity

from data.cli import UserError
from pecn.sampling import PredictedFrame, Prediction
from pecn.scores import (
    HIGHEST_PSNR,
    METRICS,
    MOVING_THRESHOLD,
    Metric,
    compare,
    format_table,
    gradient_energy,
    half_width,
    moving_region,
    paired_difference,
    psnr,
    score_prediction,
    summarize,
    verdict,
)

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
quick = settings(deadline=None, max_examples=40)


def noise(side=48, seed=0):
    return np.random.default_rng(seed).integers(60, 200, (side, side, 3), dtype=np.uint8)


def pair(sample=None, expected=None, copy=None, target="moved", ceiling=None):
    """A red square that moves by 12 pixels over noise, and a sample that leaves it behind too."""
    start, end, half = (noise() for _ in range(3))
    start[8:20, 4:16] = half[8:20, 4:16] = end[8:20, 16:28] = half[8:20, 16:28] = (255, 0, 0)
    predicted = PredictedFrame(half if sample is None else sample, expected, None)
    target = end if isinstance(target, str) else target
    return Prediction("1", "a", "", start if copy is None else copy, predicted, target, ceiling)


def record(task, sample, copy, moving=True, expected=None, video_id="1"):
    """What `score_prediction` returns, made up; `sample`, `copy`, `expected`: PSNR in dB where something moves."""
    row = {"video_id": video_id, "task": task, "moving_share": 0.25 if moving else 0.0}
    for way, level in {"sample": sample, "expected": expected, "copy": copy}.items():
        if level is not None:
            made_up = {"sharpness": level / 30, "good_frame": float(level > copy), "ssim": level / 100, "psnr": level}
            made_up |= {"whole_psnr": level + 9, "whole_ssim": level / 50}
            row[way] = {
                name: made_up.get(name, 1.0) if moving or metric.whole else None for name, metric in METRICS.items()
            }
    return row


NAMES = {"video_id": "1", "task": "a", "edit_prompt": ""}  # of `pair`
UNSCORED = {"video_id": "2", "task": "a", "moving_share": None}


# One pair.


def test_scores_in_the_region_count_its_pixels_alone():
    """In it SSIM is the mean of its map, computed once for the whole picture."""
    made = pair()
    region, scores = moving_region(made.input, made.target), score_prediction(made)
    assert scores["moving_share"] == region.mean() and list(scores) == [*NAMES, "moving_share", "sample", "copy"]
    for way, frame in (("sample", made.predicted.sample), ("copy", made.input)):
        error = (frame.astype(float) - made.target)[region]
        assert scores[way]["psnr"] == pytest.approx(10 * math.log10(255**2 / (error**2).mean()))
        whole, full = structural_similarity(made.target, frame, channel_axis=2, data_range=255, full=True)
        assert scores[way]["ssim"] == pytest.approx(full[region].mean()) != pytest.approx(whole)
        assert scores[way]["whole_ssim"] == pytest.approx(whole)
    assert scores["sample"]["psnr"] > scores["copy"]["psnr"]
    spoilt = made.predicted.sample.copy()
    spoilt[~region] = 0
    assert score_prediction(pair(sample=spoilt))["sample"]["psnr"] == pytest.approx(scores["sample"]["psnr"])
    every = score_prediction(pair(expected=made.target, ceiling=made.target))
    assert list(every) == [*NAMES, "moving_share", "sample", "expected", "copy", "vae_ceiling"]


def test_gradients_of_a_ramp():
    rows, columns = np.indices((12, 12))
    ramp = np.repeat((3 * rows + 4 * columns)[..., None], 3, axis=2).astype(np.uint8)
    region = np.zeros((12, 12), bool)
    region[4:8, 4:8] = True
    assert gradient_energy(ramp, region) == pytest.approx(5 / 255)  # hypot(3, 4)


def test_a_good_frame_is_sharp_and_better_placed_than_the_copy():
    target = pair().target
    exact = score_prediction(pair(sample=target))["sample"]
    assert exact["sharpness"] == 1 and exact["good_frame"] == 1
    too_sharp = np.clip(127 + 1.5 * (target.astype(float) - 127), 0, 255).astype(np.uint8)
    for frame, low, high in ((cv2.GaussianBlur(target, (0, 0), 0.6), 0.6, 0.7), (too_sharp, 1.25, 2)):
        scores = score_prediction(pair(sample=frame))
        assert low < scores["sample"]["sharpness"] < high and scores["sample"]["good_frame"] == 0
        assert scores["sample"]["ssim"] > scores["copy"]["ssim"]  # so it is its sharpness that tells


def test_a_good_frame_closes_a_tenth_of_what_the_copys_ssim_lacks():
    """Of frames that go from the copy to the target, all as sharp as those."""
    made = pair()
    closed = {}
    for rows in range(6, 23):
        frame = made.input.copy()
        frame[:rows] = made.target[:rows]
        scores = score_prediction(pair(sample=frame))
        share = (scores["sample"]["ssim"] - scores["copy"]["ssim"]) / (1 - scores["copy"]["ssim"])
        assert 0.8 < scores["sample"]["sharpness"] < 1.25
        closed[share] = scores["sample"]["good_frame"]
    assert all(is_good == (share >= 0.1) for share, is_good in closed.items())
    assert any(0.02 < share < 0.1 for share in closed) and any(share > 0.1 for share in closed)


@quick
@given(st.integers(0, 10_000), st.integers(0, 36), st.integers(0, 36))
def test_a_copy_is_never_a_good_frame(seed, row, column):
    start = noise(seed=seed)
    end = start.copy()
    end[row : row + 12, column : column + 12] = 255 - end[row : row + 12, column : column + 12]
    scores = score_prediction(pair(sample=start, copy=start, target=end))
    assert 0.8 < scores["copy"]["sharpness"] < 1.25
    assert not scores["copy"]["good_frame"] and not scores["sample"]["good_frame"]


def test_extreme_pictures_have_finite_scores():
    frame, large = noise(), np.zeros((256, 256, 3), np.uint8)
    assert psnr(frame, frame) == HIGHEST_PSNR
    assert 48.1 < psnr(frame + 1, frame) < 48.2  # an error of one level everywhere
    other = large.copy()
    other[0, 0, 0] = 1
    assert psnr(other, large) == HIGHEST_PSNR  # not better than identical ones
    plain = np.full((48, 48, 3), 10, np.uint8)
    scores = score_prediction(pair(target=plain, ceiling=plain))
    assert scores["vae_ceiling"]["sharpness"] == 0 and math.isfinite(scores["sample"]["sharpness"])


def test_region_is_what_differs_in_any_color_and_its_rim():
    still = np.full((96, 96, 3), 100, np.uint8)
    changed = still.copy()
    changed[40, 50, 2] = 100 - MOVING_THRESHOLD - 1
    changed[10, 10] = 100 + MOVING_THRESHOLD  # not more than the threshold
    region = moving_region(still, changed)
    rows, columns = np.indices(region.shape)
    assert np.array_equal(region, (rows - 40) ** 2 + (columns - 50) ** 2 <= 2**2)
    assert np.array_equal(region, moving_region(changed, still))


def test_pairs_without_motion_or_target_have_no_moving_region():
    still = score_prediction(pair(target=pair().input))
    assert still["moving_share"] == 0 and still["copy"]["whole_psnr"] == HIGHEST_PSNR
    assert still["copy"]["psnr"] is still["sample"]["good_frame"] is None
    assert score_prediction(pair(target=None)) == NAMES | {"moving_share": None}


# Many pairs.


@quick
@given(st.lists(numbers, min_size=2, max_size=40))
def test_intervals_are_those_of_paired_differences(values):
    """Students t over what each pair gains; the other way round it is the same, with the sign turned."""
    ours, theirs = pd.Series(values), pd.Series(range(len(values)), dtype=float)
    compared, turned = compare(ours, theirs), compare(theirs, ours)
    low, high = stats.t.interval(0.95, len(values) - 1, (ours - theirs).mean(), stats.sem(ours - theirs))
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert compared["gain"] == pytest.approx((ours - theirs).mean(), abs=slack) == pytest.approx(-turned["gain"])
    if (ours - theirs).std() > slack:
        assert 2 * compared["gain_half_width"] == pytest.approx(high - low, abs=slack)
    assert compared["gain_half_width"] == pytest.approx(turned["gain_half_width"], abs=slack)
    assert compared["better"] + turned["better"] <= 1 + 1e-9  # ties are better for none


def test_one_pair_has_no_interval():
    assert math.isnan(half_width(pd.Series([3.0])))
    assert compare(pd.Series([3.0]), pd.Series([1.0])) == {"gain": 2, "gain_half_width": None, "better": 1}


def test_summary_of_hand_made_scores():
    rows = [record("a", 30, 28), record("a", 26, 27, moving=False), record("b", 24, 20), UNSCORED]
    summary = summarize(rows)
    assert list(summary) == ["all", "a", "b"]
    assert [(group["num_pairs"], group["num_moving"]) for group in summary.values()] == [(3, 2), (2, 1), (1, 1)]
    everything = summary["all"]
    assert everything["num_without_target"] == 1 and "expected" not in everything
    assert everything["sample"]["psnr"]["value"] == 27 and everything["sample"]["psnr"]["gain"] == 3
    assert everything["sample"]["psnr"]["gain_half_width"] == pytest.approx(12.706, abs=1e-3)  # of 2 and 4
    assert everything["sample"]["sharpness"]["value"] == pytest.approx(0.9)
    medians = summarize([record("a", level, 20) for level in (21, 24, 60)])["all"]["sample"]
    assert (medians["sharpness"]["value"], medians["psnr"]["value"]) == (24 / 30, 35)
    assert (everything["sample"]["good_frame"]["value"], everything["copy"]["good_frame"]["value"]) == (1, 0)
    assert everything["copy"]["psnr"]["gain"] == everything["copy"]["psnr"]["better"] == 0
    assert everything["sample"]["whole_psnr"]["value"] == pytest.approx(80 / 3 + 9)  # where nothing moves too
    assert everything["sample"]["whole_psnr"]["better"] == pytest.approx(2 / 3)
    assert summary["b"]["sample"]["psnr"]["gain_half_width"] is None
    assert summarize([row | {"horizon": 10} for row in rows], by="horizon").keys() == {"all", "10"}
    json.dumps(summary, allow_nan=False)


def test_table_has_the_copy_and_paired_gains_in_every_group():
    rng = np.random.default_rng(5)
    tasks = ("move_object", "drop_object", "cover_object")
    rows = [record(tasks[n % 3], *rng.normal((27, 25), 1), n % 5 > 0, rng.normal(28)) for n in range(60)]
    summary = summarize(rows)
    head, *lines = format_table(summary).splitlines()
    assert all(metric.title in head for metric in METRICS.values()) and "PSNR - copy" in head
    assert len(lines) == 4 * 3 and max(map(len, lines)) <= 140
    for lines_of, (name, group) in zip((lines[start : start + 3] for start in range(0, 12, 3)), summary.items()):
        assert lines_of[0].lstrip().startswith(f"{name}, {60 if name == 'all' else 20} pairs")
        for way, line in zip(("sample", "expected", "copy"), lines_of):
            figures = group[way]
            assert f" {way} " in line and f" {figures['psnr']['value']:.2f} " in line
            gain = f"{figures['psnr']['gain']:+.2f} ± {figures['psnr']['gain_half_width']:.2f}"
            assert (gain in line) == (way != "copy")
            assert f"{figures['good_frame']['value']:.0%}" in line and f"{figures['sharpness']['value']:.2f}" in line


def test_table_of_pairs_without_motion_or_target():
    still = format_table(summarize([record("a", 30, 28, moving=False)]))
    assert "39.00" in still and "nan" not in still and "a, 1 pair " in still
    assert format_table(summarize([UNSCORED])) == "no pair has a frame to compare with"


def test_a_metric_is_added_in_one_place(monkeypatch):
    brightness = Metric("brightness", lambda c: float(c.frame[c.region].mean()), form=".1f")
    monkeypatch.setitem(METRICS, "brightness", brightness)
    made = pair()
    row = score_prediction(made)
    region = moving_region(made.input, made.target)
    assert row["copy"]["brightness"] == made.input[region].mean()
    head, line, *_ = format_table(summarize([row])).splitlines()
    assert head.endswith("brightness") and line.endswith(f"{made.predicted.sample[region].mean():.1f}")


def test_better_is_nearer_to_a_metrics_best(monkeypatch):
    """PSNR's is infinite, sharpness' 1, an error's 0."""
    error = Metric("error", lambda c: float(np.abs(c.frame.astype(float) - c.target).mean()), best=0)
    monkeypatch.setitem(METRICS, "error", error)
    sample = summarize([score_prediction(pair())])["all"]["sample"]
    assert sample["error"]["gain"] < 0 and sample["error"]["better"] == 1
    sharper, softer = (summarize([record("a", level, 30)])["all"]["sample"]["sharpness"] for level in (36, 24))
    assert sharper["gain"] > 0 > softer["gain"] and sharper["better"] == softer["better"] == 0  # the copy's is 1


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((2.0, 1.0, 3.0, 2.0), "better than copying: +2.00 ± 1.30 dB, better on 4 of 4 pairs; good frames 100%"),
        ((-2.0, -1.0, -3.0, -2.0), "worse than copying: -2.00 ± 1.30 dB, better on 0 of 4 pairs; good frames 0%"),
        ((2.0, -1.0, 3.0, -2.0), "not clearly better than copying: +0.50 ± 3.79 dB, better on 2 of 4 pairs; "),
        ((2.0,), "not clearly better than copying: +2.00 dB, better on 1 of 1 pair"),  # one says little
    ],
)
def test_verdict_is_as_sure_as_the_interval(gains, said):
    group = summarize([*(record("a", 30 + gain, 30) for gain in gains), record("a", 30, 30, moving=False)])["all"]
    assert verdict(group).startswith(f"where something moves the prediction is {said}")
    assert "nothing moves" in verdict(summarize([record("a", 30, 28, moving=False)])["all"])


def test_a_vae_that_draws_worse_than_copying_is_said():
    made = pair(ceiling=np.zeros_like(noise()))
    words = verdict(summarize([score_prediction(made)])["all"])
    assert words.startswith("this model's VAE cannot draw such pictures: the true frames have ")


def records(*psnrs, copy=20, **changes):
    """Pairs named "0", "1", …, the PSNR of whose samples is given."""
    return [record("a", level, copy, video_id=str(number), **changes) for number, level in enumerate(psnrs)]


def test_two_runs_are_compared_pair_by_pair():
    """The pairs differ by far more than the runs do; the third has no counterpart."""
    ours, theirs = records(22, 31, 25), records(21, 29)
    compared, unpaired = paired_difference(ours, theirs[::-1])  # the order does not matter
    assert unpaired == [("2", "not scored alike in both")] and compared["num_moving"] == 2
    assert (compared["psnr"]["gain"], compared["psnr"]["better"]) == (1.5, 1)
    assert compared["psnr"]["gain_half_width"] == pytest.approx(12.706 / 2, abs=1e-3)
    assert paired_difference(theirs, ours)[0]["psnr"]["gain"] == -1.5
    _, unpaired = paired_difference(records(22, 31), records(22) + records(22, 31, copy=21)[1:])
    assert unpaired == [("1", "not scored alike in both")]  # of other frames: copying scores differently


def test_runs_without_common_frames_are_not_compared():
    for others in ([], [UNSCORED | {"video_id": "0"}], records(21, copy=19), records(21, moving=False)):
        with pytest.raises(UserError, match="no video and frames in common"):
            paired_difference(records(22), others)
