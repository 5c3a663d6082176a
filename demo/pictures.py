"""Make a picture of README or demo/README: `python -m demo.pictures quick_test`, `two_sentences`, or `clips`.

The first is of what the quick test has predicted: each pair flips from its input frame to what comes, to the left as
predicted, to the right as it was. The second shows how the base model goes on from one frame for two sentences, the
third a rendered clip of each task.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data.cli import CommandParser, run_command
from data.clips import FrameChoice, choose_balanced, find_clips
from data.prompts import PROMPT_PREFIX, build_prompt
from data.video_decoder import load_picture
from demo import BASE_MODEL, BASE_SETTINGS
from pecn.evaluation import loaded_model, read_metrics
from pecn.pictures import panel_row, save_gif, save_picture, sheet
from pecn.sampling import predict_frames
from pecn.sampling_options import SamplingOptions

NUM_PAIRS, COLUMNS = 6, 3
SECONDS = (0.8, 1.2)  # each picture, and the last one
FRAME, HORIZON, NUM_STEPS, SEED = Path("demo/red_apple.png"), 5, 3, 44  # frame 20 of the rendered clip 2000018
SIDE, NUM_CLIPS, NUM_FRAMES = 96, 3, 6
SENTENCES = ("moving a red apple closer to a block", "moving a red apple away from a block")


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="python -m demo.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("picture", choices=["quick_test", "two_sentences", "clips"])
    parser.add_argument("--samples", type=Path, default=Path("test_output/samples"), help="(%(default)s)")
    parser.add_argument("--data_dir", type=Path, default=Path("data/demo"), help="of the clips (%(default)s)")
    parser.add_argument("--output_file", type=Path, help="(demo/<picture>.gif, demo/clips.png)")
    return parser.parse_args()


def quick_test(samples: Path) -> list[np.ndarray]:
    """The inputs of random pairs, and then their predictions and truths."""
    moving = [row for row in read_metrics(samples)["samples"] if row["moving_share"]]
    pictures = []
    for left, right in (("input", "input"), ("prediction", "target")):
        cells = []
        for row in moving[:NUM_PAIRS]:  # they were drawn at random
            frames = [load_picture(samples / "samples" / row["video_id"] / f"{name}.png") for name in (left, right)]
            label = row["edit_prompt"].removeprefix(PROMPT_PREFIX).partition(". And")[0]
            cells.append(panel_row(list(zip(("input, prediction", "input, truth"), frames)), [label]))
        pictures.append(sheet(cells, columns=COLUMNS))
    return pictures


def two_sentences() -> list[np.ndarray]:
    """One frame twice, and how the base model goes on from it for either sentence, with the same noise."""
    settings = {name: BASE_SETTINGS[name] for name in vars(SamplingOptions()) if name in BASE_SETTINGS}
    options = SamplingOptions(**settings)
    prompts = [build_prompt(sentence, horizon=HORIZON) for sentence in SENTENCES]
    frames, pictures = [load_picture(FRAME)] * 2, []
    with loaded_model(str(BASE_MODEL)) as pipeline:
        for step in range(NUM_STEPS + 1):
            title = f"predicted, +{step * HORIZON}" if step else "input"
            if step:
                predicted = predict_frames(pipeline, frames, prompts, [SEED + step - 1] * 2, options)
                frames = [prediction.sample for prediction in predicted]
            cells = [panel_row([(title, frame)], [sentence]) for frame, sentence in zip(frames, SENTENCES)]
            pictures.append(sheet(cells, columns=2))
    return pictures


def clips(data_dir: Path) -> np.ndarray:
    """Some frames of a validation clip of each task."""
    found, _ = find_clips(data_dir, "val", SIDE, FrameChoice(start=None))
    rows = []
    for clip in choose_balanced(found, SEED, NUM_CLIPS):
        frames = [clip.frames[round(place)] for place in np.linspace(0, len(clip.frames) - 1, NUM_FRAMES)]
        rows.append(panel_row([(f"frame {frame}", load_picture(clip.path(frame))) for frame in frames], [clip.label]))
    return sheet(rows)


def main() -> None:
    args = parse_args()
    if args.picture == "clips":
        output_file = args.output_file or Path("demo/clips.png")
        save_picture(output_file, clips(args.data_dir))
    else:
        output_file = args.output_file or Path(f"demo/{args.picture}.gif")
        pictures = two_sentences() if args.picture == "two_sentences" else quick_test(args.samples)
        save_gif(output_file, pictures, [SECONDS[0]] * (len(pictures) - 1) + [SECONDS[1]])
    print(f"wrote {output_file}")


if __name__ == "__main__":
    run_command(main)
