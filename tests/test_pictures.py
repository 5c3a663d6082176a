"""Comparison pictures, the overview, the plot, and the folder an evaluation leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import pecn.pictures
from data.cli import UserError
from pecn.pictures import (
    GAP,
    LINE_HEIGHT,
    check_output_dir,
    choose_for_overview,
    color_map,
    comparison_picture,
    describe_scores,
    save_results,
    save_scores_plot,
)
from pecn.sampling import Prediction
from pecn.scores import score_prediction, summarize
from pecn.validation import pictures_by_sentence

SIDE = 32
PANEL = 256
TASKS = ("move_object", "drop_object", "cover_object")


RESULTS = ["metrics.json", "overview.png", "random_pairs.png", "samples", "scores.png"]


def result(number: int = 0, quality: float = 0.7, target: bool = True, several: bool = True) -> Prediction:
    """A bright square that moves over noise; the sample has a part `quality` of it there, the expected frame half."""
    rng = np.random.default_rng(number)
    start, end = rng.integers(60, 90, (2, SIDE, SIDE, 3), dtype=np.uint8)[[0, 0]]
    start[4:12, 4:12] = end[4:12, 18:26] = 240
    predicted = (start + quality * (end.astype(float) - start) + rng.normal(0, 1, start.shape)).round()
    return Prediction(
        video_id=f"video{number}",
        task=TASKS[number % 3],
        edit_prompt=f"Generate a future frame of this action: moving thing {number} from left to right",
        input=start,
        sample=predicted.clip(0, 255).astype(np.uint8),
        expected=((start.astype(int) + end) // 2).astype(np.uint8) if several else None,
        target=end if target else None,
        vae_ceiling=end + 4 if target else None,
        uncertainty=np.full((SIDE, SIDE), 5.125, np.float32) if several else None,
    )


def compare(prediction: Prediction, note: str = "") -> np.ndarray:
    return comparison_picture(prediction, score_prediction(prediction), note)


def panels(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The middle of each panel of a comparison picture."""
    width = picture.shape[1] // count
    return [picture[60:250, number * width + 20 : (number + 1) * width - 20] for number in range(count)]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_comparison_shows_frames_maps_and_words():
    levels = {"input": 50, "sample": 100, "expected": 120, "target": 148, "vae_ceiling": 148}
    frames = {name: np.full((SIDE, SIDE, 3), level, np.uint8) for name, level in levels.items()}
    pair = replace(result(), **frames, uncertainty=np.full((SIDE, SIDE), 16.0, np.float32))
    shown = panels(compare(pair, "step 7"), 6)
    assert [int(np.median(panel)) for panel in shown[:4]] == [50, 100, 120, 148]
    difference, middle = color_map(np.array([48.0, 16.0]), "inferno", 64), color_map(np.array([16.0]), "viridis", 32)
    assert (shown[4] == difference[0]).all() and (shown[5] == middle[0]).all()  # of the sample
    single = replace(pair, expected=None, uncertainty=None)
    shown = panels(compare(single, "step 7"), 4)
    assert [int(np.median(panel)) for panel in shown[:3]] == [50, 100, 148] and (shown[3] == difference[0]).all()
    assert compare(single).shape[0] < compare(single, "step 7").shape[0]


def test_maps_show_where_the_error_is():
    picture = compare(result(quality=0))
    brightness = panels(picture, 6)[4].astype(int).sum(axis=2)
    square, still = brightness[0:20, 145:190], brightness[120:, :]  # the target's place is dark without the square
    assert square.mean() > 500 > 30 > still.mean()


def test_comparison_without_a_target_shows_what_there_is():
    without, full = compare(result(target=False)), compare(result())
    assert np.array_equal(without[28:284, :792], full[28:284, :792])  # input, sample and expected frame
    uncertainty = panels(without, 4)[3]
    assert (uncertainty == color_map(np.array([5.125]), "viridis", 32)).all()
    assert describe_scores(score_prediction(result(target=False))) == ["no target frame, not scored"]


@pytest.mark.parametrize(("side", "factor"), [(32, 8), (96, 3), (128, 2), (256, 1), (300, 1)])
def test_panels_are_enlarged_by_whole_factors(side, factor):
    frame = np.zeros((side, side, 3), np.uint8)
    large = replace(result(several=False), input=frame, sample=frame, target=frame, vae_ceiling=frame)
    assert compare(large).shape[1] == 4 * (side * factor + 8) + 8


def test_words_stay_within_the_picture():
    picture = compare(replace(result(), edit_prompt="pushing a wide cup " * 50), note="outputs/20_to_25/model" * 20)
    assert (picture[:, -8:] == 255).all() and (picture[-6:] == 255).all()


def test_words_tell_what_is_a_frame_and_what_beats_the_copy():
    target = result().target
    pair = replace(result(), sample=target, expected=cv2.GaussianBlur(target, (0, 0), 2))
    title, sample, expected, others = describe_scores(score_prediction(pair))
    assert title.startswith("Where something moves (") and title.endswith("% of the picture):")
    assert sample.startswith("sample: a frame, sharpness 1.00, SSIM 1.000, PSNR 100.0 dB, ")
    assert expected.startswith("expected: not a frame, sharpness ") and expected.endswith(" dB better than copying.")
    assert others.startswith("copy: SSIM ") and "; VAE ceiling: SSIM " in others
    without_ceiling = describe_scores(score_prediction(replace(pair, vae_ceiling=None)))
    assert without_ceiling == [title, sample, expected, f"{others.split(';')[0]}."]
    worse = replace(result(several=False), sample=np.zeros((SIDE, SIDE, 3), np.uint8))
    title, sample, others = describe_scores(score_prediction(worse))
    assert "not a frame" in sample and "worse than copying" in sample
    copied = replace(result(), sample=result().input)
    sample = describe_scores(score_prediction(copied))[1]
    assert "not a frame" in sample and "as good as copying" in sample
    still = replace(copied, target=result().input)
    assert describe_scores(score_prediction(still)) == [
        "Nothing moves. PSNR of the whole picture: sample 100.0, copy 100.0 dB."
    ]


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
        assert [int(title.split()[1]) for _, title in chosen[:3]] == [1, 2, 3]


def test_results_are_written_as_promised(tmp_path):
    made = [result(number, quality=number / 11) for number in range(11)] + [result(11, target=False, several=False)]
    (tmp_path / "samples" / "old").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    summary = save_results(iter(made), tmp_path, "model, frame 20 to 25")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.json",
        "notes.txt",
        "overview.png",
        "random_pairs.png",
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
        files = {"input": row.input, "prediction": row.sample, "expected": row.expected, "target": row.target}
        for name, picture in files.items():
            if picture is None:
                assert not (folder / f"{name}.png").exists()
            else:
                assert np.array_equal(np.asarray(Image.open(folder / f"{name}.png")), picture)
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


def test_sheet_shows_the_first_pairs_two_in_a_row(tmp_path):
    made = [result(number) for number in range(22)]
    save_results(made, tmp_path, "model")
    sheet, side = np.asarray(Image.open(tmp_path / "random_pairs.png")), 2 * made[0].input.shape[0]
    bar = LINE_HEIGHT + GAP  # with the columns' names above all, and with the sentence above each pair
    height, width = side + bar, sheet.shape[1] // 2
    assert len(sheet) == bar + 10 * height
    for number in (0, 1, 19):
        row, column = divmod(number, 2)
        strip = sheet[bar + row * height :, column * width :][bar:height]
        for place, field in enumerate(("input", "sample", "expected", "target")):
            enlarged = Image.fromarray(getattr(made[number], field)).resize((side, side), Image.Resampling.BICUBIC)
            # Enlarged side by side, neighbors mix at the edges alone.
            inner = slice(4, -4), slice(4, -4)
            assert np.array_equal(strip[:, place * side : (place + 1) * side][inner], np.asarray(enlarged)[inner])


def test_pairs_of_one_sentence_have_each_their_picture_while_training():
    first, other = result(0), replace(result(1), task=TASKS[0], edit_prompt=result(0).edit_prompt)
    pictures = pictures_by_sentence([first, other])
    tag = "validation_move_object/moving thing 0 from left to right"
    assert list(pictures) == [tag, f"{tag} (video1)"]
    assert not np.array_equal(*pictures.values())


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
    assert sorted(path.name for path in tmp_path.iterdir()) == RESULTS


def record(task, sample, copy, moving=True, expected=None, sharpness=0.9):
    psnr = {"sample": sample, "expected": expected, "copy": copy, "vae_ceiling": 40.0}
    psnr = {way: value for way, value in psnr.items() if value is not None}
    part = {"psnr": psnr, "share": 0.1, "sharpness": dict.fromkeys(psnr, sharpness)}
    part["is_frame"] = {way: value > copy for way, value in psnr.items()}
    return {"task": task, "psnr": psnr, "moving": part if moving else None}


def drawn_axes(monkeypatch, rows):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    save_scores_plot(Path("plot.png"), rows, "outputs/$odd_{name$, frame 20 to 25")
    return drawn[0].axes


def dots(axes):
    return {scatter.get_label(): scatter.get_offsets().tolist() for scatter in axes.collections}


def test_plot_shows_every_pair_beside_copying(monkeypatch):
    rows = [record("a", 25.0 + n, 22.0 + n) for n in range(4)] + [record("b", 40.0, 100.0, moving=False)]
    _, moving, whole = drawn_axes(monkeypatch, rows)
    of_a = [[22.0 + n, 25.0 + n] for n in range(4)]
    assert (dots(whole), dots(moving)) == ({"a": of_a, "b": [[60.0, 40.0]]}, {"a": of_a})
    assert "better than copying\non 4 of 5 pairs" in whole.get_title()


def test_plane_shows_what_is_gained_and_how_sharp_it_is(monkeypatch):
    rows = [record("a", 25.0 + n, 22.0, expected=26.0, sharpness=0.5 + n) for n in range(3)]
    rows += [record("a", 21.0, 22.0, expected=24.0, sharpness=2.0), record("b", 40.0, 100.0, moving=False)]
    plane, *_ = drawn_axes(monkeypatch, rows)
    samples = [[3.0, 0.5], [4.0, 1.5], [5.0, 2.5], [-1.0, 2.0]]
    assert dots(plane) == {"sample": samples, "expected": [[4.0, 0.5], [4.0, 1.5], [4.0, 2.5], [2.0, 2.0]]}
    [copy] = plane.lines
    assert copy.get_label() == "copy" and copy.get_xydata().tolist() == [[0, 1]]
    assert plane.get_title().endswith("the sample deserves\nthe name of a frame on 3 of 4 pairs")
    assert "PSNR" in plane.get_xlabel() and "sharpness" in plane.get_ylabel()
    sample, expected = (scatter.get_facecolor()[0].tolist() for scatter in plane.collections)
    assert sample != expected
    alone, *_ = drawn_axes(monkeypatch, [record("a", 25.0, 22.0)])
    assert dots(alone) == {"sample": [[3.0, 0.9]]}


def test_results_without_any_scored_pair(tmp_path):
    summary = save_results([result(target=False)], tmp_path, "model, $a_{b$")
    assert summary["num_samples"] == 0
    assert (tmp_path / "overview.png").is_file() and (tmp_path / "scores.png").is_file()
