"""Make the README's moving picture from what the quick test has predicted: `python -m demo.moving_picture`.

Each pair flips from its input frame to what comes: to the left as predicted, to the right as it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data.cli import CommandParser, run_command
from data.prompts import PROMPT_PREFIX
from data.video_decoder import load_picture
from pecn.pictures import panel_row, save_gif, sheet

NUM_PAIRS, COLUMNS = 6, 3
SECONDS = (0.8, 1.2)  # input, and what comes


def parse_args() -> argparse.Namespace:
    parser = CommandParser(prog="python -m demo.moving_picture", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, default=Path("test_output/samples"), help="(%(default)s)")
    parser.add_argument("--output_file", type=Path, default=Path("demo/quick_test.gif"), help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = json.loads((args.samples / "metrics.json").read_bytes())["samples"]
    moving = [row for row in rows if row["moving_share"]][:NUM_PAIRS]  # they were drawn at random
    pictures = []
    for left, right in (("input", "input"), ("prediction", "target")):
        cells = []
        for row in moving:
            frames = [
                load_picture(args.samples / "samples" / row["video_id"] / f"{name}.png") for name in (left, right)
            ]
            label = row["edit_prompt"].removeprefix(PROMPT_PREFIX).partition(". And")[0]
            cells.append(panel_row(list(zip(("input, prediction", "input, truth"), frames)), [label]))
        pictures.append(sheet(cells, columns=COLUMNS))
    save_gif(args.output_file, pictures, SECONDS)
    print(f"wrote {args.output_file}")


if __name__ == "__main__":
    run_command(main)
