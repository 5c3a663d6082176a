"""Which way imports run between the folders, and that the scripts' --help loads no large library."""

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
NOT_IN_DATA = {"torch", "diffusers", "transformers", "accelerate"}
LARGE = NOT_IN_DATA | {"datasets", "cv2", "av", "matplotlib", "scipy", "pandas", "skimage"}


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


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_help_is_shown_before_any_large_library_is_loaded(script):
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", "--help"]
try:
    runpy.run_path("{script}.py", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print("loaded:", *sorted({LARGE} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "options" in done.stdout and done.stdout.splitlines()[-1] == "loaded:"
