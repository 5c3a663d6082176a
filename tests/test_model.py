"""Models: what is broken, missing or unsafe ends in one line; what earlier versions recorded is still read."""

import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.cli import UserError
from pecn.model import MODEL_PARTS, find_model, load_pipeline, read_training_config
from tests.conftest import STEPS, last_line, make_tiny_pipeline, run, sampling_command, train, unet_file

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model, to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(model: Path) -> str:
    """The one line that loading the model ends in."""
    with pytest.raises(UserError) as error:
        load_pipeline(model)
    message = str(error.value)
    assert message.startswith(f"the model {model} cannot be loaded: ") and "\n" not in message
    return message


class TouchWhenLoaded:
    """Its pickle makes a file in whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.path), "w")


def write_trap(path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": TouchWhenLoaded(trap)}))


@pytest.mark.parametrize("part", [*MODEL_PARTS, "scheduler", "tokenizer"])
def test_a_missing_part_is_refused(model, part):
    """An empty tokenizer would load, and read every prompt as nothing."""
    for file in (model / part).iterdir():
        file.unlink()
    refusal(model)
    (model / part / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    refusal(model)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"unet": ["os", "system"]}'])
def test_a_broken_index_is_one_line(model, content):
    (model / "model_index.json").write_bytes(content)
    refusal(model)


@pytest.mark.parametrize("part", WEIGHTS)
def test_broken_or_missing_weights_are_refused(model, part):
    path = model / part / WEIGHTS[part]
    good = path.read_bytes()
    for content in (b"", good[: len(good) // 2], os.urandom(1000)):
        path.write_bytes(content)
        refusal(model)
    path.write_bytes(good)
    tensors = load_file(path)
    dropped = sorted(tensors)[0]
    del tensors[dropped]
    save_file(tensors, path, {"format": "pt"})
    assert f"1 weights are missing in {part}/" in refusal(model)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_pickle_is_never_loaded(model, tmp_path, part):
    trap = tmp_path / "trap"
    weights = model / part / WEIGHTS[part]
    good = weights.read_bytes()
    write_trap(weights, trap)  # under a safetensors file's name
    refusal(model)
    weights.unlink()
    for name in (f"{weights.stem}.bin", "pytorch_model.bin"):
        write_trap(model / part / name, trap)
    assert f"{part}/ holds no *.safetensors" in refusal(model)
    (model / part / "other.safetensors").write_bytes(good)
    refusal(model)  # the only safetensors file has a name that is not looked for
    index = model / part / f"{weights.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "pytorch_model.bin"}}))
    refusal(model)  # of weights in several files
    index.unlink()
    (model / part / "other.safetensors").rename(weights)
    load_pipeline(model)  # pickles beside whole weights do no harm
    assert not trap.exists()
    pickle.loads((model / part / "pytorch_model.bin").read_bytes())
    assert trap.exists()  # so the trap works


def test_commands_end_in_one_line(data_dir, model, tmp_path):
    trap, output_dir = tmp_path / "trap", tmp_path / "output"
    unet_file(model).unlink()
    write_trap(unet_file(model).with_suffix(".bin"), trap)
    sampled = run("python", *sampling_command(data_dir, model, output_dir), check=False)
    for done in (sampled, train(data_dir, model, output_dir, check=False)):
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert last_line(done.stderr).startswith(f"error: the model {model} cannot be loaded: unet/ holds no *.safet")
    assert not trap.exists() and not list(output_dir.rglob("model*"))
    sampled = run("python", *sampling_command(tmp_path / "nowhere", tmp_path, output_dir), check=False)
    assert f"the model {tmp_path} cannot be loaded: it holds no diffusers pipeline" in sampled.stderr  # not of the data


def test_a_directory_that_is_not_there_is_not_asked_for_at_the_hub(tmp_path):
    with pytest.raises(UserError, match="there is no directory .*/nowhere: name one that holds a model") as error:
        find_model(str(tmp_path / "nowhere"))
    assert "hub" not in str(error.value)


def test_another_kind_of_file_or_folder_is_named_with_what_to_name(trained, model, tmp_path):
    single = tmp_path / "v15.safetensors"
    single.touch()
    with pytest.raises(UserError, match="is a single file; a diffusers folder is needed") as error:
        find_model(str(single))
    [command] = re.findall(r"python -c .*", str(error.value))
    assert shlex.split(command)[2].endswith(f"P.from_single_file('{single}').save_pretrained('{tmp_path}/v15')")
    assert refusal(model / "unet").endswith(f"it is a part of one: name {model}; copy it again, or name another")
    assert "it is a checkpoint: MODEL_DIR samples" in refusal(trained / f"checkpoint-{STEPS}")
    (model / "model_index.json").unlink()
    (model / "pytorch_lora_weights.safetensors").touch()
    assert "it holds LoRA weights" in refusal(model)


def test_other_families_are_named(model, tmp_path):
    index = json.loads((model / "model_index.json").read_text())
    other = index | {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (model / "model_index.json").write_text(json.dumps(other))
    assert "it is a StableDiffusionXLPipeline, with a part text_encoder_2; Stable Diffusion 1 or 2" in refusal(model)
    make_tiny_pipeline(in_channels=9).save_pretrained(tmp_path / "inpainting")
    assert "its UNet has 9 input channels; 4 or 8 are needed" in refusal(tmp_path / "inpainting")


def test_a_folder_of_half_precision_files_loads_in_float32(tmp_path):
    make_tiny_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert {path.name.partition(".")[2] for path in tmp_path.glob("*/*.safetensors")} == {"fp16.safetensors"}
    loaded, made = load_pipeline(tmp_path), make_tiny_pipeline()
    for part in MODEL_PARTS:
        weights = dict(getattr(loaded, part).named_parameters())
        for name, weight in getattr(made, part).named_parameters():
            torch.testing.assert_close(weights[name], weight, rtol=2e-3, atol=1e-6)  # in float32, too


# What training recorded.


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"arguments": 5}', b"\xff\xfe"])
def test_a_broken_training_config_is_named(model, content):
    path = model / "training_config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} is not a training config .*copy the model again"):
        read_training_config(model)


@pytest.mark.parametrize(
    ("recorded", "read"),
    [
        ({"input_frame_idx": 20, "target_frame_idx": 25, "horizon": None}, (20, "5", False)),
        ({"input_frame_idx": "any", "target_frame_idx": 21, "horizon": "1-10"}, ("any", "1-10", True)),
        ({"input_frame_idx": "any", "target_frame_idx": 21, "horizon": "5"}, ("any", "5", False)),
        ({"input_frame_idx": 20, "horizon": "3", "tell_horizon": True}, (20, "3", True)),
    ],
)
def test_frames_that_earlier_versions_recorded_are_read(model, recorded, read):
    """They had a target beside a horizon, which overrode it."""
    old = {"residual": True, "scheduler": "ddim", "progress_source": "oracle", "add_progress": True}
    (model / "training_config.json").write_text(json.dumps({"arguments": recorded | old}))
    arguments = read_training_config(model)
    assert tuple(arguments[name] for name in ("input_frame_idx", "horizon", "tell_horizon")) == read
    assert (arguments["scheduler"], arguments["add_progress"]) == ("euler", True)
    assert read_training_config(model.parent) == {}
