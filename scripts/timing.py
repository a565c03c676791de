"""What the kernels' benchmarks share: a clock that waits for the device, and the machine's line."""

import os
import platform
import subprocess
import time
from collections.abc import Callable

import torch

from lowbit import bf16


def seconds(
    call: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Of one call, until `device` has done what it asks for."""
    _wait(device)
    began = clock()
    call()
    _wait(device)
    return clock() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def machine(device: torch.device) -> str:
    """What the figures hold for."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"LOWBIT_KERNELS={os.environ.get('LOWBIT_KERNELS', 'auto')}, "
        f"kernels for {os.environ.get('LOWBIT_MARCH', 'native')}, ATen "
        f"{torch.backends.cpu.get_cpu_capability()}, BF16 products {bf16.products(device.type)}, "
        f"commit {git.stdout.strip() or 'unknown'}, load {os.getloadavg()[0]:.1f} at the start"
    )


def _processor() -> str:
    found = torch.cpu.get_capabilities()
    flags = [
        flag
        for flag in ("avx2", "avx_vnni", "avx512_bf16", "avx512_vnni", "amx_int8")
        if found.get(flag)
    ]
    return " ".join([str(found.get("cpu_name", platform.machine())), *flags])
