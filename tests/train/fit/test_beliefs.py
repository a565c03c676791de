"""What a resume believes: a checkpoint's run is the folder's, to the rows of its metrics.csv."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.checkpoints.folder import _encode
from train.cli import main
from train.fit import saving
from train.fit.resume import changed
from train.runs.run import read_run

Act = Callable[[Path, Path], None]  # on the run, with one of another seed beside it
POINT = "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_data: Path, recipes: Path
) -> Path:
    """Two seeds of 4 steps, as if killed in the last: the newest checkpoint is of step 2."""
    import torch

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("beliefs")
    for seed in ("0", "1"):
        layers = ("-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
        place = ("--run_dir", str(out / f"bf16-s{seed}"), "--seed_everything", seed)
        steps = ("--trainer.max_steps", "4", "--checkpoint_every", "2")
        assert main(["fit", *layers, *place, *steps]) == 0
        for last in ("checkpoints/step-00000004", "hf"):
            (out / f"bf16-s{seed}" / last).rename(out / f"{seed}-{Path(last).name}")
    return out


def rows(change: Callable[[bytes], bytes]) -> Act:
    def act(run: Path, other: Path) -> None:
        path = run / "metrics.csv"
        path.write_bytes(change(path.read_bytes()))

    return act


def digit(data: bytes) -> bytes:
    """The third of the first row's loss."""
    at = data.index(b"\n") + 1
    at = data.index(b",", data.index(b",", at) + 1) + 4
    return data[:at] + (b"1" if data[at : at + 1] != b"1" else b"2") + data[at + 1 :]


def manifest(change: Callable[[dict[str, Any]], None]) -> Act:
    def act(run: Path, other: Path) -> None:
        path = run / POINT / "manifest.json"
        plain = json.loads(path.read_bytes())
        del plain["digest"]
        change(plain["origin"])
        path.write_bytes(_encode(plain))

    return act


def copied(name: str) -> Act:
    def act(run: Path, other: Path) -> None:
        target = run / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        (shutil.copytree if (other / name).is_dir() else shutil.copyfile)(other / name, target)

    return act


def lone(run: Path, other: Path) -> None:
    (run / "config.yaml").unlink()
    (run / "run.json").unlink()


def renamed(run: Path, other: Path) -> None:
    (run / POINT).rename(run / "checkpoints/step-00000003")


LR = ("--model.optimization.lr", "0.5")
REFUSED: dict[str, tuple[Act, tuple[str, ...], str]] = {
    "no metrics.csv": (lambda run, other: (run / "metrics.csv").unlink(), (), "is missing"),
    "an empty one": (rows(lambda data: b""), (), "is missing or empty"),
    "its header alone": (rows(lambda data: data[: data.index(b"\n") + 1]), (), "lacks rows"),
    "a row less": (rows(lambda data: data[: data.index(b"\n2,") + 1]), (), "lacks the last row"),
    "another run's": (copied("metrics.csv"), (), "is another run's, or was changed"),
    "a digit of a row": (rows(digit), (), "is another run's, or was changed"),
    "another file": (rows(lambda data: b"a,b\n1,2\n"), (), "is no metrics.csv"),
    "no config.yaml, another rate": (lone, LR, "model.optimization.lr: 0.01 -> 0.5"),
    "another seed's checkpoint": (copied(POINT), (), "seed_everything: 1 -> 0"),
    "another seed's run.json": (copied("run.json"), (), "is not this run's"),
    "a checkpoint of other initial weights": (
        manifest(lambda origin: origin.update(identity=None) or origin.update(identity=FOREIGN)),
        (),
        "initial_weights",
    ),
    "a renamed checkpoint": (renamed, (), "is of step 2: it was renamed"),
}
FOREIGN: dict[str, Any] = {}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    from train.runs.belonging import run_identity
    from train.runs.identity import Identity
    from train.runs.record import read_record

    shutil.copytree(trained / "bf16-s0", tmp_path / "bf16-s0")
    own = run_identity(trained / "bf16-s0", read_record(trained / "bf16-s0"))
    FOREIGN.update(Identity({**own.fields, "initial_weights": "0" * 64}).plain())
    return tmp_path / "bf16-s0"


def resume(fit: Callable[..., int], run: Path, *more: str) -> int:
    return fit(run, "bf16", "--trainer.max_steps", "4", "--checkpoint_every", "2", *more)


@pytest.mark.parametrize("case", REFUSED)
def test_a_resume_refuses_what_is_not_its_run(
    case: str, fit: Callable[..., int], run: Path, trained: Path, capsys: Any
) -> None:
    act, more, message = REFUSED[case]
    act(run, trained / "bf16-s1")
    assert resume(fit, run, *more) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert "\nresumed after" not in said.out


SAID: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "threads": ({"threads": 3}, {"threads": 1}, "threads 3 -> 1"),
    "a version": (
        {"versions": {"torch": "2.0"}},
        {"versions": {"torch": "2.1"}},
        'versions.torch "2.0" -> "2.1"',
    ),
    "kernels": ({"kernels": "cpu"}, {"kernels": None}, 'kernels "cpu" -> null'),
    "ranks": ({"world_size": 2}, {"world_size": 1}, "world_size 2 -> 1"),
}


@pytest.mark.parametrize("case", SAID)
def test_what_moves_last_digits_is_said(case: str) -> None:
    saved, now, message = SAID[case]
    (line,) = changed(saved, now)
    assert line.endswith(f": {message}")
    assert changed(now, now) == changed({}, now) == []  # an older checkpoint does not tell


def test_a_resume_says_it_and_goes_on(
    fit: Callable[..., int], run: Path, trained: Path, monkeypatch: Any, capsys: Any
) -> None:
    original = saving.run_origin
    monkeypatch.setattr(saving, "run_origin", lambda *a: original(*a) | {"threads": 5})
    assert resume(fit, run) == 0
    assert "last digits may differ: threads 1 -> 5" in capsys.readouterr().out
    found, whole = read_run(run), read_run(trained / "bf16-s0")
    assert found.metrics["train/loss"].tolist() == whole.metrics["train/loss"].tolist()


def test_another_folder_goes_on_without_the_rows_and_says_so(
    fit: Callable[..., int], run: Path, tmp_path: Path, capsys: Any
) -> None:
    (run / "metrics.csv").unlink()
    assert resume(fit, tmp_path / "new", "--resume", str(run / POINT)) == 0
    assert "lacks the rows up to step 2" in capsys.readouterr().out
    assert read_run(tmp_path / "new").metrics["step"].tolist() == [3, 4]
