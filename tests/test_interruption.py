"""Signals as requests to stop: which of them ends a process at once."""

import pytest

from tests.conftest import run


@pytest.mark.parametrize(
    ("signals", "status"), [("INT TERM", 130), ("INT INT", 130), ("TERM TERM HUP", 0), ("HUP INT", 0), ("INT HUP", 0)]
)
def test_which_second_signal_ends_at_once(signals, status):
    """Torch's launcher passes the first Ctrl-C on as SIGINT, the second as SIGTERM."""
    code = f"""
import os, signal
from pecn.interruption import StopRequest
request = StopRequest()
with request.deferred():
    for name in {signals.split()}:
        os.kill(os.getpid(), signal.Signals["SIG" + name])
"""
    done = run("python", "-c", code, check=False)
    assert done.returncode == status
    assert ("stopped without saving" in done.stderr) == (status == 130)
