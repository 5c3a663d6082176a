"""The memory of a training step, as computed where there is no GPU."""

from tests.conftest import run


def test_each_saving_saves():
    """The demo's UNet: a wrong row is one whose weights, gradients and moments are not what its name says."""
    lines = run("python", "-m", "benchmarks.memory", "--quick", "--batch_size", 1, "--lora_rank", 4).stdout.splitlines()
    assert lines[0].endswith("computed, not measured")
    names = ["full fine-tuning", "8-bit Adam, gradient checkpointing", "LoRA", "LoRA, gradient checkpointing"]
    assert [line[:36].rstrip() for line in lines[1:]] == names
    full, saving, lora, lora_saving = (float(line.split()[-2]) for line in lines[1:])
    assert full > saving > lora_saving > 0 and full > lora >= lora_saving
