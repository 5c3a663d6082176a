"""The two optimizer steps that benchmarks/train_step.py times: diffusers' example's, and ours.

Both have the same methods: `start` makes a fresh optimizer and says what to time, `take` makes a step, `loss` is that
of one batch, which both must agree on, and `stop` puts things back.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from data.clips import derive_seed
from pecn import optimization
from pecn.diffusion import diffusion_loss
from pecn.encoded_frames import TrainingBatches, load_batches
from pecn.model import DTYPES, tokenize

# Training's defaults.
LEARNING_RATE, MAX_GRAD_NORM = 5e-6, 1.0

Timed = tuple[Any, str, str]  # (owner, name) of a function, and the part of the step that it is


class PlainStep:
    """The optimizer step of diffusers' InstructPix2Pix training example, which encodes what it is given each time.

    Pictures and tokens are prepared beforehand: reading them is not part of what is timed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: StableDiffusionInstructPix2PixPipeline,
        noise_scheduler: Any,
        batches: TrainingBatches,
    ) -> None:
        self.accelerator, self.pipeline, self.noise_scheduler = accelerator, pipeline, noise_scheduler
        self.batches, self.weight_dtype = batches, DTYPES[accelerator.mixed_precision]
        preprocess, encoded = pipeline.image_processor.preprocess, batches.encoded
        frames = zip(*(clip.paths for clip in encoded.clips))
        self.input_pixels, self.target_pixels = (preprocess([Image.open(path) for path in paths]) for paths in frames)
        self.token_ids = tokenize(pipeline, [clip.prompt(encoded.choice, 20, 1) for clip in encoded.clips])

    def start(self, model: torch.nn.Module) -> list[Timed]:
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to(self.accelerator.device, self.weight_dtype)
        self.model, self.first_rows = model, itertools.count(0, self.batches.train_batch_size)
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
        timed = [(self, "encode", "encoding"), (self, "forward", "forward"), (self, "clip", "clip")]
        return [*timed, (self.accelerator, "backward", "backward"), (self.optimizer, "step", "optimizer")]

    def take(self) -> None:
        """One update of the weights, with the losses read where the example reads them to log them."""
        train_loss = 0.0
        for _ in range(self.batches.gradient_accumulation_steps):
            first_row = next(self.first_rows)
            rows = [row % len(self.token_ids) for row in range(first_row, first_row + self.batches.train_batch_size)]
            with self.accelerator.accumulate(self.model):
                loss = self.forward(self.model, self.encode(rows))
                mean_loss = self.accelerator.gather(loss.repeat(len(rows))).mean()
                train_loss += mean_loss.item() / self.batches.gradient_accumulation_steps
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss.detach().item()  # the example shows each pass's loss in its progress bar

    def encode(self, rows: list[int]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """The posterior of the target's latents, the input's latents, the prompt's embedding."""
        vae, device = self.pipeline.vae, self.accelerator.device
        posterior = vae.encode(self.target_pixels[rows].to(device, self.weight_dtype)).latent_dist
        prompt_embeds = self.pipeline.text_encoder(self.token_ids[rows].to(device))[0]
        image_latents = vae.encode(self.input_pixels[rows].to(device, self.weight_dtype)).latent_dist.mode()
        return posterior, image_latents, prompt_embeds

    def forward(
        self, model: torch.nn.Module, encoded: tuple[Any, ...], generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The loss. A CPU generator in the place of the device's own draws what `TrainingBatches` draws from it."""
        posterior, image_latents, prompt_embeds = encoded
        mean, scheduler = posterior.mean, self.noise_scheduler
        drawn = {"generator": generator, "device": mean.device if generator is None else torch.device("cpu")}
        noise = torch.randn(mean.shape, **drawn).to(mean)
        posterior_noise = torch.randn(mean.shape, **drawn).to(mean)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(noise),), **drawn).to(mean.device)
        latents = (mean + posterior.std * posterior_noise) * self.pipeline.vae.config.scaling_factor
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        unet_input = torch.cat([noisy_latents, image_latents], dim=1)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = model(unet_input, timesteps, prompt_embeds, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target.float())

    def clip(self) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)

    def loss(self, step: int) -> torch.Tensor:
        """The loss of a step of one pass, with the random numbers of ours."""
        generator = torch.Generator().manual_seed(derive_seed(self.batches.seed, "step", step))
        return self.forward(self.model, self.encode(self.batches.samples_of_step(step)), generator)

    def stop(self) -> None:
        for frozen in (self.pipeline.vae, self.pipeline.text_encoder):
            frozen.to("cpu", torch.float32)
        self.optimizer.zero_grad(set_to_none=True)


class OurStep:
    """The optimizer step of train_instruct_pix2pix.py, with the losses read as seldom as there."""

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: StableDiffusionInstructPix2PixPipeline,
        noise_scheduler: Any,
        batches: TrainingBatches,
        use_8bit_adam: bool,
    ) -> None:
        self.accelerator, self.pipeline, self.noise_scheduler = accelerator, pipeline, noise_scheduler
        self.batches, self.use_8bit_adam = batches, use_8bit_adam

    def start(self, model: torch.nn.Module) -> list[Timed]:
        self.model = model
        self.optimizer = self.accelerator.prepare(
            optimization.create_optimizer(model, LEARNING_RATE, self.use_8bit_adam)
        )
        self.loader = load_batches(self.batches, 0, self.accelerator.device, self.pipeline)
        self.log = optimization.StepLog(self.accelerator, self.batches.global_batch_size, self.batches.num_samples)
        timed = [(optimization, "diffusion_loss", "forward"), (optimization, "clip_gradients", "clip")]
        return [*timed, (self.accelerator, "backward", "backward"), (self.optimizer, "step", "optimizer")]

    def take(self) -> None:
        loss, norm, updated = optimization.optimizer_step(
            self.accelerator, self.model, self.optimizer, self.noise_scheduler, self.loader, MAX_GRAD_NORM
        )
        self.log.add(len(self.log.pending) + 1, loss, norm, LEARNING_RATE, updated)
        if len(self.log.pending) == optimization.LOG_EVERY:
            self.log.flush()

    def loss(self, step: int) -> torch.Tensor:
        """The loss of a step of one pass."""
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in self.batches[step].items()}
        return diffusion_loss(self.model, self.noise_scheduler, batch)

    def stop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
