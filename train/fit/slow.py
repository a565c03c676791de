"""What makes a run slow for a reason, said before its first step with the option that helps.

Of kernels that cannot be built `lowbit.kernels` itself says so, and why.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lowbit import bf16, kernels
from train.model.module import PretrainModule

_STAT = Path("/proc/stat")
JOBS = "LOWBIT_JOBS"  #: how many runs a sweep has at a time, this one among them


@dataclass(frozen=True)
class Facts:
    """Of a machine and of a run on it."""

    on_cpu: bool
    in_bf16: bool  #: rather than in FP32
    products: bf16.Products
    has_unit: bool
    kernels_off: bool  #: by choice, where the run quantizes
    threads: int
    processes: int  #: of this kind on this machine: ranks, a sweep's jobs
    cores: int
    busy: float  #: cores that other processes keep busy


def slow_lines(facts: Facts) -> list[str]:
    """One for each cause."""
    lines = []
    if facts.kernels_off:
        lines.append("LOWBIT_KERNELS=off computes formats in plain PyTorch; auto uses the kernels")
    if not facts.on_cpu:
        return [f"slow: {line}" for line in lines]
    match facts.in_bf16, facts.products, facts.has_unit:
        case True, "native", False:
            lines.append(
                "LOWBIT_BF16=native on a CPU without a BF16 unit, where PyTorch's product may take "
                "ten times as long as FP32's; LOWBIT_BF16=auto takes FP32's"
            )
        case True, "fp32", False:
            lines.append(
                "this CPU has no BF16 unit: BF16 matrices are multiplied at FP32's speed (in FP32, "
                "rounded once: LOWBIT_BF16)"
            )
        case True, "fp32", True:
            lines.append("LOWBIT_BF16=fp32 leaves this CPU's BF16 unit idle; auto uses it")
    used = facts.threads * facts.processes
    if 2 * used <= facts.cores:
        lines.append(
            f"{used} of {facts.cores} cores in use; OMP_NUM_THREADS="
            f"{facts.cores // facts.processes} uses all"
        )
    if facts.busy >= 0.5 and used + facts.busy > facts.cores + 0.25:
        free = max(1, int(facts.cores - facts.busy + 0.25) // facts.processes)
        lines.append(
            f"other processes keep {facts.busy:.1f} of {facts.cores} cores busy; end them, or "
            f"leave them room with OMP_NUM_THREADS={free}"
        )
    return [f"slow: {line}" for line in lines]


def facts_of(trainer: Trainer, module: PretrainModule) -> Facts:
    """As they are now; looks at the cores for a third of a second, if no rank of ours is there."""
    device = trainer.strategy.root_device.type
    processes = max(1, trainer.world_size // trainer.num_nodes) * int(os.environ.get(JOBS, "1"))
    return Facts(
        on_cpu=device == "cpu",
        in_bf16="bf16" in str(trainer.precision),
        products=bf16.products(device),
        has_unit=bf16.has_unit(),
        kernels_off=bool(module.quantized_layers) and kernels.mode() == "off",
        threads=torch.get_num_threads(),
        processes=processes,
        cores=len(_own_cores()),
        busy=busy_cores() if device == "cpu" and processes == 1 else 0.0,
    )


def busy_cores(seconds: float = 0.3) -> float:
    """How many of the cores that this process may use others keep busy; 0 where nobody tells."""
    if not _STAT.exists():
        return 0.0
    began, before, own = time.perf_counter(), _busy_seconds(), time.process_time()
    time.sleep(seconds)
    theirs = _busy_seconds() - before - (time.process_time() - own)
    return max(0.0, theirs / (time.perf_counter() - began))


def _busy_seconds() -> float:
    """Of our cores since start-up: all but idle, waiting for disks, and guests a second time."""
    wanted = {f"cpu{number}" for number in _own_cores()}
    rows = (line.split() for line in _STAT.read_text().splitlines())
    ticks = sum(int(x) for row in rows if row[0] in wanted for x in (*row[1:4], *row[6:8]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
