"""Comparison pictures, the overview, the plot, and the folder an evaluation leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

import pecn.pictures
from data.layout import UserError
from pecn.pictures import (
    check_output_dir,
    choose_for_overview,
    color_map,
    comparison_picture,
    describe_scores,
    save_results,
    save_scores_plot,
    stack,
    wrap_text,
)
from pecn.sampling import Prediction
from pecn.scores import score_prediction, summarize

SIDE = 32
PANEL = 256
TASKS = ("move_object", "drop_object", "cover_object")


def result(number: int = 0, quality: float = 0.7, target: bool = True, uncertainty: bool = True) -> Prediction:
    """A bright square that moves over noise; the prediction has it there by a part of `quality`."""
    rng = np.random.default_rng(number)
    start, end = rng.integers(60, 90, (2, SIDE, SIDE, 3), dtype=np.uint8)[[0, 0]]
    start[4:12, 4:12] = end[4:12, 18:26] = 240
    prediction = (start + quality * (end.astype(float) - start) + rng.normal(0, 1, start.shape)).round()
    return Prediction(
        video_id=f"video{number}",
        task=TASKS[number % 3],
        edit_prompt=f"Generate a future frame of this action: moving thing {number} from left to right",
        input=start,
        prediction=prediction.clip(0, 255).astype(np.uint8),
        target=end if target else None,
        vae_ceiling=end + 4 if target else None,
        uncertainty=np.full((SIDE, SIDE), 5.125, np.float32) if uncertainty else None,
    )


def panels(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The middle of each panel of a comparison picture."""
    width = picture.shape[1] // count
    return [picture[60:250, number * width + 20 : (number + 1) * width - 20] for number in range(count)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_comparison_shows_frames_maps_and_words():
    frames = {name: np.full((SIDE, SIDE, 3), level, np.uint8) for name, level in (("input", 50), ("prediction", 100))}
    target = np.full((SIDE, SIDE, 3), 148, np.uint8)
    pair = replace(result(), **frames, target=target, vae_ceiling=target)
    uncertainty = np.full((SIDE, SIDE), 16.0, np.float32)
    picture = comparison_picture(replace(pair, uncertainty=uncertainty), "step 7")
    shown = panels(picture, 5)
    assert [int(np.median(panel)) for panel in shown[:3]] == [50, 100, 148]
    difference, middle = color_map(np.array([48.0, 16.0]), "inferno", 64), color_map(np.array([16.0]), "viridis", 32)
    assert (shown[3] == difference[0]).all() and (shown[4] == middle[0]).all()
    without_spread = comparison_picture(replace(pair, uncertainty=None), "step 7")
    assert [int(np.median(panel)) for panel in panels(without_spread, 4)[:3]] == [50, 100, 148]
    assert picture.shape[0] == without_spread.shape[0]
    assert comparison_picture(replace(pair, uncertainty=None)).shape[0] < without_spread.shape[0]  # no note


def test_maps_show_where_the_error_is():
    picture = comparison_picture(result(quality=0))
    brightness = panels(picture, 5)[3].astype(int).sum(axis=2)
    square, still = brightness[0:20, 145:190], brightness[120:, :]  # the target's place is dark without the square
    assert square.mean() > 500 > 30 > still.mean()


def test_comparison_keeps_its_columns_without_a_target():
    picture = comparison_picture(result(target=False))
    assert picture.shape[1] == comparison_picture(result()).shape[1]
    shown = panels(picture, 5)
    assert [int(np.median(panel)) for panel in shown[2:4]] == [235, 235]
    assert describe_scores(score_prediction(result(target=False))) == ["no target frame, not scored"]


@pytest.mark.parametrize(("side", "factor"), [(32, 8), (96, 3), (128, 2), (256, 1), (300, 1)])
def test_panels_are_enlarged_by_whole_factors(side, factor):
    frame = np.zeros((side, side, 3), np.uint8)
    large = replace(result(uncertainty=False), input=frame, prediction=frame, target=frame, vae_ceiling=frame)
    assert comparison_picture(large).shape[1] == 4 * (side * factor + 8) + 8


def test_words_of_any_length_and_script_stay_within_the_picture():
    for prompt in ("x" * 100_000, "推杯子 " * 300, "a 🙂 cup\n\n\tup", ""):
        picture = comparison_picture(replace(result(), edit_prompt=prompt), note="n" * 500)
        assert picture.shape[0] < 1000
        assert (picture[:, -8:] == 255).all() and (picture[-6:] == 255).all()


def test_scores_say_better_or_worse_than_copying():
    lines = describe_scores(score_prediction(result()))
    assert "better than copying" in lines[0] and lines[1].startswith("Where something moves (")
    worse = replace(result(), prediction=np.zeros((SIDE, SIDE, 3), np.uint8))
    assert all("worse than copying" in line for line in describe_scores(score_prediction(worse)))
    frame = result().input
    still = replace(result(), target=frame, prediction=frame)
    lines = describe_scores(score_prediction(still))
    assert "as good as copying" in lines[0] and lines[1] == "Nothing moves."


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12), max_size=80), st.integers(200, 1200))
def test_wrapped_lines_lose_nothing(words, width):
    assert " ".join(wrap_text(" ".join(words), ImageFont.load_default(size=13), width)).split() == words


def test_stack_keeps_every_picture():
    pictures = [np.full((10 + index, 8 - index, 3), index, np.uint8) for index in range(3)]
    stacked = stack(pictures)
    assert stacked.shape == (33, 8, 3)
    assert [(stacked[..., 0] == index).sum() for index in range(3)] == [80, 77, 72]


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-50, 50)), max_size=60))
def test_overview_takes_best_median_and_worst(gains):
    chosen = choose_for_overview(gains)
    indices = [index for index, _ in chosen]
    scored = sorted((gain for gain in gains if gain is not None), reverse=True)
    assert len(set(indices)) == len(indices) == min(9, len(scored) or len(gains))
    if not scored:
        assert all(title == "not scored" for _, title in chosen)
    elif len(scored) <= 9:
        assert [gains[index] for index in indices] == scored
    else:
        middle = (len(scored) - 3) // 2
        assert [gains[index] for index in indices] == scored[:3] + scored[middle : middle + 3] + scored[-3:]
        assert [title.split(":")[0] for _, title in chosen] == ["Best"] * 3 + ["Median"] * 3 + ["Worst"] * 3


def test_results_are_written_as_promised(tmp_path):
    made = [result(number, quality=number / 11) for number in range(11)] + [result(11, target=False, uncertainty=False)]
    (tmp_path / "samples" / "old").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    summary = save_results(iter(made), tmp_path, "model, frame 20 to 25")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.json",
        "notes.txt",
        "overview.png",
        "samples",
        "scores.png",
    ]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {row.video_id for row in made}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = [
        {key: getattr(row, key) for key in ("video_id", "task", "edit_prompt")} | score_prediction(row) for row in made
    ]
    assert metrics == {"summary": json.loads(json.dumps(summarize(expected))), "samples": expected}
    assert json.loads(json.dumps(summary)) == metrics["summary"]
    for row in made:
        folder = tmp_path / "samples" / row.video_id
        for name in ("input", "prediction", "target"):
            if getattr(row, name) is None:
                assert not (folder / f"{name}.png").exists()
            else:
                assert np.array_equal(np.asarray(Image.open(folder / f"{name}.png")), getattr(row, name))
        assert (folder / "comparison.png").is_file()
    spread = np.asarray(Image.open(tmp_path / "samples" / "video0" / "uncertainty.png"))
    assert spread.dtype == np.uint16 and (spread == 256 * 5.125).all()
    assert not (tmp_path / "samples" / "video11" / "uncertainty.png").exists()


def test_overview_holds_the_chosen_comparisons_in_order(tmp_path):
    made = [result(number, quality=quality) for number, quality in enumerate((0.1, 0.9, 0.5))]
    save_results(made, tmp_path, "model")
    overview = np.asarray(Image.open(tmp_path / "overview.png"))
    height = overview.shape[0] // 3
    for place, number in enumerate((1, 2, 0)):
        comparison = np.asarray(Image.open(tmp_path / "samples" / f"video{number}" / "comparison.png"))
        shown = overview[place * height : (place + 1) * height, : comparison.shape[1]]
        assert np.array_equal(shown[height - comparison.shape[0] :], comparison)


def test_results_may_come_one_by_one(tmp_path, monkeypatch):
    """No more pictures are kept than the one at hand, so the number of pairs does not matter for memory."""
    alive, most = 0, 0

    class Counted(Prediction):
        def __init__(self, number):
            nonlocal alive, most
            super().__init__(**vars(result(number)))
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(pecn.pictures, "save_scores_plot", lambda path, *_: path.write_bytes(b""))
    save_results((Counted(number) for number in range(12)), tmp_path, "model")
    assert most <= 2


def test_interrupted_run_leaves_the_former_results_whole(tmp_path):
    save_results([result(0)], tmp_path, "former")
    former = snapshot(tmp_path)

    def results(error: BaseException):
        yield result(1)
        raise error

    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError("a full disk"), UserError)):
        with pytest.raises(raised):
            save_results(results(error), tmp_path, "new")
        assert snapshot(tmp_path) == former
        assert not list(tmp_path.glob(".*"))


def test_a_folder_of_samples_that_is_not_ours_is_refused(tmp_path):
    check_output_dir(tmp_path / "new")
    (tmp_path / "samples").mkdir()
    with pytest.raises(UserError, match="samples is not from an earlier run .* choose another OUTPUT_DIR"):
        check_output_dir(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    check_output_dir(tmp_path)


def test_a_disk_that_refuses_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot write the results to .*file/run: Not a directory"):
        save_results([result()], tmp_path / "file" / "run", "model")


def test_leftovers_of_a_killed_run_do_no_harm(tmp_path):
    (tmp_path / ".new.partial" / "samples" / "video0").mkdir(parents=True)
    save_results([result(0)], tmp_path, "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "overview.png", "samples", "scores.png"]


def dots(path: Path, color: tuple[int, int, int]) -> tuple[int, int]:
    """How many pixels of a color the plot's left and right half have above the legend."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)[:640]
    is_close = np.abs(picture - color).max(axis=2) < 60
    middle = picture.shape[1] // 2
    return int(is_close[:, :middle].sum()), int(is_close[:, middle:].sum())


def test_plot_has_a_dot_for_every_pair_even_beyond_its_axes(tmp_path):
    def record(task, prediction, copy, moving):
        psnr = {"prediction": prediction, "copy": copy, "vae_ceiling": 40.0}
        return {"task": task, "psnr": psnr, "moving": {"psnr": psnr, "share": 0.1} if moving else None}

    blue, orange = (0, 114, 178), (213, 94, 0)
    rows = [record("a $x_1^", 25 + n, 22 + n, True) for n in range(4)]
    save_scores_plot(tmp_path / "plot.png", rows, "outputs/$odd_{name, frame 20 to 25")
    left, right = dots(tmp_path / "plot.png", blue)
    assert left == right > 0 and dots(tmp_path / "plot.png", orange) == (0, 0)
    save_scores_plot(tmp_path / "plot.png", [*rows, record("b", 40.0, 100.0, False)])
    more, same = dots(tmp_path / "plot.png", blue)
    assert same == right and more > 0.8 * left  # the pair at 100 dB does not squeeze the others
    left, right = dots(tmp_path / "plot.png", orange)
    assert left > 0 == right


def test_plot_without_any_scored_pair_says_so(tmp_path):
    save_scores_plot(tmp_path / "plot.png", [{"task": "a", "psnr": None, "moving": None}])
    assert dots(tmp_path / "plot.png", (0, 114, 178)) == (0, 0)
    summary = save_results([result(target=False)], tmp_path / "run", "model")
    assert summary["num_samples"] == 0 and (tmp_path / "run" / "overview.png").is_file()
