"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

or how the videos go on (`--rollout 10`), or what follows a picture of your own, which nothing can be compared with:

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --image photo.jpg --prompt "pushing a cup"

Options that are left out come from the model's training_config.json. pecn/evaluation.py does the work.
"""

from pathlib import Path

from data.cli import SWITCH, CommandParser, number, run_command
from data.clips import add_frame_options
from data.paths import DEFAULT_DATA_DIR
from data.prompts import PROGRESS_OPTION, progress_option
from pecn.sampling_options import add_sampling_options


def progress_or_percent(text: str) -> bool | str | int:
    """An argparse type: as `progress_option`, or for --image how much is done, in percent."""
    return number(at_least=0, at_most=90, multiple_of=10)(text) if text.isdigit() else progress_option(text)


def create_parser() -> CommandParser:
    parser = CommandParser(
        usage="%(prog)s [options]",
        description="Predict frames of validation videos, save pictures and scores; or predict what follows a picture."
        " Options that are left out are as the model was trained; in parentheses: where it does not say.",
    )
    add = parser.add_argument
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--data_dir", type=Path, default=DEFAULT_DATA_DIR, help="prepared data directory (%(default)s)")
    output_help = "for pictures and scores (test_result/baseline, of a picture test_result/<its name>-<n>)"
    add("--output_dir", type=Path, help=output_help)
    side = number(at_least=8, at_most=4096, multiple_of=8)
    add("--resolution", type=side, default=128, help="side of the frames (%(default)s)")
    add_frame_options(parser)
    progress_help = "prompts say how much is done: by the clip's length (True), as estimated (FILE); of --image PERCENT"
    option = PROGRESS_OPTION | {"type": progress_or_percent, "metavar": "True|False|FILE|PERCENT"}
    add("--add_progress", **option, default=False, help=progress_help)
    rollout_help = "predict the N frames after the input frame, in place of one target"
    add("--rollout", type=number(at_least=1, at_most=999), metavar="N", help=rollout_help)
    mode_help = "each from the input frame, or from the prediction before (direct where the model knows horizons)"
    add("--rollout_mode", choices=["direct", "chained"], help=mode_help)
    count = number(at_least=1)
    num_samples_help = "how many videos, or 'all' (%(default)s)"
    add("--num_samples", type=lambda text: None if text == "all" else count(text), default=8, help=num_samples_help)
    add("--seed", type=int, default=42, help="chooses the videos and the noise (%(default)s)")
    add("--batch_size", type=count, default=8, help="pictures predicted at once (%(default)s)")
    add("--against", type=Path, help="output directory of an earlier run, to compare with on the videos of both")
    add("--image", type=Path, help="a picture of your own, of any size, in place of validation videos")
    add("--crop", **SWITCH, help="take the middle square of --image, in place of squashing it to a square")
    add("--prompt", help="what is done in it, as in 'pushing a cup from left to right'")
    add_sampling_options(parser)
    return parser


def main() -> None:
    parser = create_parser()
    args = parser.parse_args()
    if (args.image is None) != (args.prompt is None):
        parser.error("--image and --prompt need each other")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is blank: say what is done in the picture")
    if type(args.add_progress) is int and args.image is None:
        parser.error("a percentage as --add_progress needs --image")
    from pecn import evaluation  # not before the options are known to be good: it takes seconds

    parser.set_defaults(**evaluation.recorded_settings(args))
    evaluation.run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
