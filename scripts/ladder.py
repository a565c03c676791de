"""The ladder of formats: tables and picture from what `lowbit compare` left, as in docs/results.md.

usage: python scripts/ladder.py SWEEP [--draw STEM] [--into PAGE.md]
  SWEEP with compare/compare.json; --draw leaves STEM.png and .svg; --into puts the tables between
  the page's marks `<!-- ladder -->` and `<!-- /ladder -->`
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import IntFormat, QuantRecipe
from lowbit.recipe import GEMMS, OPERANDS
from train.compare.branch_casts import FLOOR, CastSet, read_casts
from train.compare.branch_table import between, signed
from train.compare.branches import reread
from train.config.layers import spelt_out
from train.config.policies import read_policy
from train.config.strict_yaml import load_yaml
from train.stats.serial import window_mean

BEGIN, END = "<!-- ladder -->", "<!-- /ladder -->"
SWEEPS = Path(__file__).parents[1] / "configs" / "sweep"


def labels_of(spec: str) -> set[str]:
    """Of the arms that a sweep file lists, but the baseline's."""
    recipes = load_yaml((SWEEPS / f"{spec}.yaml").read_text(encoding="utf-8"))["recipes"]
    return {Path(path).stem for path in recipes[1:]}


@dataclass(frozen=True)
class Rung:
    """One arm: its recipe, what branches say of it, and what the cast says."""

    label: str
    recipe: QuantRecipe
    is_whole: bool  #: no layer is kept, no other rule
    control: str | None
    row: dict[str, Any]  #: of the branches, against the baseline
    cast: dict[str, Any] | None

    @cached_property
    def formats(self) -> list[Any]:
        """Of the six operands."""
        return [self.recipe.format(name) for name in OPERANDS]

    @property
    def bits(self) -> float:
        """Stored bits per value, mean of the six operands."""
        return sum(16.0 if f is None else f.bits_per_value for f in self.formats) / len(OPERANDS)

    @property
    def is_uniform(self) -> bool:
        """One format everywhere; rotated in all GEMMs or in none: a point of the picture."""
        turned = {bool(self.recipe.rotation(gemm)) for gemm in GEMMS}
        return self.is_whole and len({*self.formats}) == 1 == len(turned) and not self.control

    @property
    def is_rotated(self) -> bool:
        return all(self.recipe.rotation(gemm) for gemm in GEMMS)

    @property
    def is_integer(self) -> bool:
        return isinstance(self.formats[0].element, IntFormat)


def read_rungs(document: dict[str, Any]) -> list[Rung]:
    """Of one set of branches, in the order of its arms."""
    rows = {row["label"]: row for row in document["rows"]}
    casts = {row["recipe"]: row for row in document["casts"]}
    found, own = [], labels_of("ladder")
    for arm in reread(Path(document["path"])).arms:
        if arm["label"] in rows.keys() & own and not arm["changes"]:
            plain = load_yaml(Path(arm["recipe"]).read_text(encoding="utf-8"))
            policy = read_policy(spelt_out(plain["model"]["policy"]))
            is_whole = not (policy.keep_last or policy.keep_first or policy.rules)
            found.append(Rung(
                arm["label"], policy.recipe, is_whole, arm["control"], rows[arm["label"]],
                casts.get(policy.name) if not arm["control"] else None,
            ))  # fmt: skip
    return found


def ladder_table(rungs: list[Rung]) -> list[str]:
    """Every arm, most bits first; controls last."""
    order = sorted(rungs, key=lambda rung: (bool(rung.control), not rung.is_uniform, -rung.bits))
    head = ("recipe", "bits", "KL of the cast", "loss of the cast", "branches",
            "training, 20 steps", "95 %, these checkpoints", "all rows together")  # fmt: skip
    return table(head, [
        (rung.label + (" (control)" if rung.control else ""),
         "" if rung.control else f"{rung.bits:.2f}", _cast(rung, "kl", ".2e", ".0e"),
         _cast(rung, "gap", "+.5f", ".5f"), _counts(rung.row), _with_error(rung.row),
         between(rung.row), verdict(rung.row)) for rung in order
    ])  # fmt: skip


def _cast(rung: Rung, name: str, form: str, error: str) -> str:
    if rung.cast is None:
        return ""
    found = rung.cast[name]
    return f"{found['mean']:{form}} ± {found['standard_error']:{error}}"


def _counts(row: dict[str, Any]) -> str:
    """Branches of each checkpoint."""
    return " + ".join(str(count) for count in row["checkpoint_units"] if count)


def _with_error(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return signed(row["mean"]) + ("" if error is None else f" ± {error:.5f}")


def verdict(row: dict[str, Any]) -> str:
    """With how small an effect would have been seen, and equivalence where it was asked for."""
    parts = [row["verdict"]]
    if row.get("p_holm") is not None:
        parts.append(f"p = {row['p_holm']:.2g} (Holm)")
    if row.get("detectable") is not None:
        parts.append(f"sees {row['detectable']:.2g}")
    if (row.get("equivalence") or "").startswith("equivalent"):
        parts.append(row["equivalence"])
    return "; ".join(parts)


def dispute_table(document: dict[str, Any], disputed: set[str]) -> list[str]:
    """Disputed arms against the baseline, and the pairs that have one of them."""
    rows = [row | {"a": document["baseline"], "b": row["label"]} for row in document["rows"]
            if row["label"] in disputed]  # fmt: skip
    rows += [row for row in document["pairs"] if {row["a"], row["b"]} & disputed]
    return question_table([row for row in rows if row["units"]]) if rows else []


def question_table(pairs: list[dict[str, Any]]) -> list[str]:
    """The pairs named in advance."""
    head = ("question", "difference in training", "95 %, these checkpoints", "answer")
    return table(head, [
        (f"{row['b']} against {row['a']}", _with_error(row), between(row), verdict(row))
        for row in pairs
    ])  # fmt: skip


def cast_question_table(casts: CastSet, pairs: list[dict[str, Any]]) -> list[str]:
    """The same pairs by the KL of their casts, window by window."""
    documents = casts.units[0]["windows"]["documents"]
    kl = {row["recipe"]: _windows(casts, row["recipe"], "kl") for row in casts.rows()}
    rows = []
    for a, b in ((pair["a"], pair["b"]) for pair in pairs if {pair["a"], pair["b"]} <= kl.keys()):
        found = window_mean(kl[b] - kl[a], documents).estimate
        less = {"better": f"less with {b}", "worse": f"less with {a}"}
        ratio = f"{kl[b].mean() / kl[a].mean():.2f}"
        bounds = f"{found.low:+.1e} to {found.high:+.1e}"
        rows.append((f"{b} against {a}", ratio, bounds, less.get(found.verdict, found.verdict)))
    return table(("question", "KL over KL", "difference of the KLs, 95 %", "answer"), rows)


def _windows(casts: CastSet, recipe: str, column: str) -> Any:
    """Of each window, the mean over the checkpoints."""
    return np.mean([unit["values"][recipe][column] for unit in casts.units], axis=0)


def document_table(casts: CastSet) -> list[str]:
    """Whether the interval of each cast's loss holds what a split by document shows."""
    documents = np.array(casts.units[0]["windows"]["documents"])
    rows = []
    for row in casts.rows():
        found = _windows(casts, row["recipe"], "gap")
        means = [float(found[documents == one].mean()) for one in np.unique(documents)]
        low, high = row["gap"]["low"], row["gap"]["high"]
        holds = "yes" if low is None or (low <= min(means) and max(means) <= high) else "no"
        rows.append((row["recipe"], between(row["gap"]), *map(signed, means), holds))
    plays = (f"document {one}" for one in np.unique(documents))
    return table(("loss of the cast", "95 %", *plays, "holds all"), rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tables(documents: list[dict[str, Any]]) -> list[str]:
    """Of every set of branches in the sweep."""
    lines: list[str] = []
    for document in documents:
        arms = reread(Path(document["path"])).arms
        if not any(arm["changes"] for arm in arms):
            rungs = read_rungs(document)
            ladder = labels_of("ladder")
            pairs = [row for row in document["pairs"] if {row["a"], row["b"]} <= ladder]
            lines += [*ladder_table(rungs), "", *question_table(pairs), ""] if rungs else []
            if disputed := dispute_table(document, labels_of("disputes")):
                lines += [*disputed, ""]
            if casts := read_casts(Path(document["path"])):
                lines += [*cast_question_table(casts, pairs), ""]
                lines += [*document_table(casts), ""]
        else:  # overrides: effects that were planted
            rows = [(row["label"], _with_error(row), between(row), verdict(row))
                    for row in document["rows"]]  # fmt: skip
            head = ("planted", "training, 20 steps", "95 %, these checkpoints", "verdict")
            lines += [*table(head, rows), ""]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--draw", type=Path, metavar="STEM")
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    args = parser.parse_args()
    found = json.loads((args.sweep / "compare" / "compare.json").read_text(encoding="utf-8"))
    lines = tables(found["branches"])
    print("\n".join(lines))
    if args.into:
        page = args.into.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        text = "\n".join([BEGIN, "", *lines, END])
        args.into.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
    if args.draw:
        from ladder_plot import draw

        floors = [
            row["kl"]["mean"]
            for one in found["branches"]
            for row in one["casts"]
            if row["recipe"] == FLOOR
        ]
        rungs = [rung for one in found["branches"] for rung in read_rungs(one)]
        if rungs:
            draw(rungs, max(floors, default=None), args.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
