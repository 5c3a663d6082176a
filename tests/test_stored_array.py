"""Large arrays in files: written once, gone on with after an interruption, by one process at a time."""

import threading

import numpy as np
import pytest

from data.stored_array import stored_array

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def blocks(first, size=4):
    return [ROWS[start : start + size] for start in range(first, len(ROWS), size)]


@pytest.mark.parametrize("cut", [0, 1, 5])  # bytes of a row that was not written to its end
def test_an_interrupted_run_is_gone_on_with(tmp_path, cut):
    path, asked = tmp_path / "rows.npy", []

    def interrupted(first):
        yield from blocks(first)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored_array(path, np.float32, ROWS.shape, interrupted)
    assert not path.exists()
    [unfinished] = tmp_path.iterdir()
    unfinished.write_bytes(unfinished.read_bytes() + b"x" * cut)

    def rest(first):
        asked.append(first)
        return blocks(first)

    array = stored_array(path, np.float32, ROWS.shape, rest)
    assert asked == [8] and np.array_equal(array, ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]
    assert np.array_equal(stored_array(path, np.float32, ROWS.shape, lambda _: pytest.fail("written again")), ROWS)


def test_of_two_that_write_one_waits(tmp_path):
    path, writing, go_on, found = tmp_path / "rows.npy", threading.Event(), threading.Event(), []

    def slow(first):
        writing.set()
        go_on.wait(60)
        return blocks(first)

    first = threading.Thread(target=stored_array, args=(path, np.float32, ROWS.shape, slow))
    first.start()
    writing.wait(60)
    second = threading.Thread(
        target=lambda: found.append(stored_array(path, np.float32, ROWS.shape, lambda _: pytest.fail("written twice")))
    )
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert np.array_equal(found[0], ROWS)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.npy"]
