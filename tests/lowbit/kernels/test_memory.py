"""What malloc does with freed memory, told by the page faults of a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.kernels.cpu import memory

COUNT = """
import ctypes, resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
if sys.argv[2] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
faults = []
for _ in range(2):
    block = libc.malloc(1 << 26)
    ctypes.memset(block, 1, 1 << 26)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[1] - faults[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    arguments = [sys.executable, "-c", COUNT, str(Path(memory.__file__))]
    new, kept = (
        int(subprocess.run([*arguments, mode], capture_output=True, check=True, text=True).stdout)
        for mode in ("new", "kept")
    )
    assert kept < 10 < new  # 64 MiB are 16384 pages, or 32 huge ones
