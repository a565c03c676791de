"""The gaps, their intervals and verdicts, the refusals and the exit codes of `lowbit compare`."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.compare import compare
from train.compare.gaps import Pair, compare_pair
from train.compare.pairing import FIELDS, check_pairing
from train.runs.casts import CastGap, write_cast_gaps
from train.runs.run import Run, read_runs
from train.stats.intervals import t_cdf, t_quantile

Make = Callable[..., Path]
Verb = Callable[..., int]
pytestmark = pytest.mark.usefixtures("no_pictures")
Capture = pytest.CaptureFixture[str]
DATA = {"fingerprint": "f0", "seq_len": 8, "global_batch_size": 4}
TRAIN, VAL = [3.0, 2.0, 1.0], {1: 3.5, 3: 2.0}


@pytest.mark.parametrize(
    ("df", "p", "published"),  # NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.95, 2.353), (4, 0.975, 2.776), (5, 0.99, 3.365),
     (9, 0.975, 2.262), (10, 0.9, 1.372), (30, 0.975, 2.042), (99, 0.975, 1.984)],
)  # fmt: skip
def test_t_quantile_is_the_published_one(df: int, p: float, published: float) -> None:
    assert round(t_quantile(p, df), 3) == published
    assert t_cdf(t_quantile(p, df), df) == pytest.approx(p, abs=1e-14)


LAG = np.subtract.outer(np.arange(20), np.arange(20))
AR1 = np.where(LAG >= 0, 0.8 ** np.maximum(LAG, 0), 0.0)  # each value 0.8 of the one before


def curves(rng: np.random.Generator, offset: float, shared: np.ndarray) -> Run:
    """A run of 20 validations: what the seed's runs share, a lasting drift and AR(1) noise."""
    noise = AR1 @ rng.normal(0, 0.003, 20)
    steps = np.arange(1.0, 21.0)
    loss = shared + offset + rng.normal(0, 0.004) + noise
    metrics = {"step": steps, "tokens_seen": 64 * steps, "train/loss": loss, "val/loss": loss}
    return Run(Path(), {"status": "finished", "seed": 0, "recipe": "r"}, metrics, "r")


def simulated(n: int, gap: float, rng: np.random.Generator) -> Pair:
    a, b = {}, {}
    for seed in range(n):
        shared = 4 + rng.normal(0, 0.05) + rng.normal(0, 0.02, 20)
        a[seed], b[seed] = curves(rng, 0.0, shared), curves(rng, gap, shared)
    return compare_pair(a, b)


@pytest.mark.parametrize("n", [3, 10])
def test_intervals_cover_and_noise_is_not_called_a_difference(n: int) -> None:
    rng = np.random.default_rng(n)
    planted = [simulated(n, 0.005, rng) for _ in range(1000)]
    covered = sum(p.low <= 0.005 <= p.high for p in planted)  # type: ignore[operator]
    none = [simulated(n, 0.0, rng).verdict for _ in range(1000)]
    assert covered >= 930
    assert sum(verdict != "not distinguishable" for verdict in none) <= 70


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.10, 0.11, 0.12], "worse"),
        ([-0.10, -0.11, -0.12], "better"),
        ([-0.10, 0.11, 0.12], "not distinguishable"),
        ([0.0, 0.0, 0.0], "no spread: no verdict"),
        ([1e-15, 1e-15, 2e-15], "no spread: no verdict"),
        ([0.5, 0.5, 0.5], "no spread: no verdict"),
        ([0.10, 0.11], "two seeds: no verdict"),
        ([0.10], "one seed: no verdict"),
    ],
)
def test_verdict(tmp_path: Path, make_run: Make, gaps: list[float], verdict: str) -> None:
    for seed, gap in enumerate(gaps):
        make_run(tmp_path / f"bf16-s{seed}", TRAIN, VAL, seed=seed)
        val = {1: 9.0, 3: 2.0 + gap}
        make_run(tmp_path / f"x-s{seed}", [x + 1 for x in TRAIN], val, recipe="x", seed=seed)
    (pair,) = compare.compare(read_runs([tmp_path]))["pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == ("bf16", "x", verdict)
    assert pair["mean"] == pytest.approx(np.mean(gaps), abs=1e-12)
    assert pair["tokens"] == 96 and pair["relative"] == pytest.approx(np.mean(gaps) / 2)
    if len(gaps) < 3:
        assert pair["low"] is None and pair["band"] == pytest.approx((1, 1))
    elif "no spread" in verdict:
        assert pair["low"] is None is pair["high"] and pair["standard_error"] < 1e-12
    else:
        reach = t_quantile(0.975, 2) * np.std(gaps, ddof=1) / math.sqrt(3)
        assert pair["high"] - pair["mean"] == pytest.approx(reach) and pair["band"] is None


def test_gap_is_taken_at_tokens_that_both_reached(tmp_path: Path, make_run: Make) -> None:
    make_run(tmp_path / "bf16-s0", TRAIN, {1: 3.0, 2: 2.5, 3: 2.0})
    late = {"recipe": "x", "status": "running", "max_steps": 3}
    make_run(tmp_path / "x-s0", TRAIN[:2], {1: 3.5, 2: 2.75}, **late)
    runs = read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"tokens differs: 96 in .*bf16-s0, 64 in .*x-s0"):
        check_pairing(runs)
    row = compare.compare(runs, check_pairing(runs, ["tokens"]))["runs"][1]
    assert (row["gap"], row["gap_tokens"], row["max_gap"]) == (0.25, 64, 0.5)
    assert row["gap_relative"] == 0.1


MISMATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"fingerprint": "f1"}, 'data differs: "f0" in .*, "f1" in '),
    "batch": ({"global_batch_size": 8}, "batch differs: 4 in .*, 8 in "),
    "seq_len": ({"seq_len": 16}, "seq_len differs: 8 in .*, 16 in "),
    "data_seed": ({"seed": 7}, "data_seed differs: 0 in .*, 7 in "),
    "model": ({"model": {"hidden_size": 32}}, r"model\.hidden_size differs: 16 in .*, 32 in "),
    "bf16_products": (
        {"bf16_products": "fp32"},
        'bf16_products differs: "native" in .*, "fp32" in ',
    ),
    "max_steps": ({"max_steps": 4}, "max_steps differs: 3 in .*, 4 in "),
    "initial_weights": ({"initial_weights": "v"}, 'initial_weights differs: "w0" in .*, "v" in '),
    "tokens": ({}, "tokens differs: 96 in .*, 64 in "),
    "recipe_table": ({"recipe_table": []}, "recipe_table differs: "),
}


@pytest.mark.parametrize("field", FIELDS)
def test_mismatch_is_refused_by_name_unless_allowed(
    tmp_path: Path, make_run: Make, field: str, capsys: Capture, lowbit_compare: Verb
) -> None:
    change, message = MISMATCHES[field]
    info: dict[str, Any] = {"max_steps": 3, "data": DATA | {"seed": 0}}
    (info["data"] if change.keys() <= info["data"].keys() else info).update(change)
    label, seed = ("bf16", 1) if field == "recipe_table" else ("x", 0)
    make_run(tmp_path / "bf16-s0", TRAIN, VAL)
    loss = TRAIN[:2] if field == "tokens" else TRAIN
    make_run(tmp_path / f"{label}-s{seed}", loss, VAL, recipe=label, seed=seed, **info)
    with pytest.raises(ValueError, match=f"{message}.*--allow {field}"):
        lowbit_compare(tmp_path)
    assert not (tmp_path / "compare").exists()
    assert lowbit_compare(tmp_path, "--allow", field) == 0
    assert f"Allowed: {field}" in capsys.readouterr().out


def test_seeds_that_repeat_one_unit_are_refused(
    tmp_path: Path, make_run: Make, lowbit_compare: Verb
) -> None:
    unit = {"initial_weights": "w", "data": DATA | {"seed": 0}}
    for seed in (0, 1):
        make_run(tmp_path / f"bf16-s{seed}", TRAIN, VAL, seed=seed, **unit)
    with pytest.raises(ValueError, match="seeds 0 and 1 of bf16 are not independent"):
        lowbit_compare(tmp_path)


def test_a_control_may_start_from_perturbed_weights(tmp_path: Path, make_run: Make) -> None:
    make_run(tmp_path / "bf16-s0", TRAIN, VAL)
    make_run(tmp_path / "noise-s0", TRAIN, VAL, initial_weights="w0'", control="1e-6")
    result = compare.compare(read_runs([tmp_path]))
    assert check_pairing(read_runs([tmp_path])) == []
    assert not any("No control" in note for note in result["notes"])


def test_diverged_and_failed_runs_are_shown(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb
) -> None:
    for seed in range(4):
        make_run(tmp_path / f"bf16-s{seed}", TRAIN, VAL, seed=seed)
        make_run(tmp_path / f"good-s{seed}", TRAIN, VAL, recipe="good", seed=seed)
    make_run(tmp_path / "bad-s0", [3.0, math.nan], {1: 3.5}, recipe="bad", max_steps=3)
    (tmp_path / "good-s3" / "metrics.csv").write_text("step,tokens_seen,train/loss\n1,32,9.0\n")
    text = (tmp_path / "good-s3" / "run.json").read_text().replace("finished", "failed")
    (tmp_path / "good-s3" / "run.json").write_text(text)
    assert lowbit_compare(tmp_path) == 0
    out = capsys.readouterr().out
    assert "diverged @ step 2" in out and "failed @ step 1" in out
    assert "bad against bf16: bad (seed 0) diverged: no verdict" in out
    assert "Failed, shown but in no mean: good seed 3." in out
    assert "3 paired seeds); no spread: no verdict" in " ".join(out.split())
    assert lowbit_compare(tmp_path, "--max-gap", 1) == 1


@pytest.mark.parametrize("how", ["failed", "diverged", "running"])
def test_runs_that_ended_badly_or_not_at_all_are_in_no_mean(
    tmp_path: Path, make_run: Make, how: str
) -> None:
    for seed, loss in enumerate((2.0, 2.5, 9.0)):
        status, steps = (how, 2) if seed == 2 else ("finished", 3)
        own = {"seed": seed, "status": status, "max_steps": 3}
        make_run(tmp_path / f"bf16-s{seed}", TRAIN[:steps], {steps: loss}, **own)
    (recipe,) = compare.compare(read_runs([tmp_path]))["recipes"]
    assert recipe["mean_val_loss"] == 2.25
    assert recipe["seed_spread"] == pytest.approx(0.125**0.5)


def test_one_seed_has_no_verdict(
    tmp_path: Path, make_run: Make, capsys: Capture, lowbit_compare: Verb
) -> None:
    base = make_run(tmp_path / "bf16-s0", TRAIN, VAL)
    make_run(tmp_path / "mxint8-s0", TRAIN, {3: 2.5}, recipe="mxint8")
    assert lowbit_compare(tmp_path) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "gap +0.50000 after 96 tokens; one seed: no verdict" in out
    assert "initial weights differ by 1e-6 drift apart" in out
    assert "No ordering follows from single runs." in out and "No cast gap" in out
    write_cast_gaps(base, {"mxint8": CastGap(0.00017, 0.00012, 16, 4096)})
    lowbit_compare(tmp_path)
    assert "+0.00017 ± 0.00012" in capsys.readouterr().out


def sweep(make_run: Make, out: Path, gaps: list[float], recipe: str = "x", **info: Any) -> None:
    for seed, gap in enumerate(gaps):
        if not (out / f"bf16-s{seed}").exists():
            make_run(out / f"bf16-s{seed}", TRAIN, {3: 2.0}, seed=seed)
        make_run(out / f"{recipe}-s{seed}", TRAIN, {3: 2.0 + gap}, recipe=recipe, seed=seed, **info)


@pytest.mark.parametrize("copies", [["x-s0 (copy)"], ["backup"], ["x-s0-old", "x-s0.bak"]])
def test_a_copied_folder_leaves_the_others_their_labels(
    tmp_path: Path, make_run: Make, copies: list[str]
) -> None:
    sweep(make_run, tmp_path, [0.1, 0.11, 0.12])
    for copy in copies:
        make_run(tmp_path / copy, TRAIN, {3: 2.1}, recipe="x")
    runs = read_runs([tmp_path])
    assert {run.label for run in runs} == {"bf16", "x", *copies}
    against = [p for p in compare.compare(runs)["pairs"] if p["a"] == "bf16"]
    pairs = {pair["b"]: pair["verdict"] for pair in against}
    assert pairs == {"x": "worse"} | dict.fromkeys(copies, "one seed: no verdict")


def test_many_rows_are_judged_together(tmp_path: Path, make_run: Make) -> None:
    """A gap that three seeds show alone is lost among five recipes, and the pairs are Holm's."""
    sweep(make_run, tmp_path, [0.1, 0.11, 0.12])
    (alone,) = compare.compare(read_runs([tmp_path]), margin=0.2)["pairs"]
    assert alone["verdict"] == "worse" and alone["equivalence"] == "equivalent within 0.2"
    assert 0.02 < alone["detectable"] < 0.04
    for recipe in "abcd":
        sweep(make_run, tmp_path, [-0.07, 0.0, 0.06], recipe=recipe, initial_weights="w")
    pairs = compare.compare(read_runs([tmp_path]))["pairs"]
    together = next(pair for pair in pairs if (pair["a"], pair["b"]) == ("bf16", "x"))
    assert together["rows"] == 5 and together["detectable"] > 2 * alone["detectable"]
    low, high = together["simultaneous"]
    assert low < together["low"] < together["high"] < high
    others = [pair for pair in pairs if pair["a"] != "bf16" and pair["freedom"]]
    assert others and all(pair["p_holm"] >= pair["p"] for pair in others)


def test_arguments_cost_no_torch_and_no_matplotlib() -> None:
    heavy = {"torch", "matplotlib", "lightning"}
    code = f"import sys, train.compare.compare; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
