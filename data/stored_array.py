"""A large array in a file, which is read as it is used; a run that is stopped while it writes goes on from there."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data.cli import UserError

UNFINISHED_SUFFIX = ".unfinished"  # `.<name>.unfinished`: the first rows, to go on from


def stored_array(
    path: Path, dtype: type, shape: tuple[int, ...], rows_from: Callable[[int], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array in an .npy file, read as it is used. Where it is missing, it is written first.

    `rows_from(done)` yields blocks of rows, from row `done` on: what an earlier run has left is not made again. Of two
    processes that write the same file one waits for the other.
    """
    if path.is_file():
        return np.load(path, mmap_mode="r")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{UNFINISHED_SUFFIX}")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    with open(unfinished, "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not path.is_file():
            row_size, size = np.dtype(dtype).itemsize * int(np.prod(shape[1:])), os.fstat(file.fileno()).st_size
            done = max(0, size - header.tell()) // row_size
            file.truncate(header.tell() + done * row_size if done else 0)
            if not done:
                file.write(header.getvalue())
            for block in rows_from(done):
                file.write(np.ascontiguousarray(block, dtype))
            file.flush()
            os.fsync(file.fileno())
            if os.fstat(file.fileno()).st_size != header.tell() + shape[0] * row_size:  # locks did not hold
                raise UserError(f"two processes have written {unfinished}; delete it, and run one after the other")
            os.replace(unfinished, path)
    unfinished.unlink(missing_ok=True)  # of the one that waited
    return np.load(path, mmap_mode="r")
