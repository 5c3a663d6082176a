"""Predicts future frames with a trained model and compares them with what really happened.

    python sample_from_pix2pix.py --model_dir outputs/instruct_pix2pix_128 --num_samples 8

Training uses the same functions for its validation pictures.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.dataset import (
    DEFAULT_DATA_DIR,
    UserError,
    extraction_command,
    frame_path,
    frames_dir,
    make_folder,
    read_annotations,
    run_command,
    sampling_rank,
)
from data.pictures import save_results
from data.pretrained import hub_problem, load_pipeline, one_line
from data.scores import format_table
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
SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
}
DEFAULT_RESOLUTION = 128  # of frames, where a model does not say what it was trained on
SMALLEST_CHANGE = 6.5  # grey levels, root mean square: predicted changes below it are mostly errors


@dataclass(frozen=True)
class SamplingOptions:
    """How a frame is predicted.

    `residual=False, wiener_gain=False, num_predictions=1` draws the picture of diffusers' own pipeline, which drops the
    image guidance as well where the text's is 1. Raises `UserError` where a value is out of its range, or where
    `wiener_gain` is asked of one prediction or of `residual=False`.
    """

    num_inference_steps: int = 20  # denoising steps
    guidance_scale: float = 1.0  # of the text; 1 is none
    image_guidance_scale: float = 1.5  # of the input frame; 1 is none
    scheduler: str = "euler_ancestral"  # one of SCHEDULERS
    strength: float = 1.0  # share of the steps that are made; anything below 1 starts from the noised input frame
    num_predictions: int = 4  # pictures whose mean is the prediction
    residual: bool = True  # change the input frame by what the model changes, instead of decoding it anew
    wiener_gain: bool = True  # make the change smaller where the predictions disagree, or hardly change

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "guidance_scale", "image_guidance_scale", "num_predictions"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, not {self.scheduler}")
        if not 0 < self.strength <= 1:
            raise UserError(f"--strength must lie in (0, 1], not {self.strength}")
        if self.wiener_gain and not (self.residual and self.num_predictions > 1):
            raise UserError("--wiener_gain needs --residual and --num_predictions of 2 or more")


DEFAULT_OPTIONS = SamplingOptions()


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample_from_pix2pix.py",
        usage="%(prog)s [options]",
        description="Predict frames of validation videos, save pictures and scores.",
    )
    add = parser.add_argument
    add("--model_dir", required=True, help="a trained model's directory, or a model on the hub")
    add("--frames_dir", type=Path, help=f"frames_<R>x<R> folder (of the model's resolution in {DEFAULT_DATA_DIR})")
    add("--val_annotations", type=Path, default=DEFAULT_DATA_DIR / "annotations" / "val_filtered.json")
    add("--output_dir", type=Path, default=Path("test_result/baseline"), help="(%(default)s)")
    add("--input_frame_idx", type=int, help="frame to start from (what the model was trained on, or 20)")
    add("--target_frame_idx", type=int, help="frame to predict (what the model was trained on, or 21)")
    add("--num_samples", type=number_of_samples, default=3, help="how many entries to predict, or 'all' (%(default)s)")
    add("--seed", type=int, default=42, help="chooses the entries and their noise (%(default)s)")
    add_sampling_options(parser)
    add("--batch_size", type=int, default=8, help="pictures predicted at once (%(default)s)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the model (fp16 on a GPU, else no)")
    add("--revision", help="revision of a model on the hub")
    add("--variant", help="weights variant of the model files, such as fp16")
    add("--cache_dir", help="where models from the hub are kept")
    return parser.parse_args(arguments)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `sampling_options` reads."""
    add = parser.add_argument_group("how frames are predicted").add_argument
    default = DEFAULT_OPTIONS
    add("--num_inference_steps", type=int, default=default.num_inference_steps, help="denoising steps (%(default)s)")
    add("--guidance_scale", type=float, default=default.guidance_scale, help="of the text; 1 is none (%(default)s)")
    add(
        "--image_guidance_scale",
        type=float,
        default=default.image_guidance_scale,
        help="of the input frame; 1 is none (%(default)s)",
    )
    add("--scheduler", choices=list(SCHEDULERS), default=default.scheduler, help="(%(default)s)")
    add(
        "--strength",
        type=float,
        default=default.strength,
        help="share of the steps to make, from the noised input frame; 1 starts from noise alone (%(default)s)",
    )
    add("--num_predictions", type=int, default=default.num_predictions, help="the result is their mean (%(default)s)")
    add(
        "--residual",
        action=argparse.BooleanOptionalAction,
        default=default.residual,
        help="add the predicted change to the input frame, instead of decoding the whole picture anew",
    )
    add(
        "--wiener_gain",
        action=argparse.BooleanOptionalAction,
        help="change less where several predictions disagree or hardly change anything; needs --residual and"
        " --num_predictions of 2 or more (on wherever these are)",
    )


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """How the command line wants frames to be predicted."""
    values = {field.name: getattr(args, field.name) for field in fields(SamplingOptions)}
    if values["wiener_gain"] is None:
        values["wiener_gain"] = values["residual"] and values["num_predictions"] > 1
    return SamplingOptions(**values)


def number_of_samples(text: str) -> int | None:
    """A count of at least 1, or None for "all"."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor 'all'")
    return int(text)


def read_training_config(model_dir: str, **hub_options: str | None) -> dict[str, Any]:
    """The arguments a model, in a directory or on the hub, was trained with; empty where there is no such record."""
    path = Path(model_dir) / TRAINING_CONFIG
    if not os.path.isdir(model_dir):
        from huggingface_hub import hf_hub_download

        unreachable = hub_problem(model_dir, hub_options.get("revision")) is not None
        try:
            path = Path(hf_hub_download(model_dir, TRAINING_CONFIG, local_files_only=unreachable, **hub_options))
        except (OSError, ValueError):  # no such file there, or no such model: loading the model will say which
            return {}
    if not path.is_file():
        return {}
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        arguments.keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a training config written by train_instruct_pix2pix.py ({one_line(error)}); copy the model"
            " again, or delete the file to sample without it"
        ) from error
    return arguments


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


@dataclass(frozen=True)
class Prediction:
    """`frame`: uint8 RGB (H, W, 3). `uncertainty`: float32 (H, W), the predictions' standard deviation at each pixel
    in grey levels of 0..255, averaged over the colours; None where only one was made."""

    frame: np.ndarray
    uncertainty: np.ndarray | None


def create_scheduler(name: str, config: dict[str, Any], num_inference_steps: int) -> Any:
    """The scheduler called `name` in SCHEDULERS, for a model whose own scheduler has `config`."""
    import diffusers

    options: dict[str, Any] = {}
    if num_inference_steps == 1:
        options = {"timestep_spacing": "trailing"}  # the only one whose single step begins where all is noise
    if name == "ddim":
        # Latents are not bounded by 1 as pictures are, and DDIM's steps fit no other spacing.
        options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    return getattr(diffusers, SCHEDULERS[name]).from_config(config, **options)


def encode_prompts(pipeline: StableDiffusionInstructPix2PixPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """The text encoder's states (N, 77, d)."""
    from data.encoded_pairs import tokenize

    encoder = pipeline.text_encoder
    return encoder(tokenize(pipeline, prompts).to(encoder.device))[0]


def encode_frames(pipeline: StableDiffusionInstructPix2PixPipeline, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The posterior's mode of uint8 RGB frames (H, W, 3): unscaled latents (N, 4, h, w)."""
    from PIL import Image

    pixels = pipeline.image_processor.preprocess([Image.fromarray(image) for image in images])
    return pipeline.vae.encode(pixels.to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist.mode()


def decode_latents(pipeline: StableDiffusionInstructPix2PixPipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures of unscaled latents: float32 RGB (N, H, W, 3) in grey levels, not clipped to 0..255."""
    decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample
    if not decoded.isfinite().all():
        raise UserError("the model's output is not finite: predict with --mixed_precision no, or bf16")
    return ((decoded.float() + 1) * 127.5).permute(0, 2, 3, 1).cpu().numpy()


def to_picture(grey_levels: np.ndarray) -> np.ndarray:
    return grey_levels.clip(0, 255).round().astype(np.uint8)


def guided_prediction(
    unet: torch.nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    empty_embeds: torch.Tensor,
    options: SamplingOptions,
) -> torch.Tensor:
    """The UNet's output with guidance, eq. 3 of Brooks et al., 2023 (arXiv 2211.09800), sorted by branches.

    A branch whose weight is zero is not computed: without any guidance that leaves one of three.
    """
    import torch

    no_image = torch.zeros_like(image_latents)
    text_scale, image_scale = options.guidance_scale, options.image_guidance_scale
    branches = [
        (text_scale, image_latents, prompt_embeds),
        (image_scale - text_scale, image_latents, empty_embeds),
        (1 - image_scale, no_image, empty_embeds),
    ]
    branches = [branch for branch in branches if branch[0] != 0]
    weights, images, embeds = zip(*branches)
    unet_input = torch.cat([torch.cat([latents, image], dim=1) for image in images])
    outputs = unet(unet_input.to(unet.dtype), timestep, torch.cat(embeds), return_dict=False)[0].float()
    return sum(weight * output for weight, output in zip(weights, outputs.chunk(len(branches))))


def denoise(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    image_latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    generators: list[torch.Generator],
    options: SamplingOptions,
) -> torch.Tensor:
    """Samples latents (N, 4, h, w), unscaled like `image_latents`, from the noise of each sample's generator."""
    from diffusers.utils.torch_utils import randn_tensor

    scheduler = create_scheduler(options.scheduler, pipeline.scheduler.config, options.num_inference_steps)
    device, factor = image_latents.device, pipeline.vae.config.scaling_factor
    scheduler.set_timesteps(options.num_inference_steps, device=device)
    num_steps = max(1, round(options.num_inference_steps * options.strength))
    # Rounding gives DDIM one step too many for some numbers.
    timesteps = scheduler.timesteps[: options.num_inference_steps][-num_steps:]
    latents = randn_tensor(image_latents.shape, generator=generators, device=device)
    if options.strength == 1:
        latents = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(options.num_inference_steps - num_steps)
        latents = scheduler.add_noise(image_latents.float() * factor, latents, timesteps[:1])
    empty_embeds = encode_prompts(pipeline, [""]).expand_as(prompt_embeds)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": generators} if takes_generator else {}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        output = guided_prediction(pipeline.unet, scaled, timestep, image_latents, prompt_embeds, empty_embeds, options)
        latents = scheduler.step(output, timestep, latents, **noise_source).prev_sample
    return latents / factor


def gain_of_agreement(changes: np.ndarray) -> np.ndarray:
    """Wiener's gain for the mean of K changes in grey levels: float32 (K, H, W, 3) in, (H, W, 1) in [0, 1] out.

    Signal / (signal + noise), where the mean change squared stands for signal + noise, and for the noise the variance
    of a mean of K, but never less than SMALLEST_CHANGE squared. Both are summed over the colours and averaged over a
    neighbourhood of a 16th of the side.
    """
    import cv2

    power = np.square(changes.mean(axis=0)).sum(axis=-1)
    noise = changes.var(axis=0, ddof=1).sum(axis=-1) / len(changes)
    power, noise = (cv2.GaussianBlur(image, (0, 0), changes.shape[2] / 16) for image in (power, noise))
    noise = np.maximum(noise, 3 * SMALLEST_CHANGE**2)
    return (np.maximum(power - noise, 0) / (power + 1e-6))[..., None]


def predict_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    images: Sequence[np.ndarray],
    prompts: Sequence[str],
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> list[Prediction]:
    """Predicts one batch from uint8 RGB frames (H, W, 3).

    Each sample has its own noise seed, so its picture does not depend on its neighbours in the batch. Of several
    predictions the first is the one that would be made alone.
    """
    import torch

    count = options.num_predictions
    with torch.no_grad():
        image_latents = encode_frames(pipeline, images)
        prompt_embeds = encode_prompts(pipeline, prompts)
        noise_seeds = [seed if k == 0 else derive_seed(seed, "prediction", k) for seed in seeds for k in range(count)]
        generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
        repeated = (image_latents.repeat_interleave(count, dim=0), prompt_embeds.repeat_interleave(count, dim=0))
        decoded = decode_latents(pipeline, denoise(pipeline, *repeated, generators, options))
        decoded = decoded.reshape(len(images), count, *decoded.shape[1:])
        if not options.residual:
            return [combine_plain(pictures.clip(0, 255)) for pictures in decoded]
        reconstructed = decode_latents(pipeline, image_latents)
    return [
        combine_residual(pictures, same, image.astype(np.float32), options.wiener_gain)
        for pictures, same, image in zip(decoded, reconstructed, images)
    ]


def combine_plain(pictures: np.ndarray) -> Prediction:
    """The mean of K decoded pictures (K, H, W, 3), in grey levels."""
    return Prediction(to_picture(pictures.mean(axis=0)), spread(pictures))


def combine_residual(
    pictures: np.ndarray, reconstruction: np.ndarray, image: np.ndarray, wiener_gain: bool
) -> Prediction:
    """`image` (H, W, 3) plus the mean change of K decoded pictures (K, H, W, 3) from its `reconstruction`.

    With `wiener_gain` a mix of `image` and the mean of `pictures`: what the VAE loses of the input frame belongs where
    nothing moves (gain 0), and is wrong where something else has come (gain 1). All in grey levels.
    """
    mean = pictures.mean(axis=0)
    if wiener_gain:
        result = image + gain_of_agreement(pictures - reconstruction) * (mean - image)
    else:
        result = image + mean - reconstruction
    return Prediction(to_picture(result), spread(pictures))


def spread(pictures: np.ndarray) -> np.ndarray | None:
    """The standard deviation of K pictures (K, H, W, 3), averaged over the colours: (H, W); None for K = 1."""
    return None if len(pictures) == 1 else pictures.std(axis=0, ddof=1).mean(axis=-1)


def reconstruct_frames(
    pipeline: StableDiffusionInstructPix2PixPipeline, images: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The pictures after one trip through the VAE (posterior mode), uint8 RGB: as good as decoding alone can be."""
    import torch

    with torch.no_grad():
        return [to_picture(decoded) for decoded in decode_latents(pipeline, encode_frames(pipeline, images))]


def predict_pairs(
    pipeline: StableDiffusionInstructPix2PixPipeline,
    pairs: Sequence[dict[str, Any]],
    seed: int,
    batch_size: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    show_progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Predicts every pair of `find_frame_pairs`, `batch_size` pictures at once, or all predictions of one if more.

    Yields one dictionary a pair, as `data.scores` and `data.pictures` take them: `video_id`, `task`, `prompt`, the
    uint8 RGB pictures `input`, `prediction`, `target` and `vae_ceiling` (the last two None where the video lacks the
    target), and `uncertainty` as `Prediction` has it.
    """
    from tqdm import tqdm

    dataset = frame_pairs_dataset(pairs)
    with tqdm(total=len(dataset), desc="Predicting", unit="frame", disable=not show_progress) as progress_bar:
        for batch in dataset.iter(max(1, batch_size // options.num_predictions)):
            inputs = [np.asarray(image) for image in batch["input_image"]]
            targets = [None if image is None else np.asarray(image) for image in batch["edited_image"]]
            seeds = [derive_seed(seed, video_id) for video_id in batch["video_id"]]
            predictions = predict_frames(pipeline, inputs, batch["edit_prompt"], seeds, options)
            known = [target for target in targets if target is not None]
            ceilings = iter(reconstruct_frames(pipeline, known) if known else [])
            for index, target in enumerate(targets):
                yield {
                    "video_id": batch["video_id"][index],
                    "task": batch["task"][index],
                    "prompt": batch["edit_prompt"][index],
                    "input": inputs[index],
                    "prediction": predictions[index].frame,
                    "uncertainty": predictions[index].uncertainty,
                    "target": target,
                    "vae_ceiling": None if target is None else next(ceilings),
                }
            progress_bar.update(len(targets))


def check_args(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be at least 1, not {args.batch_size}")
    sampling_options(args)
    if not args.val_annotations.is_file():
        raise UserError(f"there is no file {args.val_annotations}; make it with: python -m data.dataset")


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
        args.frames_dir = frames_dir(DEFAULT_DATA_DIR, trained.get("resolution", DEFAULT_RESOLUTION))
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
        raise UserError(
            f"no video of {args.val_annotations} has frame {args.input_frame_idx} in {args.frames_dir};"
            f" {where_frames_may_be(args.frames_dir, args.input_frame_idx)}"
        )
    pairs = choose_samples(pairs, args.num_samples, args.seed)
    check_frame_sizes(pairs, trained.get("resolution"), args.model_dir)
    make_folder(args.output_dir)  # a wrong one is refused before the model is loaded
    pipeline = place_pipeline(args)
    results = predict_pairs(pipeline, pairs, args.seed, args.batch_size, sampling_options(args))
    note = f"{args.model_dir}, frame {args.input_frame_idx} to {args.target_frame_idx}"
    summary = save_results(results, args.output_dir, note, show_progress=False)
    print(format_table(summary))
    if summary["num_without_target"]:
        print(f"{summary['num_without_target']} samples have no frame {args.target_frame_idx}: predicted, not scored")
    print(
        f"pictures: {args.output_dir}/overview.png, {args.output_dir}/scores.png, {args.output_dir}/samples/;"
        f" scores: {args.output_dir}/metrics.json"
    )


def where_frames_may_be(folder: Path, frame_idx: int) -> str:
    """Advice for a user whose frames folder holds no frame `frame_idx` of any annotated video."""
    inside = sorted(path for path in folder.glob("frames_*x*") if path.is_dir())
    if inside:
        return f"name a folder of frames in it, such as {inside[0]} (FRAMES_DIR, --frames_dir)"
    if any(folder.glob(str(frame_path("", "*", frame_idx)))):
        return "its videos are not those of these annotations: name both from the same data directory"
    if any(folder.glob("*/*.png")):
        return "choose an earlier frame (INPUT_FRAME_IDX, --input_frame_idx)"
    return f"extract the frames with: {extraction_command(folder)}"


def check_frame_sizes(pairs: Sequence[dict[str, Any]], trained_resolution: int | None, model_dir: str) -> None:
    """Raises UserError where frames are damaged, differ in size, or do not fit any model."""
    from PIL import Image

    from data.frame_check import check_frames

    frame = pairs[0]["input_image"]
    try:
        with Image.open(frame) as image:
            side = image.width
    except OSError:  # damaged, as check_frames will say
        side = trained_resolution or DEFAULT_RESOLUTION
    check_frames(pairs, side)
    if side % 8:
        raise UserError(f"{frame} is {side} pixels wide; the model needs a multiple of 8")
    if trained_resolution is not None and side != trained_resolution:
        warn(f"the frames are {side} pixels wide, but {model_dir} was trained on {trained_resolution}")


if __name__ == "__main__":
    run_command(main)
