"""benchmarks/score_folder.py: pictures of another system, scored as sampling scores its own."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data.clips import DEFAULT_CHOICE, draw_pairs, find_clips
from data.paths import filtered_annotations_path, frames_dir, read_annotations
from pecn.pictures import save_results
from pecn.sampling import predict_pairs
from pecn.sampling_options import SamplingOptions
from tests.conftest import SIDE, make_tiny_pipeline, run

VIDEOS = ("val0", "val1", "val2")


def score(data_dir, *options, check=True):
    command = ["python", "-m", "benchmarks.score_folder", "--frames_dir", frames_dir(data_dir, SIDE)]
    return run(*command, "--val_annotations", filtered_annotations_path(data_dir, "val"), *options, check=check)


@pytest.fixture(scope="module")
def sampled(data_dir, tmp_path_factory):
    """What sampling leaves: four pairs, one of which has no target."""
    entries = read_annotations(filtered_annotations_path(data_dir, "val"))
    clips, _ = find_clips(entries, frames_dir(data_dir, SIDE), DEFAULT_CHOICE, target_required=False)
    options = SamplingOptions(num_inference_steps=1, num_predictions=2)
    folder = tmp_path_factory.mktemp("sampled")
    pairs = draw_pairs(clips, DEFAULT_CHOICE, seed=0)
    save_results(predict_pairs(make_tiny_pipeline(), pairs, 42, 4, options, show_progress=False), folder, "")
    return folder


def scores_by_video(folder):
    return {row["video_id"]: row for row in json.loads((folder / "metrics.json").read_text())["samples"]}


def picture_of(sampled, video_id, name="prediction"):
    return np.asarray(Image.open(sampled / "samples" / video_id / f"{name}.png"))


def save_as(folder, pictures):
    folder.mkdir()
    for video_id, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{video_id}.png")
    return folder


def assert_same_figures(scored, sampled):
    """Those of the sample and of copying; sampling's own have more ways."""
    own = scores_by_video(sampled)
    assert sorted(scored) == list(VIDEOS)
    for video_id, row in scored.items():
        groups = [(row, own[video_id], ("psnr", "ssim"))]
        groups.append((row["moving"], own[video_id]["moving"], ("psnr", "ssim", "mae", "sharpness", "is_frame")))
        for group, expected, metrics in groups:
            for metric in metrics:
                assert group[metric] == {way: expected[metric][way] for way in ("sample", "copy")}


def test_own_and_foreign_folders_have_samplings_own_figures(data_dir, sampled, tmp_path):
    foreign = {video_id: picture_of(sampled, video_id) for video_id in (*VIDEOS, "val_short")}
    foreign["stranger"] = foreign["val0"]
    foreign["val1"] = np.dstack([foreign["val1"], np.full((SIDE, SIDE), 255, np.uint8)])  # with an alpha channel
    folder = save_as(tmp_path / "foreign", foreign)
    done = score(data_dir, "--predictions", folder, "--against", sampled, "--output_dir", tmp_path / "out")
    assert_same_figures(scores_by_video(tmp_path / "out"), sampled)
    annotations = filtered_annotations_path(data_dir, "val")
    first, second = (line for line in done.stdout.splitlines() if " left out: " in line)
    assert first.startswith(f"{folder}: 2 videos left out: ")
    assert "1 without frame 21 (val_short)" in first and f"1 not in {annotations} (stranger)" in first
    assert second == f"{sampled}: 1 videos left out: 1 without frame 21 (val_short)"
    own, difference = done.stdout.split(f"sample: {folder}, other: {sampled}\n")
    assert "move_object: 1 pairs" in own and "sample - copy" in own and "VAE" not in own
    assert "sample - other" in difference and "+0.00 ± 0.00" in difference  # the same pictures
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"metrics.json", "overview.png", "random_pairs.png", "samples", "scores.png"}


def test_strips_need_neither_frames_nor_annotations(sampled, tmp_path):
    def strips(name, video_ids):
        panels = {
            video_id: [picture_of(sampled, video_id, part) for part in ("input", "target", name)]
            for video_id in video_ids
        }
        return save_as(tmp_path / name, {video_id: np.hstack(parts) for video_id, parts in panels.items()})

    better, worse = strips("target", VIDEOS), strips("prediction", VIDEOS[:2])
    command = ("python", "-m", "benchmarks.score_folder", "--layout", "strip")
    run(*command, "--predictions", strips("input", VIDEOS), "--output_dir", tmp_path / "copies")
    for row in scores_by_video(tmp_path / "copies").values():
        assert row["psnr"]["sample"] == row["psnr"]["copy"]
    done = run(*command, "--predictions", better, "--against", worse, "--output_dir", tmp_path / "out")
    own = scores_by_video(sampled)
    assert {video_id: row["psnr"]["copy"] for video_id, row in scores_by_video(tmp_path / "out").items()} == {
        video_id: own[video_id]["psnr"]["copy"] for video_id in VIDEOS
    }
    gain = np.mean([100 - own[video_id]["psnr"]["sample"] for video_id in VIDEOS[:2]])
    row = [line for line in done.stdout.splitlines() if line.startswith("  sample - other")][-1]
    assert f"{gain:+.2f} ± " in row and "better 100% (" in row
    assert "1 videos left out: 1 in one of the two only (val2)" in done.stdout
    assert f"is better than {worse}, by +" in done.stdout.splitlines()[-1]


def test_mistakes_are_one_line_and_leave_former_results(data_dir, sampled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("former")
    picture = picture_of(sampled, "val0")

    def message(folder, *options):
        done = score(data_dir, "--predictions", folder, "--output_dir", tmp_path / "out", *options, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
        [line] = done.stderr.splitlines()
        return line

    assert "nowhere has no <video id>.png" in message(tmp_path / "nowhere")
    assert "named after a video" in message(save_as(tmp_path / "strangers", {"stranger": picture}))
    large = save_as(tmp_path / "large", {"val0": np.tile(picture, (2, 2, 1))})
    sizes = f"input, target and prediction are of {SIDE}x{SIDE}, {SIDE}x{SIDE}, {2 * SIDE}x{2 * SIDE} pixels"
    assert f"{large / 'val0.png'}: {sizes}" in message(large)
    assert f"has {2 * SIDE}x{2 * SIDE} pixels, not three squares" in message(large, "--layout", "strip")
    cut = save_as(tmp_path / "cut", {"val0": picture})
    (cut / "val0.png").write_bytes((cut / "val0.png").read_bytes()[:200])
    assert f"{cut / 'val0.png'} cannot be read as a picture" in message(cut)
    assert "make it with: python -m data.dataset" in message(large, "--val_annotations", tmp_path / "none.json")
    assert "prediction.png is of other frames" in message(sampled, "--target_frame_idx", 22)
    shutil.copytree(sampled, tmp_path / "own")
    assert "holds predictions" in message(tmp_path / "own", "--output_dir", tmp_path / "own")
