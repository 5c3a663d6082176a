"""Predicting frames: what is drawn, with which guidance and steps, and what several draws are made into."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.clips import FrameChoice, draw_pair, find_clips
from pecn.sampling import predict_frames, predict_pairs, reconstruct_frame, with_background
from pecn.sampling_options import DEFAULT_OPTIONS, SCHEDULERS, SamplingOptions
from tests.conftest import SIDE, make_tiny_pipeline

PLAIN = SamplingOptions(num_inference_steps=2, image_guidance_scale=1.0)


@pytest.fixture(scope="module")
def pipeline():
    return make_tiny_pipeline()


def frames_and_prompts(count=3):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count)]
    return frames, [f"moving {number} cups" for number in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (1.0, 1.0)])
def test_default_options_draw_what_the_stock_pipeline_draws(prediction_type, text, image):
    """Without text guidance the stock pipeline has none of the image either."""
    assert not DEFAULT_OPTIONS.keep_background and DEFAULT_OPTIONS.num_predictions == 1
    pipeline = make_tiny_pipeline(prediction_type=prediction_type)
    frames, prompts = frames_and_prompts()
    options = {"num_inference_steps": 5, "guidance_scale": text, "image_guidance_scale": image}
    ours = predict_frames(pipeline, frames, prompts, [1, 2, 3], replace(DEFAULT_OPTIONS, **options))
    for frame, prompt, seed, prediction in zip(frames, prompts, (1, 2, 3), ours):
        generator = torch.Generator().manual_seed(seed)
        stock = pipeline(prompt=prompt, image=Image.fromarray(frame), generator=generator, **options).images[0]
        assert np.abs(np.asarray(stock).astype(int) - prediction.sample).max() <= 1
        assert prediction.expected is prediction.uncertainty is None


def test_the_sample_is_the_first_draw_and_the_expected_frame_the_mean(pipeline):
    frames, prompts = frames_and_prompts(2)

    def predict(count):
        return predict_frames(pipeline, frames, prompts, [5, 6], replace(PLAIN, num_predictions=count))

    for single, two, three in zip(predict(1), predict(2), predict(3)):
        for several in (two, three):
            assert np.abs(single.sample.astype(int) - several.sample).max() <= 1
        second = 2.0 * two.expected - two.sample  # to within the mean's rounding
        third = 3.0 * three.expected - two.sample - second
        assert np.abs(second - two.sample).mean() > 1 and np.abs(third - second).mean() > 1  # other noise
        # Two values lie standard deviation / sqrt(2) from their mean.
        distance = np.abs(two.expected.astype(float) - two.sample).mean(axis=2)
        assert np.abs(distance - two.uncertainty / np.sqrt(2)).max() <= 1


@pytest.mark.parametrize(("change", "shown"), [(7, 0), (9, 4), (14, 14), (80, 80)])
def test_the_background_is_kept_unless_the_change_is_large(change, shown):
    image = np.full((32, 32, 3), 100, np.float32)
    assert with_background(image + change, image, image) == pytest.approx(image + shown, abs=0.5)
    assert np.array_equal(with_background(image + change, image, None), image + change)


def test_kept_background_has_the_inputs_own_pixels():
    rng = np.random.default_rng(0)
    image = rng.uniform(90, 150, (96, 96, 3)).astype(np.float32).round()
    reconstruction = np.full_like(image, 120)  # the VAE loses all detail
    picture = reconstruction + rng.normal(0, 1, (96, 96, 3)).astype(np.float32)
    picture[40:80, 40:80] += 80
    kept = with_background(picture, image, reconstruction)
    assert np.array_equal(kept[:16, :16], image[:16, :16])
    assert np.abs(kept - 200)[50:70, 50:70].max() < 6  # the input's detail would be 30 off


def test_keep_background_is_one_rule_for_sample_and_mean(pipeline):
    frames, prompts = frames_and_prompts()
    options = replace(PLAIN, num_predictions=2, num_inference_steps=10, strength=0.1)  # near the input
    plain, kept = (
        predict_frames(pipeline, frames, prompts, [1, 2, 3], replace(options, keep_background=keep))
        for keep in (False, True)
    )
    for frame, decoded, mixed in zip(frames, plain, kept):
        reconstruction = reconstruct_frame(pipeline, frame).astype(np.float32)
        for name in ("sample", "expected"):
            before, after = getattr(decoded, name), getattr(mixed, name)
            by_hand = with_background(before.astype(np.float32), frame.astype(np.float32), reconstruction)
            assert np.abs(by_hand - after).mean() < 1 and not np.array_equal(before, after)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("num_steps", (1, 2, 20))
def test_steps_begin_in_noise_and_are_as_many_as_asked(scheduler, num_steps, pipeline):
    frames, prompts = frames_and_prompts(1)
    timesteps = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: timesteps.append(float(inputs[1])))
    predict_frames(pipeline, frames, prompts, [0], replace(PLAIN, num_inference_steps=num_steps, scheduler=scheduler))
    hook.remove()
    assert len(timesteps) == num_steps
    assert timesteps[0] > 950 and min(timesteps) >= 0
    assert timesteps == sorted(timesteps, reverse=True)


def test_branches_without_weight_are_not_computed(pipeline):
    frames, prompts = frames_and_prompts(1)
    batches = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    for text, image, branches in ((1.0, 1.0, 1), (3.0, 1.0, 2), (1.5, 1.5, 2), (7.5, 1.5, 3)):
        batches.clear()
        options = SamplingOptions(num_inference_steps=1, guidance_scale=text, image_guidance_scale=image)
        predict_frames(pipeline, frames, prompts, [0], options)
        assert batches == [branches]
    hook.remove()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_weak_start_stays_near_the_input_frame(scheduler, pipeline):
    frames, prompts = frames_and_prompts()
    unchanged = np.stack([reconstruct_frame(pipeline, frame) for frame in frames]).astype(int)

    def distance(strength):
        options = replace(PLAIN, scheduler=scheduler, strength=strength, num_inference_steps=10)
        predictions = predict_frames(pipeline, frames, prompts, [1, 2, 3], options)
        return np.abs(np.stack([prediction.sample for prediction in predictions]) - unchanged).mean()

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_a_pairs_noise_follows_from_the_seed_and_its_video_alone(pipeline, data_dir):
    clips, _ = find_clips(data_dir, "val", SIDE, FrameChoice())
    pairs = [draw_pair(clip, FrameChoice(), seed=0) for clip in clips]

    def samples(pairs, seed, batch_size):
        made = predict_pairs(pipeline, pairs, seed, batch_size, PLAIN)
        return {prediction.video_id: prediction.predicted.sample.astype(int) for prediction in made}

    together, alone, other = samples(pairs, 1, 3), samples(pairs[::-1], 1, 1), samples(pairs[:1], 2, 1)
    assert max(np.abs(together[name] - alone[name]).max() for name in together) <= 1  # the last bit's rounding
    assert not np.array_equal(other["val0"], together["val0"])
    assert not np.array_equal(together["val0"], together["val1"])
