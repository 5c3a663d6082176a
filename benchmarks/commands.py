"""The repository's own commands, run by the studies that train and sample many times."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.cli import UserError
from data.files import make_folder

PROJECT = Path(__file__).parents[1]
TRAIN, SAMPLE = PROJECT / "train_instruct_pix2pix.py", PROJECT / "sample_from_pix2pix.py"


def render_clips(data_dir: Path, resolution: int, seed: int, num_train: int, num_val: int) -> Path:
    """Renders clips, takes all that belong to the three tasks, and extracts their frames; returns `data_dir`.

    What is there already stays.
    """
    counts = {"train": num_train, "val": num_val}
    clips = [f"--num_{split}_clips={count}" for split, count in counts.items()]
    entries = [f"--{split}_samples_per_task={count}" for split, count in counts.items()]  # as many as there are
    call(["-m", "demo.make_clips", f"--output_dir={data_dir}", f"--seed={seed}", *clips])
    call(["-m", "data.dataset", f"--data_dir={data_dir}", *entries])
    call(["-m", "data.video_loader", f"--data_dir={data_dir}", f"--resolutions={resolution}"])
    return data_dir


def call(words: Sequence[str | Path], log: Path | None = None) -> None:
    """Runs a Python command of the repository, its output in `log` or on the terminal.

    An interruption is passed on, so that training can save what it has. Raises UserError with the command's own
    last line where it fails.
    """
    command = [sys.executable, *(str(word) for word in words)]
    if log is None:
        if run_child(command, None):
            raise UserError(f"a step of the study failed, see above: {shlex.join(command)}")
        return
    make_folder(log.parent)
    with open(log, "wb") as file:
        status = run_child(command, file)
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        said = [line for line in lines if line.startswith("error:")] or [line for line in lines if line.strip()] or [""]
        raise UserError(
            f"{said[-1].removeprefix('error:').strip() or 'it said nothing'} (exit status {status} of"
            f" {Path(words[0]).name}, all it said is in {log}; the same command goes on from here)"
        )


def run_child(command: Sequence[str], output: Any) -> int:
    # In a session of its own Ctrl-C reaches it once, through us, and we wait until it has saved what it has.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    ) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
