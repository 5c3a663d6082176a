"""Checkpoints as folders: which are kept and which are found. (Saving and resuming: test_training*.py.) The upload."""

import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from data.cli import UserError
from pecn import checkpoints
from pecn.checkpoints import (
    checkpoint_steps,
    create_hub_repository,
    find_checkpoint,
    save_checkpoint,
    save_model_card,
    upload,
)
from tests.conftest import PROJECT

parse_args = runpy.run_path(str(PROJECT / "train_instruct_pix2pix.py"))["parse_args"]


class FilesOnly:
    """In an Accelerator's place: its state is one file."""

    is_main_process = True

    def wait_for_everyone(self) -> None:
        pass

    def save_state(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "state").write_bytes(b"state")


def test_the_newest_checkpoints_are_kept_and_the_latest_is_found(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    for step in (9, 10, 100):
        save_checkpoint(FilesOnly(), tmp_path, step, {}, total_limit=2)
    assert checkpoint_steps(tmp_path) == [10, 100]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10")) == tmp_path / "checkpoint-10"
    (tmp_path / ".checkpoint-200.partial").mkdir()  # of a run that was killed
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"


def test_a_run_never_mixes_with_an_earlier_one(tmp_path):
    """Nor does one that goes on from a checkpoint elsewhere."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    checkpoint = save_checkpoint(FilesOnly(), tmp_path / "one", 10, {})
    assert find_checkpoint(tmp_path / "other", str(checkpoint)) == checkpoint
    (tmp_path / "other" / "checkpoint-5").mkdir()
    for asked in (str(checkpoint), None):
        with pytest.raises(UserError, match=r"other has checkpoints of an earlier run \(checkpoint-5\)"):
            find_checkpoint(tmp_path / "other", asked)
    (tmp_path / "model_index.json").touch()
    for asked in (str(checkpoint), None, "latest"):
        with pytest.raises(UserError, match="holds a model, which training would overwrite"):
            find_checkpoint(tmp_path, asked)


def test_the_upload_is_private_and_never_names_the_token(monkeypatch, tmp_path):
    """Of the output directory's content the pipeline and its training config go up, no frames and no checkpoints."""
    calls = []

    class Hub:
        def __init__(self, token: str) -> None:
            assert token == "hf_secret"

        def create_repo(self, name: str, private: bool, exist_ok: bool):
            if name == "taken/name":
                raise OSError("403 Forbidden")
            calls.append(("create", name, private, exist_ok))
            return type("Repository", (), {"repo_id": f"user/{name}"})

        def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str) -> None:
            calls.append(("file", path_or_fileobj.name, path_in_repo, repo_id))

    class Loaded:
        def push_to_hub(self, repository: str, token: str) -> None:
            if repository == "user/full":
                raise OSError("the connection broke")
            calls.append(("pipeline", repository, token))

    monkeypatch.setattr(checkpoints, "HfApi", Hub)
    monkeypatch.setattr(checkpoints.model, "load_pipeline", lambda folder: Loaded())
    upload(tmp_path / "run", create_hub_repository("run", "hf_secret", True), "hf_secret")
    assert calls == [
        ("create", "run", True, True),
        ("pipeline", "user/run", "hf_secret"),
        ("file", "training_config.json", "training_config.json", "user/run"),
        ("file", "README.md", "README.md", "user/run"),
    ]
    with pytest.raises(UserError, match="pipeline is in .*run, but its upload failed: the connection broke"):
        upload(tmp_path / "run", "user/full", "hf_secret")
    with pytest.raises(UserError, match="cannot upload to taken/name: 403 Forbidden") as refusal:
        create_hub_repository("taken/name", "hf_secret", True)
    assert "hf_secret" not in str(refusal.value)
    create_hub_repository("shown", "hf_secret", parse_args(["--hub_private", "False"]).hub_private)
    assert calls[-1] == ("create", "shown", False, True) and parse_args([]).hub_private


def test_the_card_names_the_base_model_of_the_hub(tmp_path):
    arguments = checkpoints.training_config(parse_args(["--output_dir", "run", "--horizon", "1-5"]))["arguments"]
    save_model_card(tmp_path, arguments, "Held-out loss 0.1.")
    metadata = ModelCard.load(tmp_path / "README.md").data
    assert metadata.base_model == "timbrooks/instruct-pix2pix" and metadata.library_name == "diffusers"
    assert "pushing a cup from left to right. The frame is 5 frames later.'" in (tmp_path / "README.md").read_text()
