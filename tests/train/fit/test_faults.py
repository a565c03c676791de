"""The faults that need a run or a second process; docs/durability.md has the whole matrix."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from train.checkpoints.folder import complete_checkpoints, find_resume_point
from train.runs.record import run_status

Fit = Callable[..., int]
EVERY = ("--trainer.accumulate_grad_batches", "2", "--checkpoint_every", "1")


# --- disk -------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """In the saves with these numbers no file can grow beyond 100 kB, as on a full disk."""
    from train.checkpoints.folder import AtomicCheckpointIO

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = AtomicCheckpointIO.save_checkpoint
    saves = 0

    def install(*numbers: int) -> None:
        def save(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal saves
            saves += 1
            limit = 100_000 if saves in numbers else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            try:
                original(self, *args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)

    yield install
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_stop(
    fit: Fit,
    tmp_path: Path,
    full_disk: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_run: Callable[..., None],
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(whole, "mxint8", *EVERY) == 0
    with monkeypatch.context():
        full_disk(3)
        assert fit(run, "mxint8", *EVERY) == 2
    error = capsys.readouterr().err
    assert "File too large" in error and "newest complete one is step-00000002" in error
    names = [p.name for p in (run / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000001", "step-00000002"]
    assert find_resume_point(run / "checkpoints") == run / "checkpoints" / "step-00000002"
    assert run_status(run) == "failed"
    assert fit(run, "mxint8", *EVERY) == 0
    assert_same_run(run, whole)


def test_disk_full_continue(
    fit: Fit, tmp_path: Path, full_disk: Callable[..., None], assert_same_run: Callable[..., None]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(whole, "mxint8", *EVERY, "--keep_checkpoints", "9") == 0
    full_disk(3, 4)
    assert fit(run, "mxint8", *EVERY, "--keep_checkpoints", "9", "--disk_full", "continue") == 0
    steps = [int(p.name[5:]) for p in complete_checkpoints(run / "checkpoints")]
    assert steps == [1, 2, 5, 6]
    assert_same_run(run, whole)


def test_missing_shard(
    fit: Fit, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "tokens"
    shutil.copytree(tiny_data, copy)
    shard = next(copy.glob("train-*.npy"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for act in (lambda: None, shard.unlink):
        act()
        assert fit(tmp_path / "run", "bf16", "--data.path", str(copy)) == 2
        assert shard.name in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# --- two jobs ---------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from train.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_two_jobs_on_one_run_dir(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second refuses and names the first; once the first is killed, nothing is in the way."""
    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-P", "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert fit(run, "bf16") == 2
        assert f"process {first.pid}" in capsys.readouterr().err
        assert [p.name for p in run.iterdir()] == ["lock"]
        first.kill()
    assert fit(run, "bf16", "--trainer.max_steps", "1") == 0


# --- two ranks --------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_one_rank_only(
    ranks: tuple[Path, Any], assert_same_run: Callable[..., None]
) -> None:
    """Rank 1 alone is told: both finish the step; resumed, the run equals the uninterrupted."""
    folder, results = ranks
    assert results["whole"]["codes"] == [0, 0]
    assert results["sigterm rank 1"]["codes"] == [143, 0]
    assert results["sigterm rank 1"]["newest"] == "step-00000003"
    assert results["resumed on 2"]["codes"] == [0, 0]
    assert_same_run(folder / "two", folder / "whole")


@pytest.mark.slow
def test_full_to_sharded_to_full(
    ranks: tuple[Path, Any], assert_same_run: Callable[..., None]
) -> None:
    """DDP to step 3, FSDP2 to step 5, then either: the bits of the uninterrupted DDP run."""
    folder, results = ranks
    stopped = results["sigterm rank 1, fsdp2"]
    assert (stopped["codes"], stopped["newest"]) == ([143, 0], "step-00000005")
    shards = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.ckpt"]
    assert stopped["files"] == shards
    assert results["sharded to full"]["codes"] == [0, 0]
    assert results["sharded to full"]["files"] == ["manifest.json", "state.ckpt"]
    assert_same_run(folder / "full", folder / "whole", but=("grad_norm",))
    assert results["resumed, fsdp2"]["codes"] == [0, 0]
    assert_same_run(folder / "sharded", folder / "whole", but=("grad_norm",))
    exported = [
        (folder / run / "hf" / "model.safetensors").read_bytes() for run in ("sharded", "whole")
    ]
    assert exported[0] == exported[1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["native", "fp32"])
def test_two_ranks_in_each_way_of_multiplying_bf16(way: str, ranks: tuple[Path, Any]) -> None:
    """DDP and FSDP2 take the same steps to the bit; the losses are those of one process."""
    folder, results = ranks
    runs = [f"{way}-{strategy}" for strategy in ("auto", "ddp", "fsdp2")]
    losses = []
    for run in runs:
        assert set(results[run]["codes"]) == {0}, results[run]["log"]
        assert json.loads((folder / run / "run.json").read_text())["bf16_products"] == way
        rows = (folder / run / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("train/loss")
        losses.append([float(row.split(",")[column]) for row in rows[1:]])
    assert losses[1] == losses[2] and len(losses[0]) == 6
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)  # before any sum's order tells
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_accumulation_needs_no_further_reductions(ranks: tuple[Path, Any]) -> None:
    """2 steps of 2 micro-batches; groups: per block linears and norms, lm_head, embedding, norm."""
    _, results = ranks
    assert results["sigterm rank 1, fsdp2"]["reduced"] == 2 * (2 * 2 + 3)


@pytest.mark.slow
def test_a_rank_killed_in_its_sharded_save(ranks: tuple[Path, Any]) -> None:
    """The other ends, the half checkpoint is none, and the start after that goes on before it."""
    folder, results = ranks
    killed = results["killed in its save"]
    assert killed["codes"] == [2, -9]
    assert "rank 0 lost another rank" in killed["log"]
    assert killed["newest"] == "step-00000005"
    assert "resumed after step 5" in results["resumed, fsdp2"]["log"]
    assert not list((folder / "sharded" / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_world_size_changed(ranks: tuple[Path, Any]) -> None:
    """From 2 ranks to 1: the same windows in every step; the report says what is not restored."""
    _, results = ranks
    assert results["resumed on 1"]["codes"] == [0]
    assert results["resumed on 1"]["windows"] == {"5": results["whole"]["windows"]["5"]}
    assert (
        "random generators not restored, 2 ranks then and 1 now" in results["resumed on 1"]["log"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nan_loss_on_rank_1_stops_both(strategy: str, ranks: tuple[Path, Any]) -> None:
    folder, results = ranks
    stopped = results[f"nan rank 1, {strategy}"]
    assert stopped["codes"] == [3, 3]
    assert stopped["newest"] == "step-00000002"
    name = "nonfinite-step-00000003-rank{}.json"
    bad, good = (
        json.loads((folder / f"nan-{strategy}" / name.format(rank)).read_text()) for rank in (1, 0)
    )
    assert bad["first_non_finite"]["layer"] == "model.layers.1.mlp.up_proj"
    assert bad["first_non_finite"]["tensor"] == "output"
    assert good["first_non_finite"]["tensor"] == "gradient"  # it came from the other rank
    assert sorted(sum_of(good["windows"]) + sum_of(bad["windows"])) == sorted(
        results["whole"]["windows"]["2"]
    )


@pytest.mark.slow
def test_one_rank_dies(ranks: tuple[Path, Any]) -> None:
    """Rank 1 is killed: rank 0 does not wait for it, and a start goes on from the last save."""
    _, results = ranks
    assert results["kill rank 1"]["codes"] == [2, -9]
    assert "rank 0 lost another rank" in results["kill rank 1"]["log"]
    assert results["kill rank 1"]["newest"] == "step-00000002"


def sum_of(lists: list[list[int]]) -> list[int]:
    return [item for part in lists for item in part]
