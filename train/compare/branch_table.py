"""How `lowbit compare` prints branches, and what it adds to a verdict wherever one stands."""

import textwrap
from pathlib import Path
from typing import Any

from train.output.tables import aligned

WIDTH = 100
COLUMNS = ("recipe", "gap", "s.e.", "95 %: these checkpoints", "95 %: like these", "units",
           "diverged", "verdict")  # fmt: skip
MOST_PAIRS = 15  # pairs of arms on a terminal; of more, those with a verdict
CAST_COLUMNS = {"gap": "+.5f", "kl": ".2e"}


def branch_lines(document: dict[str, Any]) -> list[str]:
    """The scope, a row an arm and a pair of arms, and every checkpoint's own mean."""
    what = f"Branches {document['path']}" if document["path"] != "." else "Branches"
    scope = f"{what} ({document['seconds']:,.0f} s, all units added up). {document['scope']}."
    rows = [(_name(row), row) for row in document["rows"]]
    pairs = [row for row in document["pairs"] if len(document["pairs"]) <= MOST_PAIRS or _told(row)]
    rows += [(f"{row['b']} against {row['a']}", row) for row in pairs]
    steps = [f"from {where(one)}" for one in document["checkpoints"]]
    own = [[name, *_checkpoints(row)] for name, row in rows]
    lost = [text for row in (*document["rows"], *document["pairs"]) for text in row["lost"]]
    listed = textwrap.wrap(f"Diverged: {'; '.join(dict.fromkeys(lost))}.", WIDTH) if lost else []
    return [
        *textwrap.wrap(scope, WIDTH),
        "",
        *aligned([COLUMNS, *([name, *_cells(row)] for name, row in rows)], left=(0, 7)),
        *listed,
        *_left_out(len(document["pairs"]) - len(pairs)),
        "",
        *aligned([("gap ± s.e. (branches)", *steps), *own], left=(0,)),
        *_cast_lines(document.get("casts", [])),
    ]


def where(checkpoint: dict[str, Any]) -> str:
    """The run, if the path tells, and the step."""
    return f"{Path(checkpoint['path']).parent.parent.name} step {checkpoint['step']}".lstrip()


def _told(row: dict[str, Any]) -> bool:
    return row["verdict"] in ("worse", "better")


def _left_out(pairs: int) -> list[str]:
    text = (
        f"Not shown: {pairs} pairs of arms that are not told apart (all are in compare.json and"
        " report.html). Ask for some alone by --pairs A:B, and their tests are sharper."
    )
    return textwrap.wrap(text, WIDTH) if pairs else []


def _cast_lines(casts: list[dict[str, Any]]) -> list[str]:
    """The checkpoints' own weights under every recipe: loss gap and KL to the baseline."""
    if not casts:
        return []
    rows = [
        (row["recipe"], *(_with_error(row[name], form) for name, form in CAST_COLUMNS.items()))
        for row in casts
    ]
    about = (
        f"Casts: the checkpoints' weights evaluated under each recipe on {casts[0]['windows']}"
        f" windows, means over {casts[0]['checkpoints']} checkpoints; s.e. over {casts[0]['by']};"
        " KL(baseline || cast) of FP32 logits, nats per token."
    )
    head = ("recipe", "cast gap ± s.e.", "KL ± s.e.")
    return ["", *textwrap.wrap(about, WIDTH), "", *aligned([head, *rows], left=(0,))]


def _with_error(found: dict[str, Any], form: str) -> str:
    error = found["standard_error"]
    return f"{found['mean']:{form}}" + ("" if error is None else f" ± {error:{form[-3:]}}")


def _name(row: dict[str, Any]) -> str:
    return str(row["label"]) + (" (control)" if row["control"] else "")


def _cells(row: dict[str, Any]) -> list[str]:
    error = "-" if row["standard_error"] is None else f"{row['standard_error']:.5f}"
    return [
        signed(row["mean"]), error, between(row), between(row["like_these"]), str(row["units"]),
        str(row["diverged"]), row["verdict"] + tests(row),
    ]  # fmt: skip


def _checkpoints(row: dict[str, Any]) -> list[str]:
    numbers = (row["checkpoint_means"], row["checkpoint_errors"], row["checkpoint_units"])
    return [
        "-" if mean is None else f"{signed(mean)}{'' if e is None else f' ± {e:.5f}'} ({units})"
        for mean, e, units in zip(*numbers, strict=True)
    ]


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.5f}"


def between(row: dict[str, Any]) -> str:
    return "-" if row["low"] is None else f"{signed(row['low'])} to {signed(row['high'])}"


def together(row: dict[str, Any]) -> str:
    """The interval that holds with those of all other rows, where it is another."""
    found = row.get("simultaneous")
    return f"; {row['rows']} rows together {found[0]:+.5f} to {found[1]:+.5f}" if found else ""


def tests(row: dict[str, Any]) -> str:
    """What stands beside a verdict: what could have been seen, and other tests of the same gaps."""
    parts = []
    if row.get("detectable") is not None:
        parts.append(f"sees {row['detectable']:.2g} (80 %)")
    if row.get("p_holm") is not None:
        parts.append(f"p = {row['p_holm']:.2g} (Holm)")
    if row.get("p_sign_flip") is not None:
        parts.append(f"sign-flip p = {row['p_sign_flip']:.2g}")
    if row.get("equivalence"):
        parts.append(row["equivalence"])
    return "".join(f"; {part}" for part in parts)
