"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

Training uses the same functions for its validation pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.dataset import DEFAULT_DATA_DIR, UserError, frames_dir, read_annotations, run_command, sampling_rank
from data.sthv2_dataset_hf import (
    DEFAULT_INPUT_FRAME_IDX,
    DEFAULT_TARGET_FRAME_IDX,
    derive_seed,
    describe_left_out,
    find_frame_pairs,
    frame_pairs_dataset,
)

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

TRAINING_CONFIG = "training_config.json"
HIGHEST_PSNR = 100.0  # stands for the infinite PSNR of identical pictures, so that means and JSON stay finite
SCORED = ("prediction", "copy", "vae_ceiling")
MAX_OVERVIEW_SAMPLES = 24


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predict frames of validation videos, save pictures and scores.")
    add = parser.add_argument
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--frames_dir", type=Path, help=f"frames_<R>x<R> folder (of the model's resolution in {DEFAULT_DATA_DIR})")
    add("--val_annotations", type=Path, default=DEFAULT_DATA_DIR / "annotations" / "val_filtered.json")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add("--input_frame_idx", type=int, help="frame to start from (what the model was trained on, or 20)")
    add("--target_frame_idx", type=int, help="frame to predict (what the model was trained on, or 21)")
    add("--num_samples", type=number_of_samples, default=3, help="how many entries to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the entries and their noise (%(default)s)")
    add("--num_inference_steps", type=int, default=20, help="denoising steps (%(default)s)")
    add(
        "--guidance_scale",
        type=float,
        default=7.5,
        help="guidance by the text; at 1 there is none at all (%(default)s)",
    )
    add("--image_guidance_scale", type=float, default=1.5, help="guidance by the input frame, >= 1 (%(default)s)")
    add("--batch_size", type=int, default=8, help="frames predicted at once (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    add("--cache_dir", help="where models from the hub are kept")
    return parser.parse_args(arguments)


def number_of_samples(text: str) -> int | None:
    """A count of at least 1, or None for "all"."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor 'all'")
    return int(text)


def load_pipeline(
    name: str, dtype: torch.dtype | None = None, **hub_options: str | None
) -> StableDiffusionInstructPix2PixPipeline:
    """Loads a diffusers pipeline from a directory or the hub, without its safety checker.

    `hub_options` are `revision`, `variant` and `cache_dir`. Only safetensors weights are read, never pickles.
    A plain Stable Diffusion pipeline loads as well, its UNet then has 4 input channels. Raises UserError where
    the model cannot be found, reached or read.
    """
    quiet_libraries()
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

    is_directory = os.path.isdir(name)
    if is_directory and not os.path.isfile(os.path.join(name, "model_index.json")):
        raise UserError(f"{name} holds no diffusers pipeline (no model_index.json); train one or name another")
    try:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            name,
            dtype=dtype or torch.float32,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
            **{option: value for option, value in hub_options.items() if value},
        )
    except Exception as error:  # whatever a broken model or a broken network raises, the user can only mend the name
        reason = " ".join(str(error).split())[:300]
        if is_directory:
            raise UserError(f"the model in {name} cannot be loaded: {reason}") from error
        raise UserError(
            f"there is no directory {name}, and no such model could be fetched from"
            f" {os.environ.get('HF_ENDPOINT', 'the hub')}: set HF_ENDPOINT to a mirror you can reach, or name a"
            f" directory that holds a model (your own training's output, or one made by `python -m demo.make_model`)."
            f" Reason: {reason}"
        ) from error
    in_channels = pipeline.unet.config.in_channels
    if in_channels not in (4, 8):
        raise UserError(f"the UNet of {name} has {in_channels} input channels; 8 (or 4, for training) are needed")
    return pipeline


def quiet_libraries() -> None:
    """Keeps transformers' and diffusers' notes (a missing torchvision, bars while weights load) out of the output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def read_training_config(model_dir: str, **hub_options: str | None) -> dict[str, Any]:
    """The arguments a model, in a directory or on the hub, was trained with; empty where there is no such record."""
    path = Path(model_dir) / TRAINING_CONFIG
    if not os.path.isdir(model_dir):
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model_dir, TRAINING_CONFIG, **hub_options))
        except (OSError, ValueError):  # no such file there, or no such model: loading the model will say which
            return {}
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["arguments"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a training config written by train_instruct_pix2pix.py: {error}") from error


def settle_frame_indices(args: argparse.Namespace, trained: dict[str, Any], model_dir: str) -> None:
    """Fills in what the command line leaves open from the model's training, and warns where the two differ."""
    defaults = {"input_frame_idx": DEFAULT_INPUT_FRAME_IDX, "target_frame_idx": DEFAULT_TARGET_FRAME_IDX}
    for name, default in defaults.items():
        asked, learned = getattr(args, name), trained.get(name, default)
        if asked is None:
            setattr(args, name, learned)
        elif trained and asked != learned:
            warn(f"{name} is {asked}, but {model_dir} was trained with {learned}")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def choose_samples(pairs: Sequence[dict[str, Any]], num_samples: int | None, seed: int) -> list[dict[str, Any]]:
    """Draws entries evenly from the tasks; the same ones for the same seed, whatever the order of `pairs`.

    With a larger `num_samples` the smaller choice is its beginning; None takes all.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for pair in sorted(pairs, key=lambda pair: sampling_rank(seed, pair["video_id"])):
        by_task.setdefault(pair["task"], []).append(pair)
    turns = [(turn, task, pair) for task, of_task in by_task.items() for turn, pair in enumerate(of_task)]
    turns.sort(key=lambda item: item[:2])
    return [pair for _, _, pair in turns[:num_samples]]


def predict_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    image_guidance_scale: float = 1.5,
) -> list[np.ndarray]:
    """Predicts one batch: uint8 RGB frames (H, W, 3) in, the same out.

    Each sample has its own noise seed, so its picture does not depend on its neighbours in the batch.
    Sampling follows Brooks et al., 2023 (arXiv 2211.09800), eq. 3.
    """
    import torch
    from PIL import Image

    predicted = pipeline(
        prompt=list(prompts),
        image=[Image.fromarray(image) for image in images],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
    ).images
    return [np.asarray(image) for image in predicted]


def reconstruct_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline, images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The pictures after one trip through the VAE (posterior mode), uint8 RGB: as good as a prediction can look."""
    import torch
    from PIL import Image

    vae, processor = pipeline.vae, pipeline.image_processor
    pixels = processor.preprocess([Image.fromarray(image) for image in images])
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded = vae.decode(latents).sample.float()
    return [np.asarray(image) for image in processor.postprocess(decoded, output_type="pil")]


def score_frame(frame: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (at most HIGHEST_PSNR) and SSIM of a uint8 RGB picture (H, W, 3) against its target."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    if np.array_equal(frame, target):
        return HIGHEST_PSNR, 1.0
    psnr = peak_signal_noise_ratio(target, frame, data_range=255)
    ssim = structural_similarity(target, frame, channel_axis=2, data_range=255)
    return float(psnr), float(ssim)


def score_sample(
    prediction: np.ndarray, input_frame: np.ndarray, target: np.ndarray, vae_ceiling: np.ndarray
) -> dict[str, dict[str, float]]:
    """{"psnr": {"prediction": …, "copy": …, "vae_ceiling": …}, "ssim": {…}} of one sample."""
    scores: dict[str, dict[str, float]] = {"psnr": {}, "ssim": {}}
    for name, frame in zip(SCORED, (prediction, input_frame, vae_ceiling)):
        scores["psnr"][name], scores["ssim"][name] = score_frame(frame, target)
    return scores


def predict_and_score(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: Sequence[dict[str, Any]],
    seed: int,
    batch_size: int,
    show_progress: bool = True,
    **sampling_options: Any,
) -> list[dict[str, Any]]:
    """Predicts every pair of `find_frame_pairs`, in batches.

    Returns one dictionary a pair: `video_id`, `task`, `prompt`, the uint8 RGB pictures `input`, `prediction`,
    `target` (None where the video lacks it), and `psnr` and `ssim` as `score_sample` has them (None without a
    target). `sampling_options` go to `predict_frames`.
    """
    from tqdm import tqdm

    pipeline.set_progress_bar_config(disable=True)
    dataset = frame_pairs_dataset(pairs)
    results = []
    with tqdm(total=len(dataset), desc="Predicting", unit="frame", disable=not show_progress) as progress_bar:
        for batch in dataset.iter(batch_size):
            inputs = [np.asarray(image) for image in batch["input_image"]]
            targets = [None if image is None else np.asarray(image) for image in batch["edited_image"]]
            seeds = [derive_seed(seed, video_id) for video_id in batch["video_id"]]
            predictions = predict_frames(pipeline, inputs, batch["edit_prompt"], seeds, **sampling_options)
            known = [target for target in targets if target is not None]
            ceilings = iter(reconstruct_frames(pipeline, known) if known else [])
            for index, target in enumerate(targets):
                scores: dict[str, Any] = {"psnr": None, "ssim": None}
                if target is not None:
                    scores = score_sample(predictions[index], inputs[index], target, next(ceilings))
                results.append(
                    {
                        "video_id": batch["video_id"][index],
                        "task": batch["task"][index],
                        "prompt": batch["edit_prompt"][index],
                        "input": inputs[index],
                        "prediction": predictions[index],
                        "target": target,
                        **scores,
                    }
                )
            progress_bar.update(len(targets))
    return results


def mean_scores(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of `psnr` and `ssim` over the results that have a target, and how many those are."""
    scored = [result for result in results if result["psnr"] is not None]
    summary: dict[str, Any] = {"num_samples": len(scored)}
    for metric in ("psnr", "ssim"):
        columns = {name: [result[metric][name] for result in scored] for name in SCORED}
        summary[metric] = {name: float(np.mean(column)) if column else None for name, column in columns.items()}
    return summary


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`mean_scores` over everything, with the same for each task under `per_task`."""
    summary = mean_scores(results)
    summary["num_without_target"] = len(results) - summary["num_samples"]
    tasks = sorted({result["task"] for result in results})
    summary["per_task"] = {
        task: mean_scores([result for result in results if result["task"] == task]) for task in tasks
    }
    return summary


def format_table(summary: dict[str, Any]) -> str:
    """The summary as text: a row per task and one for all."""
    header = f"{'':14}{'samples':>8}" + "".join(
        f"{metric + ' ' + name:>17}" for metric in ("PSNR", "SSIM") for name in ("prediction", "copy", "ceiling")
    )
    lines = [header]
    for task, scores in [*summary["per_task"].items(), ("all", summary)]:
        line = f"{task:14}{scores['num_samples']:>8}"
        for metric, digits in (("psnr", 2), ("ssim", 3)):
            for name in SCORED:
                value = scores[metric][name]
                line += f"{'-':>17}" if value is None else f"{value:>17.{digits}f}"
        lines.append(line)
    return "\n".join(lines)


def describe_scores(result: dict[str, Any]) -> str:
    if result["psnr"] is None:
        return "no target frame, not scored"
    psnr, ssim = result["psnr"], result["ssim"]
    return (
        f"PSNR {psnr['prediction']:.1f} dB (copy {psnr['copy']:.1f}, VAE ceiling {psnr['vae_ceiling']:.1f})"
        f"   SSIM {ssim['prediction']:.3f} (copy {ssim['copy']:.3f})"
    )


def comparison_picture(result: dict[str, Any], note: str = "") -> np.ndarray:
    """input | prediction | target side by side with the prompt and the scores below, uint8 RGB.

    The panels are enlarged by a whole factor to at least 256 pixels so that the words below are readable.
    """
    from PIL import Image, ImageDraw, ImageFont

    panels = {name: result[name] for name in ("input", "prediction", "target") if result[name] is not None}
    side = result["input"].shape[0]
    size = side * max(1, -(-256 // side))
    gap, line_height = 6, 18
    width = 3 * size + 4 * gap
    font = ImageFont.load_default(size=13)
    lines = wrap_text(result["prompt"], font, width - 2 * gap) + wrap_text(
        describe_scores(result), font, width - 2 * gap
    )
    if note:
        lines += wrap_text(note, font, width - 2 * gap)
    picture = Image.new("RGB", (width, size + (len(lines) + 1) * line_height + 3 * gap), "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, panel) in enumerate(panels.items()):
        left = gap + column * (size + gap)
        draw.text((left, gap // 2), name, fill="black", font=font)
        picture.paste(Image.fromarray(panel).resize((size, size), Image.Resampling.BICUBIC), (left, line_height + gap))
    for row, line in enumerate(lines):
        draw.text((gap, line_height + size + 2 * gap + row * line_height), line, fill="black", font=font)
    return np.asarray(picture)


def wrap_text(text: str, font: Any, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, at spaces where there are any."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while font.getlength(word) > width:
            fitting = next(end for end in range(len(word) - 1, 0, -1) if font.getlength(word[:end]) <= width)
            lines.append(word[:fitting])
            word = word[fitting:]
        lines.append(word)
    return [line for line in lines if line]


def contact_sheet(pictures: Sequence[np.ndarray], num_columns: int = 2) -> np.ndarray:
    """Pictures of equal width (H, W, 3) in a grid, white where one is lower than its neighbours."""
    rows = []
    for start in range(0, len(pictures), num_columns):
        row = pictures[start : start + num_columns]
        height = max(picture.shape[0] for picture in row)
        row = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in row]
        missing = np.full((height, (num_columns - len(row)) * row[0].shape[1], 3), 255, np.uint8)
        rows.append(np.concatenate([*row, missing] if len(pictures) > num_columns else row, axis=1))
    return np.concatenate(rows)


def save_picture(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path)


def save_results(results: Sequence[dict[str, Any]], output_dir: Path, note: str) -> dict[str, Any]:
    """Writes samples/<video id>/*.png, overview.png and metrics.json; returns the summary.

    Everything is made under a temporary name first: an interrupted run leaves the former results whole.
    """
    new = output_dir / ".unfinished"
    shutil.rmtree(new, ignore_errors=True)
    comparisons = []
    for result in results:
        folder = new / "samples" / result["video_id"]
        folder.mkdir(parents=True)
        comparisons.append(comparison_picture(result, note))
        save_picture(folder / "comparison.png", comparisons[-1])
        for name in ("input", "prediction", "target"):
            if result[name] is not None:
                save_picture(folder / f"{name}.png", result[name])
    save_picture(new / "overview.png", contact_sheet(comparisons[:MAX_OVERVIEW_SAMPLES]))
    summary = summarise(results)
    keys = ("video_id", "task", "prompt", "psnr", "ssim")
    metrics = {"summary": summary, "samples": [{key: result[key] for key in keys} for result in results]}
    (new / "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(output_dir / "samples", ignore_errors=True)
    for path in sorted(new.iterdir()):
        os.replace(path, output_dir / path.name)
    new.rmdir()
    return summary


def check_args(args: argparse.Namespace) -> None:
    for name in ("num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.image_guidance_scale < 1:
        raise UserError(f"--image_guidance_scale must be at least 1, not {args.image_guidance_scale}")
    if args.guidance_scale <= 1:
        warn("with a guidance scale of 1 or less the pipeline uses no guidance, neither by the text nor by the image")
    if not args.val_annotations.is_file():
        raise UserError(f"there is no {args.val_annotations}; make it with: python -m data.dataset")


def place_pipeline(args: argparse.Namespace) -> StableDiffusionInstructPix2PixPipeline:
    """Loads the model for prediction and moves it to the device it will run on."""
    import torch
    from accelerate import PartialState

    device = PartialState().device
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    hub_options = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    pipeline = load_pipeline(args.model_dir, dtype, **hub_options)
    if pipeline.unet.config.in_channels != 8:
        raise UserError(f"{args.model_dir} takes no input frame (4 input channels); train it first, or name another")
    return pipeline.to(device)


def main() -> None:
    args = parse_args()
    check_args(args)
    trained = read_training_config(args.model_dir, revision=args.revision, cache_dir=args.cache_dir)
    settle_frame_indices(args, trained, args.model_dir)
    add_progress = trained.get("add_progress", False)
    if args.frames_dir is None:
        args.frames_dir = frames_dir(DEFAULT_DATA_DIR, trained.get("resolution", 128))
    pairs, left_out = find_frame_pairs(
        read_annotations(args.val_annotations),
        args.frames_dir,
        args.input_frame_idx,
        args.target_frame_idx,
        add_progress,
        target_required=False,
    )
    if left_out:
        print(describe_left_out(left_out))
    if not pairs:
        raise UserError(f"no video of {args.val_annotations} has frame {args.input_frame_idx} in {args.frames_dir}")
    pairs = choose_samples(pairs, args.num_samples, args.seed)
    check_frame_size(pairs[0]["input_image"], trained.get("resolution"), args.model_dir)
    pipeline = place_pipeline(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = predict_and_score(
        pipeline,
        pairs,
        args.seed,
        args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
    )
    note = f"{args.model_dir}, frame {args.input_frame_idx} to {args.target_frame_idx}"
    summary = save_results(results, args.output_dir, note)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame {args.target_frame_idx}: predicted, not scored")
    print(
        f"pictures: {args.output_dir}/overview.png, {args.output_dir}/samples/; scores: {args.output_dir}/metrics.json"
    )


def check_frame_size(frame: str, trained_resolution: int | None, model_dir: str) -> None:
    from PIL import Image

    with Image.open(frame) as image:
        side = image.width
    if side % 8:
        raise UserError(f"{frame} is {side} pixels wide; the model needs a multiple of 8")
    if trained_resolution is not None and side != trained_resolution:
        warn(f"the frames are {side} pixels wide, but {model_dir} was trained on {trained_resolution}")


if __name__ == "__main__":
    run_command(main)
