"""The benchmark of the optimizer step, through its command; and that what makes the step fast changes no result."""

import os
import platform
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from benchmarks.freed_memory import keep_freed_memory
from benchmarks.train_step import Measured, check_agreement, format_table
from data.cli import UserError
from pecn.optimization import clip_gradients, create_optimizer
from tests.conftest import run

ROWS = ("plain", "plain, memory kept", "ours", "compiled")


def rows(printed: str) -> dict[str, list[float]]:
    """The numbers of each alternative's line: samples/s, ratio, CPU s, ratio, s/step, its parts, GB."""
    lines = [line for line in printed.splitlines() if line[:20].strip() in ROWS]
    return {line[:20].strip(): [float(number) for number in line[20:].split()] for line in lines}


def test_quick_run_compares_all_steps():
    """Fails where the benchmark's own plain step, or ours, computes anything but the loss they should share."""
    printed = run("python", "-m", "benchmarks.train_step", "--quick", "--batch_sizes", 2).stdout
    table = rows(printed)
    assert list(table) == ["plain", "plain, memory kept", "ours"]
    for samples_per_second, _, _, _, seconds, *parts, memory in table.values():
        assert samples_per_second == pytest.approx(2 / seconds, rel=0.02)
        assert sum(parts) == pytest.approx(seconds, abs=1e-3)
        assert 0.1 < memory < 10
    encoding = [numbers[5] for numbers in table.values()]
    assert encoding[0] > 0 and encoding[1] > 0 and encoding[2] == 0  # ours encodes nothing in a step
    assert re.search(r"the same work: losses \(0\.\d+, 0\.\d+\) differ by (0\.0e\+00|\d\.\de-0[5-9])", printed)
    assert "batch 2 x 1" in printed and "128x128" in printed
    assert re.search(r"a batch of 2 is prepared in \d+\.\d\d ms", printed)


def test_passes_of_a_step_are_counted():
    options = ("--gradient_accumulation_steps", 2, "--batch_sizes", 1, "--resolution", 32, "--mixed_precision", "bf16")
    table = rows(run("python", "-m", "benchmarks.train_step", "--quick", *options).stdout)
    for samples_per_second, _, _, _, seconds, *_ in table.values():
        assert samples_per_second == pytest.approx(2 / seconds, rel=0.02)


def test_each_cause_has_its_share():
    """Ratios are to plain; the shares below are to the row above, and their product is the last ratio."""
    seconds = {"plain": 16.0, "plain_memory_kept": 12.0, "ours": 6.0, "compiled": 8.0}
    results = {name: Measured([value], [2 * value], [{"forward": value}]) for name, value in seconds.items()}
    printed = format_table(results, samples_per_step=4)
    assert [numbers[1] for numbers in rows(printed).values()] == [1, 1.33, 2.67, 2]
    shares = [line.split("  ")[1:] for line in printed.splitlines() if line.startswith("  ") and ": " in line]
    assert [share for share, _ in shares] == ["1.33 (1.33)", "2.00 (2.00)", "0.75 (0.75)"]
    assert shares[0][1] == "plain, memory kept: keeping freed memory"
    # Without the row between them both causes are named.
    both = format_table({name: results[name] for name in ("plain", "ours")}, samples_per_step=4)
    assert "2.67 (2.67)  ours: keeping freed memory; encoding once" in both


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", 100], "error: argument --resolution: must be a multiple of 8, not 100"),
        (["--rounds", 0], "error: argument --rounds: must be at least 1, not 0"),
    ],
)
def test_mistakes_get_one_line(options, message):
    done = run("python", "-m", "benchmarks.train_step", "--quick", *options, check=False)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_freed_memory_can_be_kept_and_given_back():
    """What is freed while it is kept stays resident, and goes back when that ends (glibc; elsewhere neither)."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists() or platform.libc_ver()[0] != "glibc":
        pytest.skip("neither Linux nor glibc")
    size = 400 * 2**20
    keep_freed_memory(True)
    try:
        block = torch.ones(size, dtype=torch.uint8)
        full = resident()
        del block
        assert resident() > full - size / 10
    finally:
        keep_freed_memory(False)
    assert resident() < full - size * 0.9
    block = torch.ones(size, dtype=torch.uint8)
    full = resident()
    del block
    assert resident() < full - size * 0.9


@pytest.mark.parametrize("other", [(1.01, 2.0), (1.0, 2.1), (float("nan"), 2.0)])
def test_different_work_is_refused(other):
    assert "the same work" in check_agreement({"plain": [(1.0, 2.0)], "ours": [(1.0001, 2.0001)]}, "no")
    with pytest.raises(UserError, match="different work"):
        check_agreement({"plain": [(1.0, 2.0)], "ours": [other]}, "no")


# The step itself


@pytest.mark.parametrize("gradient", [0.01, 3.0, 1e6])
def test_clipping_inside_the_optimizer_is_clipping(gradient):
    """Against torch's own clipping and its plain AdamW, for norms below and above the bound."""
    torch.manual_seed(0)
    gradients = [gradient * torch.randn(2, 30, 20) for _ in range(3)]
    ours, theirs = torch.nn.Linear(20, 30, bias=False), torch.nn.Linear(20, 30, bias=False)
    theirs.load_state_dict(ours.state_dict())
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(create_optimizer(ours, 0.1))
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for first, second in gradients:
        ours.weight.grad, theirs.weight.grad = first + second, first + second
        norm = clip_gradients(accelerator, ours, optimizer, max_grad_norm=1.0)
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-5)


def test_an_optimizer_that_cannot_clip_gets_clipped_gradients():
    weights = torch.nn.Linear(20, 30, bias=False)
    weights.weight.grad = torch.full((30, 20), 7.0)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(weights.parameters(), lr=0.1, fused=False))
    norm = clip_gradients(accelerator, weights, optimizer, max_grad_norm=1.0)
    assert norm == pytest.approx(7 * 600**0.5)
    assert weights.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
