"""Make the demo's base model: a small InstructPix2Pix that a CPU can fine-tune.

    python -m demo.make_model

writes `demo/base_model`, which stock `StableDiffusionInstructPix2PixPipeline.from_pretrained` loads: a UNet, a VAE, a
CLIP text encoder with its tokenizer, and a scheduler, together under 15 million parameters. It takes the place of
`timbrooks/instruct-pix2pix` on rendered clips, and is trained on such clips: the VAE, the text encoder, the UNet, and
the UNet once more, to guide itself. Rendered frames, latents and checkpoints are kept in `--work_dir`: the same command
continues where it was stopped. With 0 steps of all four, the weights are random numbers of `--seed`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from data.cli import CommandParser, UserError, number, run_command
from data.files import make_folder, only_one, remove_leftovers, whole_or_absent
from demo.pretraining.recipe import pretrain
from demo.pretraining.untrained import build_pipeline, count_parameters
from pecn.model import Pipeline, load_pipeline


def check_output_dir(output_dir: Path) -> None:
    """Raise UserError where the path holds anything but a model, which the new one replaces."""
    if output_dir.is_dir() and (not any(output_dir.iterdir()) or (output_dir / "model_index.json").is_file()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise UserError(f"{output_dir} exists and is no model directory; name another one with --output_dir")


def save_pipeline(pipeline: Pipeline, output_dir: Path) -> None:
    """Write the pipeline (safetensors, float16) so that `output_dir` is complete or unchanged.

    float16 halves the size; `from_pretrained` returns float32 all the same. `vocab.json` and `merges.txt` are for
    versions of transformers that do not read `tokenizer.json`.
    """
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
            config.pop("_name_or_path", None)  # the directory it was loaded from
            config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        pipeline.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))


def parse_args() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m demo.make_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, steps, count = parser.add_argument, number(at_least=0), number(at_least=1)
    add("--output_dir", type=Path, default=Path("demo/base_model"), help="(%(default)s)")
    work_help = "of frames, latents, checkpoints and logs: about 6 GB for 3,000 clips (%(default)s)"
    add("--work_dir", type=Path, default=Path("outputs/base_model"), help=work_help)
    add("--num_clips", type=count, default=3000, help="clips to train on (%(default)s)")
    seed_help = "of the weights and of training, not of the clips (%(default)s)"
    add("--seed", type=number(at_least=0, at_most=2**63), default=0, help=seed_help)
    start_help = "folder of a model to start from; a part with 0 steps is not changed (none: random weights)"
    add("--pretrained_model_name_or_path", type=Path, help=start_help)
    for stage, model, default_steps, batch_size in (
        ("vae", "VAE", 5000, 8),
        ("text", "text encoder", 500, 32),
        ("unet", "UNet", 60_000, 16),
        ("guided", "UNet", 15_000, 16),  # once more, to draw in one pass what guidance would
    ):
        steps_help = f"0: the {model} is not trained in this stage (%(default)s)"
        add(f"--{stage}_train_steps", type=steps, default=default_steps, help=steps_help)
        add(f"--{stage}_batch_size", type=count, default=batch_size, help="(%(default)s)")
    add("--checkpointing_steps", type=count, default=1000, help="steps between checkpoints (%(default)s)")
    add("--validation_steps", type=count, default=1000, help="UNet steps between validations (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_output_dir(args.output_dir)
    start = args.pretrained_model_name_or_path
    pipeline = load_pipeline(start) if start else build_pipeline(args.seed)
    if any((args.vae_train_steps, args.text_train_steps, args.unet_train_steps, args.guided_train_steps)):
        make_folder(args.work_dir)
        with only_one(args.work_dir, "pre-training"):
            remove_leftovers(args.work_dir)
            pretrain(pipeline, args)
        pipeline.to("cpu")
    save_pipeline(pipeline, args.output_dir)
    print(f"wrote {args.output_dir}: {count_parameters(pipeline) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    run_command(main)
