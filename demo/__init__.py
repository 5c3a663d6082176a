"""The embedded default: clips rendered in Something-Something V2's layout, and a small base model."""

from pathlib import Path

BASE_MODEL = Path("demo/base_model")
# As a training would record them: prompts tell progress and horizon, and the quick test's way to sample.
BASE_SETTINGS = {
    "data_dir": None,  # clips are rendered
    "resolution": 96,
    "horizon": "1-10",
    "add_progress": True,
    "num_inference_steps": 8,
    "scheduler": "euler",
    "guidance_scale": 1.0,
    "image_guidance_scale": 1.0,
}
