"""What `lowbit compare` leaves behind: compare.json, .csv, .png, .svg and a self-contained page."""

import csv
import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import write_durably
from train.compare.gaps import matched, pairs_of, val_gaps
from train.compare.plot import plot
from train.output.files import json_text
from train.runs.identity import flat
from train.runs.metrics import Array
from train.runs.run import Curve, Run
from train.stats.intervals import MIN_UNITS, interval

MAX_POINTS = 1000  # of a drawn curve
RESULTS = ("mean", "low", "high", "verdict", "detectable", "equivalence")
# how a run went, or who began it when
NOT_SETTINGS = (
    *("status", "command", "commit", "format_version"),
    *("throughput", "metrics", "export", "starts", "error"),
)
DRAWN = (
    f"Curves are drawn with at most {MAX_POINTS} points (the lowest and highest of each of"
    f" {MAX_POINTS // 2} stretches) of six digits; every number in the tables comes from all steps."
)


def write_report(result: dict[str, Any], runs: list[Run], out: Path) -> None:
    """compare.json, pictures and page, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    document = result | {"notes": [*result["notes"], DRAWN]} | _details(runs, result)
    text = json_text(document)
    write_durably(out / "compare.json", text + "\n")
    _write_csv(document, out / "compare.csv")
    plot(document, out)
    # "<" would let a string in the data end the script element; JSON may spell it as an escape
    page = files("train.compare").joinpath("report.html").read_text(encoding="utf-8")
    page = page.replace("__COMPARE_JSON__", text.replace("<", "\\u003c"))
    (out / "report.html").write_text(page, encoding="utf-8")


def _details(runs: list[Run], result: dict[str, Any]) -> dict[str, Any]:
    baseline = {run.seed: run for run in runs if run.label == result["baseline"]}
    labels = dict.fromkeys(run.label for run in runs)
    return {
        "run_ids": [f"{run.label} s{run.seed}" for run in runs],
        "settings": _differing([_settings(run) for run in runs]),
        "versions": runs[0].info.get("versions", {})
        | {"lowbit commit": runs[0].info.get("commit")},
        "commands": [shlex.join(run.info.get("command", [])) for run in runs],
        "curves": [_curves(run, baseline.get(run.seed)) for run in runs],
        "bands": [
            band
            for label in labels
            if (band := _band(baseline, {run.seed: run for run in runs if run.label == label}))
        ],
    }


def _settings(run: Run) -> dict[str, Any]:
    found = {k: v for k, v in run.info.items() if k not in NOT_SETTINGS}
    return flat(found | ({"config.yaml": run.config} if run.config else {}))


def _differing(settings: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Per key that is not the same everywhere, its value in each run."""
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = {key: [_text(one[key]) if key in one else "" for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _curves(run: Run, base: Run | None) -> dict[str, Any]:
    found = {"train": run.train_curve, "val": run.val_curve}
    if base and base is not run:
        found["train_gap"] = matched(base.train_curve, run.train_curve)
        found["val_gap"] = matched(base.val_curve, run.val_curve)
    return {name: _points(curve) for name, curve in found.items()}


def _points(curve: Curve) -> dict[str, list[float]]:
    tokens, values = curve[0][(keep := _thinned(curve[1]))], curve[1][keep]
    return {"tokens": tokens.astype(int).tolist(), "values": _rounded(values)}


def _rounded(values: Array) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _thinned(values: Array) -> np.ndarray:
    """Indices of the extremes of equal stretches, so that no spike is lost, and of both ends."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    count, stretches = len(values), MAX_POINTS // 2 - 1
    sizes = np.full(stretches, count // stretches)
    sizes[: count % stretches] += 1
    of, first = np.repeat(np.arange(stretches), sizes), np.cumsum(sizes) - sizes
    extremes = [np.lexsort((ordered, of))[first] for ordered in (values, -values)]
    return np.unique([0, *np.concatenate(extremes), count - 1])


def _band(baseline: dict[int, Run], group: dict[int, Run]) -> dict[str, Any] | None:
    """Mean val gap over the seeds and its pointwise 95 % interval."""
    pairs = pairs_of(baseline, group)
    if len(pairs) < MIN_UNITS or group.keys() <= {r.seed for a, r in pairs if a is r}:
        return None
    tokens, gaps = val_gaps(pairs)
    found = interval(gaps)
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    label = pairs[0][1].label
    return {"label": label, "tokens": tokens.astype(int).tolist()} | {
        name: _rounded(value) for name, value in values.items()
    }


def _write_csv(document: dict[str, Any], path: Path) -> None:
    """A row per run, with its recipe's mean gap and verdict against the baseline."""
    verdicts = {p["b"]: p for p in document["pairs"] if p["a"] == document["baseline"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = []
        for row in document["runs"]:
            pair = verdicts.get(row["label"], {})
            cast = row["cast_gap"] or {}
            row = {k: v for k, v in row.items() if k != "cast_gap"}
            row |= {f"cast_gap_{k}": cast.get(k) for k in ("mean", "standard_error", "tokens")}
            row |= {f"recipe_gap_{k}": pair.get(k) for k in RESULTS}
            rows.append(row)
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
