"""Whether the memory that a training step frees stays with the process, for the next step, or goes back to the system.

glibc gives large blocks back at once and fetches fresh ones for the next tensors of that size, which the system fills
with zeros page by page. On a CPU that was more than half of a training step (benchmarks/README.md, train_step).
"""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed until the process ends. Does nothing where malloc is not glibc's."""
    _set_malloc_options({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def return_freed_memory() -> None:
    """The opposite: gives back what is free, and uses the thresholds that glibc's own adjustment ends up with."""
    largest_threshold = 32 * 2**20
    _set_malloc_options(
        {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: largest_threshold, M_TRIM_THRESHOLD: 2 * largest_threshold}
    )
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc_options(options: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    for option, value in options.items() if hasattr(libc, "mallopt") else ():
        libc.mallopt(option, value)
