"""Faults of models and of the hub: what is broken, missing, unsafe or out of reach ends in one line, and in time."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from data.cli import UserError
from data.paths import filtered_annotations_path, frames_dir
from pecn.model import PARTS, find_model, load_pipeline, read_training_config
from tests.conftest import PROJECT, SIDE, run

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
TOKEN = "hf_secretTokenOfThisTest"


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


# Models.


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(model, part):
    for file in (model / part).iterdir():
        file.unlink()
    assert f"{part}/ holds no" in refusal(model)  # an empty tokenizer would load, and read every prompt as nothing


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"unet": ["os", "system"]}']
)
def test_a_broken_index_is_one_line(model, content):
    (model / "model_index.json").write_bytes(content)
    refusal(model)


def test_an_empty_tokenizer_is_refused(model):
    for file in (model / "tokenizer").iterdir():
        file.unlink()
    (model / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert "tokenizer" in refusal(model)


@pytest.mark.parametrize("part", WEIGHTS)
def test_broken_or_missing_weights_are_named(model, part):
    path = model / part / WEIGHTS[part]
    good = path.read_bytes()
    for content in (b"", good[:100], good[: len(good) // 2], b"\0" * len(good), os.urandom(1000)):
        path.write_bytes(content)
        assert f"{part}/: " in refusal(model)
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
    assert f"{part}/ holds no *.safetensors, only pickles" in refusal(model)
    (model / part / "other.safetensors").write_bytes(good)
    refusal(model)  # the only safetensors file has a name that is not looked for
    index = model / part / f"{weights.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "pytorch_model.bin"}}))
    assert "names pytorch_model.bin, which is no safetensors file" in refusal(model)
    index.unlink()
    (model / part / "other.safetensors").rename(weights)
    load_pipeline(model)  # pickles beside whole weights do no harm
    assert not trap.exists()
    pickle.loads((model / part / "pytorch_model.bin").read_bytes())
    assert trap.exists()  # so the trap works


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 5}, "its UNet has 5 input channels, "),
        ({"out_channels": 8}, " 8 output channels "),
        ({"cross_attention_dim": 24}, " 24 wide, where 8 (or 4, for training), 4 and 16 are needed"),
    ],
)
def test_a_unet_that_does_not_fit_is_named(model, changes, message):
    from diffusers import UNet2DConditionModel

    config = json.loads((model / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(model / "unet")
    assert message in refusal(model)
    (model / "unet" / "config.json").write_text(json.dumps(config))  # weights of another shape than it says
    assert "unet/: " in refusal(model)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"arguments": 5}', b'{"arguments": {"resolution": "96"}}', b"\xff\xfe"]
)
def test_a_broken_training_config_is_named(model, content):
    path = model / "training_config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} is not a training config .*copy the model again"):
        read_training_config(model)


def sampling_command(data_dir: Path, model: object, output_dir: Path) -> list[str]:
    command = [sys.executable, "sample_from_pix2pix.py", "--model_dir", model, "--output_dir", output_dir]
    command += ["--frames_dir", frames_dir(data_dir, SIDE), "--num_samples", 1, "--num_inference_steps", 1]
    return [str(word) for word in [*command, "--val_annotations", filtered_annotations_path(data_dir, "val")]]


def training_command(data_dir: Path, model: object, output_dir: Path) -> list[str]:
    command = [sys.executable, "train_instruct_pix2pix.py", "--pretrained_model_name_or_path", model]
    command += ["--train_data_dir", data_dir, "--resolution", SIDE, "--output_dir", output_dir]
    return [str(word) for word in [*command, "--max_train_steps", 1, "--num_validation_images", 0]]


@pytest.mark.parametrize("command", [sampling_command, training_command])
def test_commands_end_in_one_line(command, data_dir, model, tmp_path):
    trap = tmp_path / "trap"
    weights = model / "unet" / WEIGHTS["unet"]
    weights.unlink()
    write_trap(weights.with_suffix(".bin"), trap)
    done = run("python", *command(data_dir, model, tmp_path / "output")[1:], check=False)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: the model {model} cannot be loaded: unet/ holds no *.safetensors, only pickles")
    assert "Traceback" not in done.stderr
    assert not trap.exists() and not list((tmp_path / "output").rglob("model*"))


@pytest.mark.parametrize(
    ("missing", "nearest"),
    [("outputs/small_69", "outputs/small_96"), ("output/large", "outputs/large"), ("outputs/xyz", "outputs")],
)
def test_a_misspelled_directory_is_named_with_the_nearest(missing, nearest, tmp_path):
    for name in ("large", "small_96"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
    (tmp_path / "outputs" / "small_69.txt").touch()
    with pytest.raises(UserError) as refusal:
        find_model(str(tmp_path / missing))
    wanted = f"there is no directory {tmp_path / missing} (the nearest is {tmp_path / nearest})"
    assert str(refusal.value).startswith(wanted) and "hub" not in str(refusal.value)


# The hub.


@pytest.fixture
def silent_endpoint():
    """An endpoint that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def cache_model(model: Path, cache: Path, name: str) -> None:
    """Puts a model into the hub's cache, as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)


def test_an_unreachable_hub_is_an_error_in_time_and_no_loss(data_dir, tiny_model, silent_endpoint, tmp_path):
    """Within 30 s on a machine that is not busy; the limit here lets only a run fail that would wait without end.

    All commands run at once, as most of their time goes to waiting.
    """
    refused_endpoint = "http://127.0.0.1:9"
    cache_model(tiny_model, tmp_path / "cache", "nobody/fetched")
    cases = {
        "sampling, refused": (sampling_command, "nobody/nothing", refused_endpoint),
        "sampling, silent": (sampling_command, "nobody/nothing", silent_endpoint),
        "training, silent": (training_command, "nobody/nothing", silent_endpoint),
        "fetched before": (sampling_command, "nobody/fetched", silent_endpoint),
        "directory": (sampling_command, tiny_model, silent_endpoint),
    }
    running = {}
    for number, (case, (command, model, endpoint)) in enumerate(cases.items()):
        variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        variables |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
        running[case] = subprocess.Popen(
            command(data_dir, model, tmp_path / str(number)),
            cwd=PROJECT,
            env=variables | {"OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        outputs = {case: process.communicate(timeout=240) for case, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    for case, (_, _, endpoint) in cases.items():
        errors = outputs[case][1]
        assert "Traceback" not in errors
        if case in ("fetched before", "directory"):
            assert running[case].returncode == 0, errors
            continue
        assert running[case].returncode == 1, errors
        line = errors.splitlines()[-1]
        for part in ("error: ", "nobody/nothing", endpoint, "HF_ENDPOINT", "directory"):
            assert part in line


def test_the_hub_token_is_written_nowhere(data_dir, tiny_model, tmp_path):
    """Neither by a run that trains, nor by one whose upload fails; through the script, which keeps train.log."""
    variables = {"PRETRAINED_MODEL": tiny_model, "DATA_DIR": data_dir, "RESOLUTION": SIDE, "MAX_TRAIN_STEPS": 1}
    variables |= {"NUM_VALIDATION_IMAGES": 0, "CHECKPOINTING_STEPS": 1, "HF_HUB_CACHE": tmp_path / "cache"}
    options = {"trained": f"--hub_token {TOKEN}", "refused": f"--push_to_hub --hub_token={TOKEN}"}

    def run_script(name: str) -> subprocess.CompletedProcess:
        own = {"OUTPUT_DIR": tmp_path / name, "EXTRA_ARGS": options[name]}
        return run("bash", "train_instruct_pix2pix.sh", check=False, **variables, **own)

    with ThreadPoolExecutor() as threads:  # side by side, as each is mostly start-up
        outputs = dict(zip(options, threads.map(run_script, options)))
    assert outputs["trained"].returncode == 0, outputs["trained"].stdout[-2000:]
    assert outputs["refused"].returncode != 0 and "cannot upload to refused" in outputs["refused"].stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"train.log", "training_config.json", "model_index.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not any(TOKEN in done.stdout + done.stderr for done in outputs.values())
