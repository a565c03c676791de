"""`lowbit formats`: the table of block formats, and the values an element can hold."""

import argparse
import importlib.util
import math
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from train.config.notation import HELP, plain_format
from train.output.tables import aligned

if TYPE_CHECKING:
    from lowbit.formats import BlockFormat

HEADER = ("format", "element", "bits/value", "max", "min", "block", "scale", "scale rules")
NOTES = (
    "bits/value includes the block's scale (not the FP32 scale per tensor or row); max and min: "
    "largest and smallest positive element, in units of the scale; block: values along the "
    "contraction axis, any size or 2-D for weights by block_size; scale rules: the format's "
    "first; best is every scale's but fp32's. "
    "Names spell other formats: mxint5, nve3m2, e2m1_ue5m3, mxint8_b16."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "formats", nargs="*", metavar="FORMAT", help=f"these alone, with their values: each {HELP}"
    )
    parser.add_argument(
        "--values", metavar="FORMAT", help="list the values of this format's elements instead"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or the values."""
    formats = _formats()
    if args.values is not None:
        print(_values(formats.block_format(plain_format(args.values))))
        return 0
    wanted = [formats.block_format(plain_format(written)) for written in args.formats]
    rows = [
        HEADER,
        *(_row(f, formats.rules_of(f.scale, f.element)) for f in wanted or formats.NAMED.values()),
    ]
    print("\n".join(aligned(rows, left=range(len(HEADER)))))
    for format in wanted:
        print(f"\n{_values(format)}")
    aliases = ", ".join(f"{alias} = {format}" for alias, format in formats.ALIASES.items())
    print(f"\n{textwrap.fill(f'Also: {aliases}. {NOTES}', 100)}")
    return 0


def _formats() -> ModuleType:
    """lowbit.formats without its package, which imports torch and takes seconds."""
    if "lowbit" in sys.modules:
        return importlib.import_module("lowbit.formats")
    package = importlib.util.find_spec("lowbit")
    assert package is not None
    bare = ModuleType("lowbit")
    bare.__path__ = list(package.submodule_search_locations or ())
    sys.modules["lowbit"] = bare
    try:
        return importlib.import_module("lowbit.formats")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "lowbit"]:
            del sys.modules[name]


def _power_of_two(value: float) -> str:
    return f"{value:g}" if value > 0.01 else f"2^{math.log2(value):.0f}"


def _row(format: "BlockFormat", rules: Sequence[Any]) -> tuple[str, ...]:
    default = getattr(format.scale_rule, "value", "nearest")
    others = [rule.value for rule in rules[:4] if rule.value != default]  # `best`: in the notes
    size = format.block_size
    second = f" + fp32 per {format.outer.value}" if format.outer.value != "none" else ""
    return (
        str(format),
        format.element.label,
        f"{format.bits_per_value:g}",
        f"{format.element.max:g}",
        _power_of_two(format.element.smallest),
        "row" if size == -1 else "x".join(map(str, size if isinstance(size, tuple) else (size,))),
        format.scale.value + second,
        ", ".join([default, *others]) if others else "-",
    )


def _values(format: "BlockFormat") -> str:
    values = sorted({value + 0.0 for value in format.element.values})  # one zero
    shown = textwrap.fill(" ".join(f"{value:.15g}" for value in values), 100)
    return (
        f"{format}: {format.element.label}, {len(values)} values, times the block's scale\n{shown}"
    )
