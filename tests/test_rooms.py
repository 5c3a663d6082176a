"""The rooms of the house: which way imports run, and that no command loads a library before it has read its options."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

SCRIPTS = {"train_instruct_pix2pix", "sample_from_pix2pix"}
ROOMS = {"data", "pecn", "demo", "benchmarks", "tests"} | SCRIPTS
MAY_USE = {
    "data": {"data"},
    "pecn": {"data", "pecn"},
    "demo": {"data", "pecn", "demo"},
    "benchmarks": {"data", "pecn", "demo", "benchmarks"},
    "tests": ROOMS - SCRIPTS,
    **dict.fromkeys(SCRIPTS, {"data", "pecn"}),
}
LARGE = {"torch", "diffusers", "transformers", "datasets", "cv2", "av", "numpy", "tqdm", "matplotlib", "scipy"}
NOT_IN_DATA = {"torch", "diffusers", "transformers", "accelerate"}
COMMANDS = ["data.dataset", "data.own_videos", "data.video_loader", "data.sthv2_dataset_hf", "demo.make_clips"]
COMMANDS += ["demo.make_model", "demo.contact_sheet", "pecn.progress"]
COMMANDS += ["benchmarks.train_step", "benchmarks.memory", "benchmarks.sampling", "benchmarks.sampling_options"]
COMMANDS += ["benchmarks.extract_frames", "benchmarks.horizon_study", "benchmarks.progress_study"]
COMMANDS += ["benchmarks.score_folder"]
COMMANDS += ["train_instruct_pix2pix.py", "sample_from_pix2pix.py"]


def imported(path: Path) -> set[str]:
    """The dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_from_scripts_to_pecn_to_data(room):
    files = [*PROJECT.glob(f"{room}.py"), *PROJECT.glob(f"{room}/**/*.py")]
    assert files
    for path in files:
        used = {name.partition(".")[0] for name in imported(path)}
        assert used & ROOMS <= MAY_USE[room], path
        assert room != "data" or not used & NOT_IN_DATA, path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_before_any_large_library_is_loaded(command):
    run = "run_path" if command.endswith(".py") else "run_module"
    code = f"""
import runpy, sys
sys.argv = ["command", "--help"]
try:
    runpy.{run}({command!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print("loaded:", *sorted({LARGE} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "options" in done.stdout and done.stdout.splitlines()[-1] == "loaded:"
