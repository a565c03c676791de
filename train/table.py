"""What `lowbit compare` prints: the table, the verdicts and what to know about them."""

import textwrap
from collections.abc import Collection, Sequence
from typing import Any

COLUMNS = (
    "recipe|seed|status|val loss|perplexity|train loss|gap|max gap|cast gap ± s.e.|tokens/s"
).split("|")
WIDTH = 100


def terminal(result: dict[str, Any]) -> str:
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
        *(sentence(pair) for pair in [*against, *rest]),
        *([""] if result["pairs"] else []),
        *(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text in prose),
    ]
    return "\n".join(lines).rstrip()


def sentence(pair: dict[str, Any]) -> str:
    text: str = f"{pair['b']} against {pair['a']}: "
    if pair["mean"] is not None:
        text += f"gap {pair['mean']:+.5f} after {pair['tokens']:,} tokens"
        if pair["low"] is not None:
            text += f" (95 % interval {pair['low']:+.5f} to {pair['high']:+.5f}, "
            text += f"{len(pair['seeds'])} paired seeds)"
        text += "; "
    text += pair["verdict"]
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
        f"{cast['mean']:+.5f} ± {cast['standard_error']:.5f}" if cast else "-",
        number("tokens_per_second", ",.0f"),
    ]  # fmt: skip


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The columns `left` to the left, for words; the others, for numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i in left else '>'}{w}}}" for i, w in enumerate(widths))
    return [form.format(*row).rstrip() for row in rows]
