"""What `lowbit compare` prints: the table, the verdicts and what to know about them."""

import textwrap
from collections.abc import Sequence
from typing import Any

from train.compare.branch_table import WIDTH, branch_lines, tests, together
from train.output.tables import aligned

COLUMNS = (
    "recipe|seed|status|val loss|perplexity|train loss|gap|max gap|cast gap ± s.e.|tokens/s"
).split("|")


def terminal(result: dict[str, Any]) -> str:
    """The whole report as text."""
    against = [pair for pair in result["pairs"] if pair["a"] == result["baseline"]]
    rest = [pair for pair in result["pairs"] if pair not in against and pair["low"] is not None]
    about = (
        f"Baseline {result['baseline']}. Losses in nats per token; gap: val loss minus that of the"
        " baseline at matched tokens, the last and the largest; train loss smoothed (EMA"
        f" {result['smoothing']} per step); tokens/s: median over the steps."
    )
    prose = [*(f"Allowed: {text}" for text in result["allowed"]), *result["notes"]]
    prose += [result["rule"]] if result["pairs"] else []
    lines = [
        textwrap.fill(about, WIDTH),
        "",
        *aligned([COLUMNS, *(_cells(row) for row in result["runs"])], left=(0, 2)),
        "",
        *_behaviour(result),
        "",
        *(wrapped(sentence(pair)) for pair in [*against, *rest]),
        *([""] if result["pairs"] else []),
        *(line for found in result["branches"] for line in [*branch_lines(found), ""]),
        *(wrapped(text) for text in prose),
    ]
    return "\n".join(lines).rstrip()


def wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")


def _behaviour(result: dict[str, Any]) -> list[str]:
    """Tokens to the target, spikes, gradient norms, and the casts' KL."""
    target = result["target"]
    columns = (*("recipe", "seed", "tokens to target", "spikes", "grad norm", "trend", "cast KL"),)
    rows = []
    for row in result["runs"]:
        cast = row["cast_gap"] or {}
        values = ("tokens_to_target", ",.0f"), ("spikes", "d"), ("grad_norm", ".3f")
        cells = ["-" if row[key] is None else f"{row[key]:{form}}" for key, form in values]
        cells[0] = "<= " * row["tokens_to_target_at_most"] + cells[0]
        trend = "-" if row["grad_norm_trend"] is None else f"× {row['grad_norm_trend']:.2f}"
        kl = "-" if cast.get("kl") is None else f"{cast['kl']:.2e}"
        if cast.get("kl_standard_error") is not None:
            kl += f" ± {cast['kl_standard_error']:.0e}"
        rows.append([row["label"], str(row["seed"]), *cells, trend, kl])
    about = (
        f"Target: val loss {target:.4f}, the lowest that all runs reached (but those that failed or"
        " diverged). "
        if target is not None
        else ""
    )
    about += (
        "Spikes: as `lowbit fit` reports them. Grad norm: median of the last tenth of the steps;"
        " trend: over that at mid-run. Cast KL: nats per token ± s.e."
    )
    about += _floor(result["runs"])
    return [*aligned([columns, *rows], left=(0,)), "", textwrap.fill(about, WIDTH)]


def _floor(rows: Sequence[dict[str, Any]]) -> str:
    """What the casts' KL is beside: the same weights moved by a millionth."""
    casts = [row["cast_gap"] for row in rows if row["cast_gap"]]
    floors = [cast["kl_floor"] for cast in casts if cast.get("kl_floor") is not None]
    ways = ", ".join(dict.fromkeys(c["arithmetic"] for c in casts if c.get("kl") is not None))
    text = f" ({ways})." if ways else ""
    if floors:
        text += " Its floor, the baseline against itself with weights moved by 1e-6:"
        text += f" {', '.join(dict.fromkeys(f'{floor:.0e}' for floor in floors))}."
    return text


def sentence(pair: dict[str, Any]) -> str:
    """What is known of a pair."""
    text: str = f"{pair.get('b_name', pair['b'])} against {pair.get('a_name', pair['a'])}: "
    if pair["mean"] is not None:
        text += f"gap {pair['mean']:+.5f} after {pair['tokens']:,} tokens"
        if pair["low"] is not None:
            text += f" (95 % interval {pair['low']:+.5f} to {pair['high']:+.5f}, "
            text += f"{len(pair['seeds'])} paired seeds{together(pair)})"
        elif pair["standard_error"] is not None:
            text += f" ({len(pair['seeds'])} paired seeds)"
        text += "; "
    text += pair["verdict"] + tests(pair)
    if pair.get("differs"):
        text += f"; not by the recipe alone: {', '.join(pair['differs'])} differs too"
    if pair["band"] is not None:
        text += " (train gap band {:+.5f} to {:+.5f})".format(*pair["band"])
    return text


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else f"{row[key]:{form}}"

    status = row["status"] + ("" if row["status"] == "finished" else f" @ step {row['steps']:,}")
    cast = row["cast_gap"]
    return [
        row["label"] + (" (control)" if row["control"] else ""), str(row["seed"]), status,
        number("val_loss", ".4f"), number("perplexity", ",.2f"), number("train_loss", ".4f"),
        number("gap", "+.5f"), number("max_gap", "+.5f"),
        _with_error(cast) if cast else "-",
        number("tokens_per_second", ",.0f"),
    ]  # fmt: skip


def _with_error(cast: dict[str, Any]) -> str:
    error = cast["standard_error"]
    return f"{cast['mean']:+.5f}" + ("" if error is None else f" ± {error:.5f}")
