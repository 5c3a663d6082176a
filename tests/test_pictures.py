"""Comparison pictures, sheets of them, the plot, and films."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pecn.pictures import (
    GAP,
    PANEL_SIDE,
    color_map,
    comparison_picture,
    describe_scores,
    panel_row,
    save_gif,
    save_scores_plot,
    sheet,
)
from pecn.sampling import PredictedFrame, Prediction
from pecn.scores import score_prediction
from tests.conftest import SIDE


def prediction(quality: float = 0.7, several: bool = True) -> Prediction:
    """A bright square that moves over noise; the sample has a part `quality` of it there, the expected frame half."""
    rng = np.random.default_rng(0)
    start, end = rng.integers(60, 90, (2, SIDE, SIDE, 3), dtype=np.uint8)[[0, 0]]
    start[4:12, 4:12] = end[4:12, 18:26] = 240
    sample = (start + quality * (end.astype(float) - start)).round().astype(np.uint8)
    mean = ((start.astype(int) + end) // 2).astype(np.uint8)
    spread = np.full((SIDE, SIDE), 5.125, np.float32)
    predicted = PredictedFrame(sample, *((mean, spread) if several else (None, None)))
    prompt = "Generate a future frame of this action: moving a thing"
    return Prediction("video", "move_object", prompt, start, predicted, end, end)


def compare(prediction: Prediction, note: str = "") -> np.ndarray:
    return comparison_picture(prediction, score_prediction(prediction), note)


def panels(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The middle of each panel of a picture, without the words above."""
    width = picture.shape[1] // count
    return [picture[-150:-GAP, number * width + 20 : (number + 1) * width - 20] for number in range(count)]


def test_comparison_shows_frames_and_maps_in_order():
    def flat(level):
        return np.full((SIDE, SIDE, 3), level, np.uint8)

    predicted = PredictedFrame(flat(100), flat(120), np.full((SIDE, SIDE), 16.0, np.float32))
    pair = replace(prediction(), input=flat(50), predicted=predicted, target=flat(148))
    shown = panels(compare(pair), 6)
    assert [int(np.median(panel)) for panel in shown[:4]] == [50, 100, 120, 148]
    difference, spread = color_map(np.array([48.0]), "inferno", 64), color_map(np.array([16.0]), "viridis", 32)
    assert (shown[4] == difference[0]).all() and (shown[5] == spread[0]).all()  # of the sample
    single = replace(pair, predicted=PredictedFrame(flat(100), None, None))
    shown = panels(compare(single), 4)
    assert [int(np.median(panel)) for panel in shown[:3]] == [50, 100, 148] and (shown[3] == difference[0]).all()
    shown = panels(compare(replace(pair, target=None, vae_ceiling=None)), 4)
    assert [int(np.median(panel)) for panel in shown[:3]] == [50, 100, 120] and (shown[3] == spread[0]).all()


@pytest.mark.parametrize(("side", "factor"), [(32, 6), (96, 2), (128, 2), (192, 1), (300, 1)])
def test_panels_are_enlarged_by_whole_factors(side, factor):
    frame = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = panel_row([("one", frame), ("two", frame[::-1])])
    assert picture.shape[1] == 2 * (factor * side + GAP) + GAP and factor * side >= PANEL_SIDE
    shown = picture[-GAP - factor * side : -GAP, GAP : GAP + factor * side]
    assert np.array_equal(shown, Image.fromarray(frame).resize((factor * side,) * 2, Image.Resampling.BICUBIC))


def test_words_stay_within_the_picture():
    picture = compare(
        replace(prediction(), edit_prompt="pushing a wide cup " * 50), note="outputs/20_to_25/model " * 20
    )
    assert (picture[:, -GAP:] == 255).all() and (picture[-GAP:] == 255).all()
    assert len(picture) > len(compare(prediction())) + 100  # more lines


def test_words_tell_what_is_a_good_frame_beside_the_copy():
    target = prediction().target
    predicted = PredictedFrame(target, cv2.GaussianBlur(target, (0, 0), 2), None)
    words = describe_scores(score_prediction(replace(prediction(), predicted=predicted)))
    moving, sample, expected, copy = words.replace("picture): ", "picture); ").split("; ")
    assert moving.startswith("where something moves (")
    assert sample == "sample 100.0 dB, SSIM 1.000, sharpness 1.00 (good frame)"
    assert expected.startswith("expected ") and "good frame" not in expected + copy and copy.startswith("copy ")
    still = replace(prediction(), target=prediction().input)
    assert describe_scores(score_prediction(still)).startswith("nothing moves; PSNR of the whole picture: sample ")
    assert describe_scores(score_prediction(replace(still, target=None))) == "no target frame, not scored"


def test_a_sheet_has_pictures_of_any_size_in_order():
    rows = [np.full((height, width, 3), height, np.uint8) for height, width in ((20, 30), (10, 40), (15, 40))]
    for columns in (1, 2):
        made = sheet(rows, columns)
        assert made.shape == (20 * -(-3 // columns), 40 * columns, 3)
        for place, row in enumerate(rows):
            top, left = 20 * (place // columns), 40 * (place % columns)
            assert np.array_equal(made[top : top + len(row), left : left + row.shape[1]], row)
        assert made[19, 39].tolist() == made[-1, -1].tolist() == [255] * 3


def record(sample, copy, moving=True, expected=None, sharpness=0.9):
    levels = {"sample": sample, "expected": expected, "copy": copy}
    scores = {"sharpness": sharpness, "good_frame": float(sample > copy)}
    return {"moving_share": 0.1 * moving} | {way: scores | {"psnr": psnr} for way, psnr in levels.items() if psnr}


def dots(monkeypatch, rows):
    """What the plot shows, and its figure."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    save_scores_plot(Path("plot.png"), rows, "outputs/run, frame 20 to 25")
    [axes] = drawn[0].axes
    return {scatter.get_label(): scatter.get_offsets().tolist() for scatter in axes.collections}, axes


def test_plot_shows_what_is_gained_and_how_sharp_it_is(monkeypatch):
    rows = [record(25.0 + n, 22.0, expected=26.0, sharpness=0.5 + n) for n in range(3)]
    rows += [record(21.0, 22.0, expected=24.0, sharpness=2.0), record(40.0, 100.0, moving=False)]
    shown, axes = dots(monkeypatch, rows)
    samples = [[3.0, 0.5], [4.0, 1.5], [5.0, 2.5], [-1.0, 2.0]]
    assert shown == {"sample": samples, "expected": [[4.0, 0.5], [4.0, 1.5], [4.0, 2.5], [2.0, 2.0]]}
    [copy] = axes.lines
    assert copy.get_label() == "copy" and np.asarray(copy.get_xydata()).tolist() == [[0, 1]]
    assert axes.get_title().endswith("good frames: 3 of 4")
    assert dots(monkeypatch, [record(25.0, 22.0)])[0] == {"sample": [[3.0, 0.9]]}


def test_plot_of_nothing_that_moves(tmp_path):
    """With a path in its title that mathtext would stumble over."""
    save_scores_plot(tmp_path / "plot.png", [record(40.0, 100.0, moving=False)], "outputs/$odd_{name$")
    assert Image.open(tmp_path / "plot.png").width > 100


def test_a_small_object_keeps_its_color_in_a_film(tmp_path):
    frames = [np.random.default_rng(n).integers(60, 200, (64, 64, 3), dtype=np.uint8) for n in range(3)]
    for place, frame in enumerate(frames):
        frame[8:12, 8 * place : 8 * place + 4] = (250, 20, 20)
    save_gif(tmp_path / "film.gif", frames, [0.25, 0.25, 1.5])
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for place, duration in enumerate((250, 250, 1500)):
            film.seek(place)
            assert film.info["duration"] == duration
            shown = np.asarray(film.convert("RGB")).astype(int)[8:12, 8 * place : 8 * place + 4]
            assert np.abs(shown - (250, 20, 20)).max() < 40
