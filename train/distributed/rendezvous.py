"""How ranks come together: soon, or with a line that says who is missing.

Without it a rank that died before the process group was there would keep the others waiting for as
long as a collective may take, which is made for slow saves and not for the dead.
"""

import atexit
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from train.distributed.ranks import launcher_listens

PATIENCE = 40  # seconds
ATTEMPT, PAUSE = 5, 0.2  # seconds


def set_patience(strategy: Any, seconds: Mapping[str, Any]) -> None:
    """`collective_timeout`, and `rendezvous_timeout` where no launcher ends ranks that wait."""
    strategy._timeout = timedelta(seconds=seconds["collective_timeout"])
    if not launcher_listens():
        meet_within(strategy, seconds["rendezvous_timeout"], strategy._timeout)


def meet_within(strategy: Any, patience: float, timeout: timedelta) -> None:
    """Have the strategy's ranks meet within `patience` seconds; collectives have `timeout`."""
    original = strategy._get_process_group_backend  # asked for just before the group is made

    def backend_of_all() -> str:
        backend: str = original()
        if not dist.is_initialized():
            place = strategy.cluster_environment
            where = (place.main_address, place.main_port)
            store = meet(*where, strategy.global_rank, strategy.world_size, patience)
            device = strategy.root_device if strategy.root_device.type != "cpu" else None
            ranks = {"rank": strategy.global_rank, "world_size": strategy.world_size}
            dist.init_process_group(
                backend, store=store, timeout=timedelta(seconds=patience), device_id=device, **ranks
            )
            _set_pg_timeout(timeout)
            if backend == "nccl":
                atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        return backend

    strategy._get_process_group_backend = backend_of_all


def meet(host: str, port: int, rank: int, world_size: int, patience: float) -> Store:
    """A store that all ranks have come to; ConnectionError names those that have not in time."""
    deadline = time.monotonic() + patience
    try:
        store = _store(host, port, rank, world_size, deadline)
    except (dist.DistError, OSError) as error:
        raise _missing([0], patience, host, port, error) from None
    store.set_timeout(timedelta(seconds=patience))
    try:
        store.set(f"rank-{rank}", "here")
        for other in range(world_size):
            left = max(deadline - time.monotonic(), 0.001)
            store.wait([f"rank-{other}"], timedelta(seconds=left))
    except dist.DistNetworkError as error:  # the store is in rank 0
        raise _missing([0], patience, host, port, error) from None
    except dist.DistStoreError as error:
        absent = [other for other in range(world_size) if not store.check([f"rank-{other}"])]
        raise _missing(absent, patience, host, port, error) from None
    return PrefixStore("lowbit", store)


def _store(host: str, port: int, rank: int, world_size: int, deadline: float) -> TCPStore:
    """Rank 0's. TCPStore waits for it up to twice as long as it is told, and writes a page of C++
    frames every second: so it is asked when someone listens, and for a few seconds.
    """
    while True:
        try:
            if rank:
                socket.create_connection((host, port), timeout=ATTEMPT).close()
            left = timedelta(seconds=min(ATTEMPT, max(deadline - time.monotonic(), 1)))
            return TCPStore(host, port, world_size, rank == 0, left, wait_for_workers=False)
        except (dist.DistError, OSError):
            if rank == 0 or time.monotonic() + PAUSE > deadline:
                raise
            time.sleep(PAUSE)


def _missing(
    ranks: list[int], patience: float, host: str, port: int, error: Exception
) -> ConnectionError:
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return ConnectionError(
        f"{who} did not come to {host}:{port} within {patience:g} s, or ended there; what it wrote "
        "last says why. --rendezvous_timeout gives ranks that start slowly more time"
    )
