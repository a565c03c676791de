"""Aligned text, for terminals; it imports nothing heavy."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """The columns `left` to the left, for words; the others, for numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'<' if i in left else '>'}{w}}}" for i, w in enumerate(widths))
    return [form.format(*row).rstrip() for row in rows]


def table(rows: Sequence[Row]) -> str:
    """With the keys of the first row as its head; words to the left, numbers to the right."""
    head = list(rows[0])
    words = [i for i, key in enumerate(head) if isinstance(rows[0][key], str)]
    return "\n".join(aligned([head, *([cell(row[key]) for key in head] for row in rows)], words))


def printable(text: str) -> str:
    """What a name of others holds of control characters is spelt, not sent to the terminal.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


def cell(value: Any) -> str:
    """A number with four significant digits or more, anything else as it is."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"
    return "-" if value is None else str(value)
