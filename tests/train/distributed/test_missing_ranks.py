"""Ranks meet soon, or a line says who is missing."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from train.distributed.rendezvous import meet
from train.model.initial import InitialWeights


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("here", "world_size", "missing"),
    [
        ([0], 2, "rank 1 did not come"),
        ([1], 2, "rank 0 did not come"),
        ([0, 2], 3, "rank 1 did not come"),
        ([0], 3, "ranks 1, 2 did not come"),
    ],
)
def test_who_is_missing_is_named(here: list[int], world_size: int, missing: str) -> None:
    place = port()
    with ThreadPoolExecutor(len(here)) as pool:
        met = [pool.submit(meet, "127.0.0.1", place, rank, world_size, 2) for rank in here]
    said = [str(one.exception()) for one in met]
    assert all(isinstance(one.exception(), ConnectionError) for one in met)
    assert any(missing in line for line in said)  # rank 0, which holds the store, may end first


def test_all_who_come_meet() -> None:
    place = port()
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: meet("127.0.0.1", place, rank, 3, 20), range(3)))
        stores[0].set("a", "b")
        assert stores[2].get("a") == b"b"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("rank 1 did not come"),
        OSError("no room for weights"),
        ValueError("no such weights"),
    ],
)
def test_what_fails_before_there_are_weights_is_said(
    error: Exception,
    fit: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning's teardown moves the module, whose weights are on the meta device still."""

    def draw(self: InitialWeights, *, hashed: bool = True) -> None:
        raise error

    monkeypatch.setattr(InitialWeights, "draw", draw)
    assert fit(tmp_path / "run", "bf16") == 2
    assert capsys.readouterr().err.endswith(f"lowbit: error: {error}\n")
