"""Make a moving picture of the README: `python -m demo.moving_picture`, and again with `--two_sentences`.

The first is of what the quick test has predicted: each pair flips from its input frame to what comes, to the left as
predicted, to the right as it was. The second shows how the base model goes on from one frame for two sentences.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from data.cli import CommandParser, run_command
from data.prompts import PROMPT_PREFIX, build_prompt
from data.video_decoder import load_picture
from demo import BASE_MODEL, BASE_SETTINGS
from pecn.evaluation import loaded_model
from pecn.pictures import panel_row, save_gif, sheet
from pecn.sampling import predict_frames
from pecn.sampling_options import SamplingOptions

NUM_PAIRS, COLUMNS = 6, 3
SECONDS = (0.8, 1.2)  # each picture, and the last one
FRAME, HORIZON, NUM_STEPS, SEED = Path("demo/red_apple.png"), 5, 3, 42  # frame 20 of the rendered clip 2000018
SENTENCES = ("moving a red apple closer to a block", "moving a red apple away from a block")


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="python -m demo.moving_picture", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, default=Path("test_output/samples"), help="(%(default)s)")
    parser.add_argument("--two_sentences", action="store_true", help=f"of {FRAME}, in place of the samples")
    parser.add_argument("--output_file", type=Path, help="(demo/quick_test.gif or demo/two_sentences.gif)")
    return parser.parse_args()


def quick_test(samples: Path) -> list[np.ndarray]:
    """The inputs of random pairs, and then their predictions and truths."""
    rows = json.loads((samples / "metrics.json").read_bytes())["samples"]
    moving = [row for row in rows if row["moving_share"]][:NUM_PAIRS]  # they were drawn at random
    pictures = []
    for left, right in (("input", "input"), ("prediction", "target")):
        cells = []
        for row in moving:
            frames = [load_picture(samples / "samples" / row["video_id"] / f"{name}.png") for name in (left, right)]
            label = row["edit_prompt"].removeprefix(PROMPT_PREFIX).partition(". And")[0]
            cells.append(panel_row(list(zip(("input, prediction", "input, truth"), frames)), [label]))
        pictures.append(sheet(cells, columns=COLUMNS))
    return pictures


def two_sentences() -> list[np.ndarray]:
    """One frame twice, and how the base model goes on from it for either sentence, with the same noise."""
    options = SamplingOptions(
        **{name: BASE_SETTINGS[name] for name in vars(SamplingOptions()) if name in BASE_SETTINGS}
    )
    prompts = [build_prompt(sentence, horizon=HORIZON) for sentence in SENTENCES]
    frames, pictures = [load_picture(FRAME)] * 2, []
    with loaded_model(str(BASE_MODEL)) as pipeline:
        for step in range(NUM_STEPS + 1):
            title = f"predicted, +{step * HORIZON}" if step else "input"
            cells = [panel_row([(title, frame)], [sentence]) for frame, sentence in zip(frames, SENTENCES)]
            pictures.append(sheet(cells, columns=2))
            predicted = predict_frames(pipeline, frames, prompts, [SEED + step] * 2, options)
            frames = [prediction.sample for prediction in predicted]
    return pictures


def main() -> None:
    args = parse_args()
    pictures = two_sentences() if args.two_sentences else quick_test(args.samples)
    output_file = args.output_file or Path(f"demo/{'two_sentences' if args.two_sentences else 'quick_test'}.gif")
    save_gif(output_file, pictures, [SECONDS[0]] * (len(pictures) - 1) + [SECONDS[1]])
    print(f"wrote {output_file}")


if __name__ == "__main__":
    run_command(main)
