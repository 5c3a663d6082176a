"""Switches, within one process, whether the memory that a step frees stays for the next one (Linux with glibc).

The shell script of training decides it once, by MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_; here turns alternate.
Without it glibc returns large blocks to the system at once, and the system zeros fresh ones for the next tensors.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # parameters of glibc's mallopt(3)
LARGEST_THRESHOLD = 32 * 2**20  # bytes: where glibc's own adjustment ends


def keep_freed_memory(keep: bool) -> None:
    """Makes malloc keep what is freed, or give it back as it does by default. Does nothing without glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if keep:
        options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # -1: never
    else:
        options = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: LARGEST_THRESHOLD, M_TRIM_THRESHOLD: 2 * LARGEST_THRESHOLD}
    for option, value in options.items():
        libc.mallopt(option, value)
    libc.malloc_trim(0)  # every turn starts with nothing kept
