"""The benchmark of the optimiser step, through its command; and that what makes the step fast changes no result."""

import argparse
import re

import pytest
import torch
from accelerate import Accelerator

from benchmarks.train_step import Stopwatch, check_agreement
from data.layout import UserError
from pecn.optimization import clip_gradients, create_optimizer
from tests.conftest import run
from train_instruct_pix2pix import parse_args


def rows(printed: str) -> dict[str, list[float]]:
    """The numbers of each alternative's line: samples/s, ratio, CPU s, ratio, s/step, its parts, GB."""
    lines = [line for line in printed.splitlines() if line.startswith("(") and "take" not in line]
    return {line[:26].strip(): [float(number) for number in line[26:].split()] for line in lines}


def test_quick_run_compares_both_steps():
    """Fails where the benchmark's own plain step, or ours, computes anything but the loss they should share."""
    printed = run("python", "-m", "benchmarks.train_step", "--quick", "--batch_sizes", 2).stdout
    table = rows(printed)
    assert list(table) == ["(a) as diffusers' example", "(b) ours"]
    for samples_per_second, _, _, _, seconds, *parts, memory in table.values():
        assert samples_per_second == pytest.approx(2 / seconds, rel=0.02)
        assert sum(parts) == pytest.approx(seconds, abs=1e-3)
        assert 0.1 < memory < 10
    assert table["(a) as diffusers' example"][5] > 0 and table["(b) ours"][5] == 0  # ours encodes nothing in a step
    assert re.search(r"the same work: losses \(0\.\d+, 0\.\d+\) differ by (0\.0e\+00|\d\.\de-0[5-9])", printed)
    assert "batch 2 x 1" in printed and "128x128" in printed


def test_passes_of_a_step_are_counted():
    options = ("--gradient_accumulation_steps", 2, "--batch_sizes", 1, "--resolution", 32, "--mixed_precision", "bf16")
    table = rows(run("python", "-m", "benchmarks.train_step", "--quick", *options).stdout)
    for samples_per_second, _, _, _, seconds, *_ in table.values():
        assert samples_per_second == pytest.approx(2 / seconds, rel=0.02)


def test_mistakes_get_one_line():
    done = run("python", "-m", "benchmarks.train_step", "--quick", "--resolution", 100, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: --resolution must be a multiple of 8, not 100"


@pytest.mark.parametrize("other", [(1.01, 2.0), (1.0, 2.1), (float("nan"), 2.0)])
def test_different_work_is_refused(other):
    assert "the same work" in check_agreement({"plain": [(1.0, 2.0)], "ours": [(1.0001, 2.0001)]}, "no")
    with pytest.raises(UserError, match="different work"):
        check_agreement({"plain": [(1.0, 2.0)], "ours": [other]}, "no")


def test_stopwatch_leaves_functions_as_they_were():
    owner = argparse.Namespace(double=lambda number: 2 * number)
    function = owner.double
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch.watching((owner, "double", "part")):
        assert owner.double(2) == 4
    assert owner.double is function
    assert list(stopwatch.seconds) == ["part"]


# The step itself


@pytest.mark.parametrize("gradient", [0.01, 3.0, 1e6])
def test_clipping_inside_the_optimiser_is_clipping(gradient):
    """Against torch's own clipping and its plain AdamW, for norms below and above the bound."""
    torch.manual_seed(0)
    gradients = [gradient * torch.randn(2, 30, 20) for _ in range(3)]
    args = parse_args(["--learning_rate", "0.1"])
    ours, theirs = torch.nn.Linear(20, 30, bias=False), torch.nn.Linear(20, 30, bias=False)
    theirs.load_state_dict(ours.state_dict())
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(create_optimizer(ours, args, args.learning_rate))
    reference = torch.optim.AdamW(theirs.parameters(), lr=args.learning_rate)
    for first, second in gradients:
        ours.weight.grad, theirs.weight.grad = first + second, first + second
        norm = clip_gradients(accelerator, ours, optimizer, max_norm=1.0)
        assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-5)


def test_an_optimiser_that_cannot_clip_gets_clipped_gradients():
    weights = torch.nn.Linear(20, 30, bias=False)
    weights.weight.grad = torch.full((30, 20), 7.0)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(weights.parameters(), lr=0.1, fused=False))
    norm = clip_gradients(accelerator, weights, optimizer, max_norm=1.0)
    assert norm == pytest.approx(7 * 600**0.5)
    assert weights.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
