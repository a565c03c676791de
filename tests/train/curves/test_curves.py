"""Curves of other trainers: a planted gap is found in each kind of file, and no pair is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.cli import main

Losses = tuple[dict[int, float], dict[int, float]]
STEPS, GAP = 40, 0.02


def losses(seed: int, gap: float) -> Losses:
    """Train and validation losses of a run whose chaos is `seed`'s own, and its recipe's cost."""
    chaos = np.random.default_rng(1000 * seed + round(1e6 * gap)).normal(0, 5e-4, STEPS + 1)
    batches = np.random.default_rng(seed).normal(0, 0.05, STEPS + 1)
    curve = [6.0 / (1 + 0.02 * step) for step in range(STEPS + 1)]
    train = {s: curve[s] + batches[s] + (gap + chaos[s]) * (s > 1) for s in range(1, STEPS + 1)}
    return train, {s: curve[s] + gap + chaos[s] for s in range(10, STEPS + 1, 10)}


def write_csv(path: Path, found: Losses) -> tuple[str, ...]:
    """As W&B exports it: the run's name before each column, empty cells."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Step", "run - loss", "run - loss__MIN", "run - eval"])
        for step, loss in found[0].items():
            rows.writerow([step, loss, loss, found[1].get(step, "")])
    return "train=run - loss", "val=run - eval"


def write_titan(path: Path, found: Losses) -> tuple[str, ...]:
    """torchtitan's console: colours, thousands separators, five digits; some steps said twice."""
    head = "[titan] 2026-01-01 00:00:01,000 - root - INFO - \x1b[31m"
    tail = "\x1b[36mmemory: 21.50GiB(22.72%)  \x1b[34mtps: 1,234  \x1b[35mmfu: 22%\x1b[0m"
    lines = [f"{head}Training starts at step 1"]
    for step, loss in [*list(found[0].items())[:7], *list(found[0].items())[4:]]:
        lines.append(
            f"{head}step: {step:2}  \x1b[32mloss: {loss:8.5f}  \x1b[38;2;180;60;0mgrad_norm:"
            f"  1.5000  {tail}"
        )
        if step in found[1]:
            lines.append(
                f"\x1b[33mvalidate step: {step:2}  loss: {found[1][step]:7.5f}  tps: 2,345"
            )
    path.write_text("\n".join(lines))
    return ()


def write_jsonl(path: Path, found: Losses) -> tuple[str, ...]:
    """Counted from 0, with tokens of its own."""
    rows = [
        {"_step": s - 1, "train_loss": loss, "tokens": 512 * s, "note": "x"}
        | ({"val_loss": found[1][s]} if s in found[1] else {})
        for s, loss in found[0].items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return ("tokens=tokens",)


def write_events(path: Path, found: Losses) -> tuple[str, ...]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        for step, loss in found[0].items():
            writer.add_scalar("loss_metrics/global_avg_loss", loss, step)
        for step, loss in found[1].items():
            writer.add_scalar("val", loss, step)
    return ("val=val",)


WRITERS: dict[str, Callable[[Path, Losses], tuple[str, ...]]] = {
    "csv": write_csv,
    "log": write_titan,
    "jsonl": write_jsonl,
    "events": write_events,
}


def curves(kind: str, folder: Path, gaps: dict[str, float]) -> list[str]:
    words = []
    for name, gap in gaps.items():
        for seed in range(3):
            path = folder / f"{name}-{seed}.{kind}"
            keys = WRITERS[kind](path, losses(seed, gap))
            words += ["--curve", name, str(path), f"seed={seed}", *keys]
    return words


@pytest.mark.parametrize("kind", WRITERS)
def test_a_planted_gap_is_found(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = curves(kind, tmp_path, {"bf16": 0.0, "fp8": GAP, "same": 1e-6})
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    against = {p["b"]: p for p in result["pairs"] if p["a"] == "bf16"}
    expected = [losses(s, GAP)[1][STEPS] - losses(s, 0.0)[1][STEPS] for s in range(3)]
    digits = {"log": 2e-5, "events": 1e-6}.get(kind, 1e-12)  # what the file holds of a loss
    assert against["fp8"]["gaps"] == pytest.approx(expected, abs=digits)
    assert against["fp8"]["verdict"] == "worse"
    assert against["same"]["verdict"] == "not distinguishable"
    (note,) = [text for text in result["notes"] if text.startswith("Of other trainers")]
    assert "initial weights, batches, architecture" in note and "first losses agree" in note
    assert ("of tokens here are steps" in note) == (kind != "jsonl")
    row = result["runs"][0]
    assert row["steps"] == STEPS and row["tokens"] == STEPS * (512 if kind == "jsonl" else 1)
    assert row["nonfinite_steps"] == 0 and row["status"] == "finished"


def test_beside_a_run_of_ours_by_tokens(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = make_run(tmp_path / "bf16-s0", [5.0, 4.0, 3.0], {3: 3.0})
    (tmp_path / "a.csv").write_text("step,loss,val_loss\n1,5.001,\n2,4.1,\n3,3.1,3.25\n")
    curve = ["--curve", "theirs", str(tmp_path / "a.csv"), "tokens_per_step=32"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["compare", str(own), *curve, *out]) == 0
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["baseline"] == "bf16" and result["runs"][1]["gap"] == pytest.approx(0.25)
    (tmp_path / "a.csv").write_text("step,loss,val_loss\n1,5.02,\n2,4.1,\n3,3.1,3.25\n")
    assert main(["compare", str(own), *curve, *out]) == 2
    assert "first_loss differs: 5 in bf16 s0, 5.02 in theirs" in capsys.readouterr().err
    assert main(["compare", str(own), *curve, *out, "--allow", "first_loss"]) == 0


BAD = {
    "a.csv": "expected NAME PATH",
    "x nowhere.csv": "no such file",
    "x a.csv foo=1": "'foo=1', expected train=",
    "x a.csv train=": "'train=', expected",
    "x a.csv train=bar": "no column 'bar' for train: it has step, loss",
    "x a.csv step=bar": "no column bar: it has step, loss",
    "x a.csv seed=a": "seed=a: expected a number",
    "x a.csv tokens_per_step=0": "above 0",
    "x a.csv tokens=loss tokens_per_step=3": "one of them",
    "x a.csv tokens=loss": "do not increase",
    "x b.csv": "no column of steps",
    "x empty.csv": "has no rows",
    "x c.csv": "step=1.5 is no step",
    "x d.csv": "has no loss: name its column",
    "x bad.jsonl": "bad.jsonl",
    "x list.jsonl": "is no JSON object",
    "x noise.log": "no line of torchtitan's log",
    "x .": "no TensorBoard events",
    "x binary.csv": "binary.csv",
    "../x a.csv": "becomes a folder",
    "x a.csv --curve x a.csv": "there are two of seed 0",
    "x a.csv --curve y a.csv tokens_per_step=2": "--curve x counts steps",
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_no_curve_is_one_line(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "a.csv": "step,loss\n1,5\n2,4\n",
        "b.csv": "at,loss\n1,5\n",
        "empty.csv": "",
        "c.csv": "step,loss\n1.5,5\n",
        "d.csv": "step,foo\n1,5\n",
        "bad.jsonl": "{",
        "list.jsonl": "[1]",
        "noise.log": "hello",
    }.items():
        Path(name).write_text(text)
    Path("binary.csv").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    assert main(["compare", "--curve", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lowbit: error: ") and BAD[words] in line
    assert len(line) <= 200
    assert sorted(tmp_path.iterdir()) == before
