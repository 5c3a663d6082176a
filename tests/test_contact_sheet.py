"""The picture that shows some clips of a data directory."""

import cv2
import pytest

from data.paths import filtered_annotations_path, write_annotations
from tests.conftest import SIDE, entry, run, write_frames


def test_sheet_shows_the_frames_of_each_clip(tmp_path):
    annotations = filtered_annotations_path(tmp_path, "val")
    annotations.parent.mkdir()
    write_annotations(annotations, [entry("1", "move_object", num_frames=26), entry("2", "drop_object", num_frames=12)])
    write_frames(tmp_path, "1", range(26))
    write_frames(tmp_path, "2", range(12))
    picture = tmp_path / "sheet.png"
    command = ("python", "-m", "demo.contact_sheet", "--data_dir", tmp_path, "--output", picture)
    run(*command, "--resolution", SIDE)
    sheet = cv2.imread(str(picture))
    assert sheet.shape == (20 + SIDE, 2 * 6 * SIDE, 3)
    panels = [sheet[20:, left : left + SIDE] for left in range(0, sheet.shape[1], SIDE)]
    assert [bool((panel == 255).all()) for panel in panels] == [False] * 8 + [True] * 3 + [False]  # the short clip
    last = cv2.imread(str(tmp_path / f"frames_{SIDE}x{SIDE}" / "1" / "00025.png"))
    assert (panels[5] == last).all()

    refused = run(*command, "--resolution", 64, check=False)
    assert refused.returncode == 1
    assert "python -m data.video_loader" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"), [("--num_clips", "0"), ("--resolution", "-1"), ("--output", "sheet"), ("--output", "a.jpg")]
)
def test_impossible_options_are_refused_in_one_line(option, value):
    done = run("python", "-m", "demo.contact_sheet", option, value, check=False)
    assert done.returncode == 2 and option in done.stderr and done.stderr.count("\n") == 1
