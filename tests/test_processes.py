"""The processes of a run: which precision they compute in, and the signals that stop them."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DDPCommunicationHookType

from pecn.processes import STOP_SIGNALS, Interrupted, StopRequest, create_accelerator


@pytest.mark.parametrize(("bf16_supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_precision_follows_the_gpu(monkeypatch, bf16_supported, expected):
    """Accelerator is replaced by what it was given: there is no GPU here."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16_supported)
    monkeypatch.setattr("pecn.processes.PartialState", lambda **_: None)
    given = {}

    def accelerator(**options: object) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(distributed_type="NO")

    monkeypatch.setattr("pecn.processes.Accelerator", accelerator)
    options = {"mixed_precision": "auto", "gradient_accumulation_steps": 1, "report_to": "none"}
    create_accelerator(SimpleNamespace(**options, output_dir=Path("run")))
    assert given["mixed_precision"] == expected
    [distributed] = given["kwargs_handlers"]
    assert distributed.comm_hook == DDPCommunicationHookType.BF16  # half the bytes between GPUs


@pytest.fixture
def request_to_stop(monkeypatch):
    """A StopRequest whose end of the process is an exception; the handlers of signals are put back."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}  # some ignored in background
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_nothing_is_at_stake_ends_at_once(request_to_stop, number):
    with pytest.raises(Interrupted) as interruption:
        os.kill(os.getpid(), number)
    assert interruption.value.exit_status == 128 + number


def test_the_first_signal_is_noted_and_a_later_one_ends_at_once(request_to_stop, capfd):
    """What comes within AT_ONCE seconds is the first request: a launcher passes it on, with another number too."""
    with request_to_stop.deferred():
        assert request_to_stop.agree() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        request_to_stop.receive(signal.SIGINT, None)
        assert request_to_stop.agree() == signal.SIGTERM
        request_to_stop.received_at -= StopRequest.AT_ONCE + 1
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            request_to_stop.receive(signal.SIGINT, None)
    first, second = capfd.readouterr().err.split("\n\n")
    assert "once more stops without saving" in first and "the last checkpoint remains" in second


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        StopRequest()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, before if number == signal.SIGHUP else signal.default_int_handler)
