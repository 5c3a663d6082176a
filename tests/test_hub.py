"""A model on the hub, from a server of our own that is laid out like it: what is fetched, from where, and how often."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from diffusers import StableDiffusionInstructPix2PixPipeline
from safetensors.torch import load_file, save_file

from tests.conftest import PROJECT, last_line, train

REPOSITORY, COMMIT = "someone/model", "0123456789abcdef0123456789abcdef01234567"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def repository(tiny_model, tmp_path) -> Path:
    """The tiny model as `timbrooks/instruct-pix2pix` is laid out, with all that is not needed beside what is."""
    folder = shutil.copytree(tiny_model, tmp_path / "repository")
    for weights in sorted(folder.glob("*/*.safetensors")):
        shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
        pickle = "pytorch_model" if weights.stem == "model" else weights.stem
        for name in (f"{pickle}.bin", f"{pickle}.fp16.bin"):
            (weights.parent / name).write_bytes(b"a pickle")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(vae)
    for new, old in OLD_NAMES.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    save_file(tensors, vae, {"format": "pt"})
    for name in ("model-00-22000.ckpt", "model-00-22000.safetensors", "README.md"):
        (folder / name).write_bytes(b"not needed")
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (folder / "safety_checker").mkdir(exist_ok=True)
        (folder / "safety_checker" / name).write_bytes(b"not needed")
    (folder / "feature_extractor").mkdir()
    extractor = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(extractor))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    return folder


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does about one repository; weights are offered through Xet too."""

    folder: Path
    requested: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.requested.append(path)
        names = sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())
        file = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self.answer(json.dumps([self.tree_entry(name) for name in names]).encode())
        elif path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            siblings = [{"rfilename": name} for name in names]
            self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/{REPOSITORY}/resolve/") and file in names:
            content = (self.folder / file).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if file.endswith(".safetensors"):
                headers["X-Xet-Hash"] = "0" * 64
                headers["Link"] = f'<http://{self.headers["Host"]}/xet-token>; rel="xet-auth"'
            self.answer(content, headers)
        elif "/login/" in path:
            self.answer(b"<html>Welcome to this network</html>")
        else:
            refusals = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound")}
            status, code = next((refusals[name] for name in refusals if f"/{name}/" in path), (404, "RepoNotFound"))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def tree_entry(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            entry |= {"lfs": lfs, "xetHash": "0" * 64}
        return entry

    def answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(repository) -> Iterator[tuple[str, list[str]]]:
    """The endpoint of a running server, and the paths it has been asked for."""
    handler = type("Handler", (HubHandler,), {"folder": repository, "requested": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.requested
    server.shutdown()
    server.server_close()


def find_in_new_process(*names: object, **variables: object) -> list[str]:
    """What `find_model` gives for each name, or the error's message: these variables are read on import."""
    code = """
import sys
from data.cli import UserError
from pecn.model import find_model
for name in sys.argv[1:]:
    try:
        print(find_model(name))
    except UserError as error:
        print("error:", error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-c", code, *map(str, names)]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_on_a_mirror_is_fetched_once_and_without_what_is_not_needed(mirror, data_dir, tmp_path):
    endpoint, requested = mirror
    variables = {"HF_HUB_CACHE": tmp_path / "cache", "HF_ENDPOINT": endpoint}
    found, refused, again = find_in_new_process(REPOSITORY, "nobody/nothing", REPOSITORY, **variables)
    assert found == again and refused.startswith("error: there is no directory nobody/nothing, and no such model could")
    fetched = {path.partition(f"/resolve/{COMMIT}/")[2] or path.rpartition("/main/")[2] for path in requested}
    assert {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= fetched
    unneeded = (".bin", ".ckpt", ".fp16.safetensors", "22000.safetensors")
    assert not [name for name in fetched if name.endswith(unneeded) or "safety_checker/" in name]
    assert not [path for path in requested if "xet" in path]  # large files would come from elsewhere
    between = next(place for place, path in enumerate(requested) if "nobody/nothing" in path)
    assert not [path for path in requested[between:] if REPOSITORY in path]  # once it is here

    train(data_dir, found, tmp_path / "trained", "--max_train_steps", 1)
    index = json.loads((tmp_path / "trained" / "model_index.json").read_text())
    assert index["feature_extractor"] == index["safety_checker"] == [None, None]
    assert StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "trained").feature_extractor is None


def test_each_refusal_of_the_hub_has_its_own_advice(mirror, tmp_path):
    names = ("gated/model", "private/model", "no/model", "login/model")
    advice = (
        "accept the model's license",
        "log in with `hf auth login`",
        "check its spelling",
        "answers with a web page",
    )
    variables = {"HF_HUB_CACHE": tmp_path, "HF_ENDPOINT": mirror[0]}
    for name, told, said in zip(names, find_in_new_process(*names, **variables), advice, strict=True):
        assert name in told and said in told and mirror[0] in told and len(told) < 700
    [told] = find_in_new_process("no/model", HF_HUB_CACHE=tmp_path, HF_ENDPOINT="", HF_HUB_OFFLINE=1)
    assert "from the hub" in told


@pytest.fixture
def silent_endpoint() -> Iterator[str]:
    """An endpoint that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers_is_an_error_and_no_loss(tiny_model, silent_endpoint, tmp_path):
    """What is there is found without it. (The process's time limit lets only a wait without end fail.)"""
    folder = tmp_path / "cache" / "models--nobody--fetched"
    snapshot = shutil.copytree(tiny_model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    variables = {"HF_HUB_CACHE": tmp_path / "cache", "HF_ENDPOINT": silent_endpoint}
    found = find_in_new_process("nobody/fetched", tiny_model, "nobody/nothing", **variables)
    assert found[:2] == [str(snapshot), str(tiny_model)] and len(found) == 3
    for part in ("error: ", "nobody/nothing", silent_endpoint, "set HF_ENDPOINT to a mirror", "name a directory"):
        assert part in found[2]


def test_the_hub_token_is_written_nowhere(data_dir, tiny_model, tmp_path):
    """Neither by a run that trains, nor by one whose upload is refused before it (there is no hub here)."""
    token = "hf_secretTokenOfThisTest"
    options = ("--num_validation_images", 1, "--checkpointing_steps", 1, "--max_train_steps", 1, "--hub_token", token)
    done = train(data_dir, tiny_model, tmp_path / "trained", *options)
    refused = train(data_dir, tiny_model, tmp_path / "refused", "--push_to_hub", *options, check=False)
    assert refused.returncode == 1 and last_line(refused.stderr).startswith("error: cannot upload to refused")
    assert not any(token in text for text in (done.stdout, done.stderr, refused.stdout, refused.stderr))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_config.json", "model_index.json"} <= {path.name for path in written}
    assert any(path.name.startswith("events.out.tfevents") for path in written)
    assert not [path for path in written if token.encode() in path.read_bytes()]
