"""The frames and prompts of a run, passed once through the frozen VAE and text encoder, and the batches of its steps.

`encode_once` fills (or finds) files whose names say all that determines their content; `TrainingBatches` draws from
them. A frame is encoded once, in however many pairs it takes part.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from filelock import FileLock
from tqdm import tqdm, trange

from data.cli import UserError
from data.clips import Clip, FrameChoice, derive_seed
from data.files import whole_or_absent
from data.prompts import swap_left_and_right
from data.video_decoder import load_picture
from pecn.diffusion import conditioning_dropout
from pecn.model import Pipeline, digest, encode_pictures, encode_prompts, module_bytes, tokenize, warn_of_cuts
from pecn.processes import on_main_process

STORE_FORMAT = b"4"  # raise it when what the files hold changes
ENCODING_BATCH = 16  # frames, or prompts

# Encoding.


@dataclass(frozen=True)
class EncodedClips:
    """What the frozen models make of the clips: arrays in files, float32, read as they are used."""

    clips: Sequence[Clip]
    choice: FrameChoice  # which pairs the clips offer
    moments: np.ndarray  # (N, 2 C, h, w): each frame's posterior, mean and log variance, not scaled
    first_rows: list[int]  # of each clip in `moments`
    mirrored_rows: int | None  # where the mirrored frames begin; None where there are none
    embeddings: np.ndarray | None  # (P, 77, d) of `prompts`; None where they are encoded anew in each step
    prompts: dict[str, int]  # their rows, the empty one's is 0
    key: str  # names all that determines the content

    def draw(self, index: int, for_horizon: float, for_start: float, mirrored: bool) -> tuple[int, int, str]:
        """A pair of the clip, chosen by two numbers in [0, 1): the rows of its two frames, and its prompt."""
        clip = self.clips[index]
        start, horizon = self.choice.draw(clip.frame_set, for_horizon, for_start)
        first_row = self.first_rows[index] + (self.mirrored_rows if mirrored else 0)
        rows = (first_row + clip.frames.index(frame) for frame in (start, start + horizon))
        prompt = clip.prompt(start, horizon if self.choice.tell_horizon else None)
        return *rows, swap_left_and_right(prompt) if mirrored else prompt


def encode_once(
    pipeline: Pipeline, clips: Sequence[Clip], choice: FrameChoice, random_flip: bool, cache_dir: Path
) -> EncodedClips:
    """Passes all frames of the clips through the VAE, and their prompts through the text encoder where each has one.

    What `cache_dir` holds already is not done again. With `random_flip` mirrored frames are added. Where pairs of a
    clip differ in their prompts, these are too many to keep: they are encoded as they are drawn.
    """
    tells_start = choice.start is None and clips[0].progress is not None
    has_one_prompt = not tells_start and (len(choice.horizons) == 1 or not choice.tell_horizon)
    horizon = choice.horizons[0] if choice.tell_horizon else None
    own = [clip.prompt(clip.frames[0], horizon) for clip in clips]
    if PartialState().is_main_process:
        warn_of_cuts(pipeline, own)
    mirrored = map(swap_left_and_right, own) if random_flip else ()
    prompts = sorted({"", *own, *mirrored}) if has_one_prompt else [""]

    def store() -> tuple[tuple[np.ndarray, str], tuple[np.ndarray, str]]:
        frames = stored_frames(pipeline, clips, random_flip, cache_dir)
        return frames, stored_prompts(pipeline, prompts, cache_dir)

    stored = []
    on_main_process(lambda: stored.append(store()))
    (moments, frames_key), (embeddings, prompts_key) = stored[0] if stored else store()  # the others find the files
    told = [(clip.label, clip.frames, clip.progress) for clip in clips]
    contents = json.dumps([asdict(choice) | {"horizons": list(choice.horizons)}, told]).encode()
    return EncodedClips(
        clips=clips,
        choice=choice,
        moments=moments,
        first_rows=[0, *itertools.accumulate(len(clip.frames) for clip in clips)][:-1],
        mirrored_rows=len(moments) // 2 if random_flip else None,
        embeddings=embeddings if has_one_prompt else None,
        prompts={prompt: row for row, prompt in enumerate(prompts)},
        key=digest([frames_key.encode(), prompts_key.encode(), contents]),
    )


def encoded_cache(data_dir: Path, output_dir: Path) -> Path:
    """The folder for what is encoded: in the data directory, or, where that is read-only, in the output directory."""
    folder = data_dir / "encoded_cache"
    return folder if os.access(folder if folder.is_dir() else data_dir, os.W_OK) else output_dir / "encoded_cache"


def stored_frames(pipeline: Pipeline, clips: Sequence[Clip], mirrored: bool, cache_dir: Path) -> tuple[np.ndarray, str]:
    """The VAE's posterior of all frames of the clips, one after the other: mean and log variance, not scaled.

    Returns a float32 array (N, 2 C, h, w), a file in `cache_dir` that is written where it is missing, and its name,
    which depends on the bytes of all frames. With `mirrored` the mirrored frames follow all others. Raises UserError
    where a frame cannot be read, or has not the first one's size.
    """
    vae, paths = pipeline.vae, [path for clip in clips for path in clip.paths]
    reading = tqdm(paths, desc="Reading frames", unit="frame", delay=2)  # no bar where it takes a moment
    key = digest(itertools.chain([STORE_FORMAT, bytes([mirrored])], module_bytes(vae), map(Path.read_bytes, reading)))
    size = load_picture(paths[0]).shape

    def encode(batch: Sequence[tuple[Path, bool]]) -> torch.Tensor:
        pictures = []
        for path, flip in batch:
            picture = load_picture(path)
            if picture.shape != size:
                raise UserError(f"{path} is {picture.shape[1]} x {picture.shape[0]} pixels, not {size[1]} x {size[0]}")
            pictures.append(picture[:, ::-1] if flip else picture)
        return encode_pictures(pipeline, pictures).parameters

    frames = [(path, flip) for flip in ([False, True] if mirrored else [False]) for path in paths]
    height, width = (side // pipeline.vae_scale_factor for side in size[:2])
    shape = (len(frames), 2 * vae.config.latent_channels, height, width)
    blocks = encode_all(vae, encode, frames)
    return stored_array(cache_dir / f"frames-{key}.npy", np.float32, shape, blocks), key


def stored_prompts(pipeline: Pipeline, prompts: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    """The text encoder's states of the prompts, float32 (P, 77, d), and the name of their file, as `stored_frames`."""
    text_encoder, tokens = pipeline.text_encoder, tokenize(pipeline, prompts)
    key = digest([STORE_FORMAT, *module_bytes(text_encoder), tokens.numpy().tobytes()])
    shape = (*tokens.shape, text_encoder.config.hidden_size)
    blocks = encode_all(text_encoder, functools.partial(encode_prompts, pipeline), prompts)
    return stored_array(cache_dir / f"prompts-{key}.npy", np.float32, shape, blocks), key


@torch.no_grad()
def encode_all(
    model: torch.nn.Module, encode: Callable[[Sequence[Any]], torch.Tensor], inputs: Sequence[Any]
) -> Iterator[np.ndarray]:
    """What `encode` makes of the inputs with one of a pipeline's models, some at a time, in float32."""
    model.to(PartialState().device)
    name = type(model).__name__
    for start in trange(0, len(inputs), ENCODING_BATCH, desc=f"Encoding with {name}", unit="batch"):
        encoded = encode(inputs[start : start + ENCODING_BATCH])
        if not encoded.isfinite().all():
            raise UserError(f"the model's {name} gives numbers that are not finite; name another model")
        yield encoded.float().cpu().numpy()
    model.to("cpu")


def stored_array(path: Path, dtype: type, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The array in an .npy file, read as it is used. Where it is missing, its `blocks` of rows are written first.

    Of two processes that write the same file one waits for the other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                with whole_or_absent(path) as partial:
                    array, row = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape), 0
                    for block in blocks:
                        array[row : row + len(block)] = block
                        row += len(block)
                    array.flush()
    return np.load(path, mmap_mode="r")


# Batches.


@dataclass(eq=False, kw_only=True)
class TrainingBatches:
    """The passes of a whole run: item k is the k-th pass (micro-batch) of this process.

    Samples are drawn as one endless stream of epochs, each a new permutation of the clips; which of a clip's pairs is
    seen is drawn each time. Everything random in an optimizer step is drawn for its whole global batch from a generator
    seeded by (seed, step), of which each process takes its share: nothing depends on how often a generator was called
    before, or on how the batch is divided. So a resumed run equals an uninterrupted one, and two processes equal one.
    """

    encoded: EncodedClips
    seed: int
    train_batch_size: int  # samples of one process in one pass
    gradient_accumulation_steps: int = 1  # passes in a step
    num_train_epochs: int
    max_train_steps: int | None = None  # overrides num_train_epochs
    scaling_factor: float  # the VAE's, for target latents
    num_train_timesteps: int
    conditioning_dropout_prob: float = 0.0
    num_processes: int = 1
    process_index: int = 0

    def __post_init__(self) -> None:
        self.num_samples = len(self.encoded.clips)
        self.global_batch_size = self.train_batch_size * self.num_processes * self.gradient_accumulation_steps
        if self.max_train_steps is None:
            self.max_train_steps = math.ceil(self.num_train_epochs * self.num_samples / self.global_batch_size)

    def ends_epochs(self, step: int, num_epochs: int) -> bool:
        """Whether a multiple of `num_epochs` epochs is complete with the optimizer step (counted from 1)."""
        samples_between = num_epochs * self.num_samples
        return step * self.global_batch_size // samples_between > (step - 1) * self.global_batch_size // samples_between

    def samples_of_step(self, step: int) -> list[int]:
        """Which clips the optimizer step (counted from 0) sees, over all processes."""
        positions = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs_and_places = [divmod(position, self.num_samples) for position in positions]
        return [order_of_epoch(self.num_samples, self.seed, epoch)[place] for epoch, place in epochs_and_places]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`target_latents` (B, C, h, w), scaled; `image_latents` (B, C, h, w), not scaled, 0 where dropped;
        `prompt_embeds` (B, 77, d) and `empty_embeds` (1, 77, d), or the B `prompts` that are to be encoded; `noise`
        (B, C, h, w); `timesteps` (B,).
        """
        step, pass_index = divmod(index, self.gradient_accumulation_steps)
        start = (pass_index * self.num_processes + self.process_index) * self.train_batch_size
        share = slice(start, start + self.train_batch_size)  # of the global batch

        encoded, size = self.encoded, self.global_batch_size
        channels, *sides = encoded.moments.shape[1:]
        shape = (size, channels // 2, *sides)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", step))
        noise = torch.randn(shape, generator=generator)[share]
        posterior_noise = torch.randn(shape, generator=generator)[share]
        timesteps = torch.randint(self.num_train_timesteps, (size,), generator=generator)[share]
        dropout = torch.rand(size, generator=generator)[share]
        mirrored = (torch.rand(size, generator=generator)[share] < 0.5) & (encoded.mirrored_rows is not None)
        for_pairs = torch.rand(size, 2, generator=generator)[share]

        samples = zip(self.samples_of_step(step)[share], for_pairs.tolist(), mirrored.tolist())
        drawn = [encoded.draw(clip, *numbers, flipped) for clip, numbers, flipped in samples]
        input_rows, target_rows, prompts = zip(*drawn)
        image_latents = torch.from_numpy(encoded.moments[list(input_rows), : channels // 2])  # the posterior's mode
        posterior = DiagonalGaussianDistribution(torch.from_numpy(encoded.moments[list(target_rows)]))
        target_latents = posterior.mean + posterior.std * posterior_noise

        drop_text, drop_image = conditioning_dropout(dropout, self.conditioning_dropout_prob)
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, drop_text.tolist())]
        batch = {
            "target_latents": target_latents * self.scaling_factor,
            "image_latents": image_latents * ~drop_image[:, None, None, None],
            "noise": noise,
            "timesteps": timesteps,
        }
        if encoded.embeddings is None:
            return batch | {"prompts": prompts}
        rows = [encoded.prompts[prompt] for prompt in prompts]
        embeds = torch.from_numpy(encoded.embeddings[[*rows, 0]])  # the empty prompt's are in row 0
        return batch | {"prompt_embeds": embeds[:-1], "empty_embeds": embeds[-1:]}

    def load(self, steps_done: int, pipeline: Pipeline, accelerator: Accelerator) -> Iterator[dict[str, torch.Tensor]]:
        """This process's passes after the first `steps_done` optimizer steps, to the end, on its device.

        Prompts that are not kept encoded pass through the pipeline's text encoder here, in the run's precision.
        """
        device = accelerator.device
        passes = self.gradient_accumulation_steps
        for index in range(steps_done * passes, self.max_train_steps * passes):
            batch = self[index]
            prompts = batch.pop("prompts", None)
            if device.type == "cuda":
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            if prompts is not None:
                pipeline.text_encoder.to(device)  # a validation puts it away
                with torch.no_grad(), accelerator.autocast():
                    embeds = encode_prompts(pipeline, [*prompts, ""])
                batch |= {"prompt_embeds": embeds[:-1], "empty_embeds": embeds[-1:]}
            yield batch


@functools.lru_cache(maxsize=1)
def order_of_epoch(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch (counted from 0) sees the clips."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator).tolist()
