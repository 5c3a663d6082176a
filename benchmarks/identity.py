"""Does the object stay what it is? `python -m benchmarks.identity SAMPLES [SAMPLES ...]`, of rendered clips.

SAMPLES is an OUTPUT_DIR of sample_from_pix2pix.sh. Where the sentence names the object's color, pixels of that hue in
the moving region (dilated by 3 more) of the prediction are counted over those of the target, where that has 25 or more.
The object is kept where the ratio lies in 0.6..1.6, and has vanished below 0.3.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skimage.color import rgb2hsv
from skimage.morphology import dilation, disk

from data.cli import CommandParser, run_command
from data.prompts import PROMPT_PREFIX
from data.video_decoder import load_picture
from pecn.evaluation import read_metrics
from pecn.scores import moving_region

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
LOW, HIGH = (-0.04, 0.04, 0.11, 0.25, 0.53, 0.70, 0.86), (0.03, 0.10, 0.18, 0.47, 0.70, 0.84, 0.97)  # of the hue, 0..1


def ratios(samples: Path) -> list[tuple[str, float]]:
    """(task, pixels of the object's hue over the target's) of each pair that can be judged."""
    found = []
    for row in read_metrics(samples)["samples"]:
        words = row["edit_prompt"].removeprefix(PROMPT_PREFIX).split()
        color = next((word for word in words if word in COLORS), None)
        if color and row["moving_share"]:
            folder = samples / "samples" / row["video_id"]
            frames = [load_picture(folder / f"{name}.png") for name in ("input", "prediction", "target")]
            region = dilation(moving_region(frames[0], frames[2]), disk(3))
            predicted, true = (count_hue(frame, color, region) for frame in frames[1:])
            if true >= 25:
                found.append((row["task"], predicted / true))
    return found


def count_hue(frame: np.ndarray, color: str, region: np.ndarray) -> int:
    low, high = (bounds[COLORS.index(color)] for bounds in (LOW, HIGH))
    hue, saturation, value = np.moveaxis(rgb2hsv(frame), -1, 0)
    return int((((hue - low) % 1 <= high - low) & (saturation > 0.35) & (value > 0.2) & region).sum())


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.identity", description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, nargs="+", help="an output directory of sampling")
    for samples in parser.parse_args().samples:
        found = ratios(samples)
        for name in ("all", *sorted({task for task, _ in found})):
            values = np.array([ratio for task, ratio in found if name in ("all", task)])
            kept, vanished = ((values >= 0.6) & (values <= 1.6)).mean(), (values < 0.3).mean()
            print(f"{samples}, {name}: kept {kept:.0%}, vanished {vanished:.0%} of {len(values)} pairs")


if __name__ == "__main__":
    run_command(main)
