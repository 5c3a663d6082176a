"""Make the demo's base model: a small InstructPix2Pix that any machine can fine-tune.

    python -m demo.make_model

writes `demo/base_model`, which stock `StableDiffusionInstructPix2PixPipeline.from_pretrained` loads: a UNet with
8 input channels, a VAE, a CLIP text encoder with its tokenizer, and a scheduler, together under 10 million
parameters. It stands in for `timbrooks/instruct-pix2pix` on the clips of `demo.make_clips`, and is trained on such
clips: the VAE, the text encoder, then the UNet. `--initial_model DIR` continues from a model written before. With
0 steps of all three the weights come from `--seed` alone and take seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data.layout import CommandParser, UserError, make_folder, number, run_command, whole_or_absent

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline


def check_output_dir(output_dir: Path) -> None:
    """Refuse a path that holds anything but a model written before (which a new one replaces)."""
    if output_dir.is_dir() and (not any(output_dir.iterdir()) or (output_dir / "model_index.json").is_file()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise UserError(f"{output_dir} exists and is no model directory; name another one with --output_dir")


def save_pipeline(pipeline: StableDiffusionInstructPix2PixPipeline, output_dir: Path) -> None:
    """Write the pipeline (safetensors, float16) so that `output_dir` is whole or untouched.

    float16 halves the size and is exact enough; `from_pretrained` gives float32, as the configurations say.
    `vocab.json` and `merges.txt` lie beside `tokenizer.json` for versions of transformers that read those.
    """
    from safetensors.torch import load_file, save_file

    output_dir = output_dir.absolute()
    check_output_dir(output_dir)
    make_folder(output_dir.parent)
    with whole_or_absent(output_dir) as partial:
        pipeline.save_pretrained(partial)
        for weights_path in sorted(partial.rglob("*.safetensors")):
            weights = {name: tensor.half() for name, tensor in load_file(weights_path).items()}
            save_file(weights, weights_path, metadata={"format": "pt"})
        for config_path in (partial / "model_index.json", *partial.glob("*/config.json")):
            config = json.loads(config_path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # the directory it was loaded from says nothing to anyone else
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pipeline.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m demo.make_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, steps = parser.add_argument, number(at_least=0)
    add("--output_dir", type=Path, default=Path("demo/base_model"), help="default: %(default)s")
    add("--initial_model", type=Path, help="a model directory to start from instead of random weights")
    add("--vae_train_steps", type=steps, default=2500, help="0 leaves the VAE as it is; default: %(default)s")
    add("--text_train_steps", type=steps, default=300, help="0 leaves the text encoder as it is; default: %(default)s")
    add("--unet_train_steps", type=steps, default=7000, help="0 leaves the UNet as it is; default: %(default)s")
    add("--num_clips", type=number(at_least=1), default=3000, help="clips to train on; default: %(default)s")
    seed_help = "of the weights and of training, not of the clips; default: %(default)s"
    add("--seed", type=number(at_least=0, at_most=2**63), default=0, help=seed_help)
    args = parser.parse_args()
    if args.initial_model and args.text_train_steps and not args.unet_train_steps:
        parser.error("a UNet has to be trained after its text encoder; add --text_train_steps 0 or more UNet steps")
    return args


def main() -> None:
    args = parse_args()
    check_output_dir(args.output_dir)
    initial = args.initial_model
    if initial and not (initial / "model_index.json").is_file():
        raise UserError(f"--initial_model {initial} is not a model directory: it has no model_index.json")

    from demo.pretraining.training import pretrain
    from demo.pretraining.untrained import build_pipeline, count_parameters
    from pecn.model import load_pipeline

    pipeline = load_pipeline(initial) if initial else build_pipeline(args.seed)
    steps = (args.vae_train_steps, args.text_train_steps, args.unet_train_steps)
    if any(steps):
        try:
            pretrain(pipeline, *steps, args.num_clips, args.seed)
        except KeyboardInterrupt:
            print("interrupted: nothing was written; the same command starts from the beginning", file=sys.stderr)
            sys.exit(130)
        pipeline.to("cpu")
    save_pipeline(pipeline, args.output_dir)
    print(f"wrote {args.output_dir}: {count_parameters(pipeline) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    run_command(main)
