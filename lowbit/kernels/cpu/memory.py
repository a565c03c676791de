"""Memory that tensors leave is kept for the next ones."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep large freed blocks; for training on CPUs, whose steps are all alike.

    glibc maps each large tensor anew and gives it back when it is freed, and the system zeroes
    every page it hands out: filling a fresh tensor takes two to three times a copy into memory that
    is there. The process then holds on to the most that it ever used. Elsewhere nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
