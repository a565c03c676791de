"""`lowbit formats`: the table of block formats, and the values an element can hold."""

import argparse
import importlib.util
import math
import textwrap
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from train.output.tables import aligned

if TYPE_CHECKING:
    from lowbit.formats import BlockFormat

HEADER = ("format", "element", "bits/value", "max", "min", "block", "scale", "scale rules")
NOTES = (
    "bits/value includes the block's scale (not the FP32 scale per tensor or row); max and min: "
    "largest and smallest positive element, in units of the scale; block: values along the "
    "contraction axis, any size or 2-D for weights by block_size; scale rules: the default first."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "--values", metavar="NAME", help="list the values of this format's elements instead"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, or the values."""
    formats = _formats()
    if args.values is not None:
        print(_values(formats.block_format(args.values)))
        return 0
    rules = [rule.value for rule in formats.ScaleRule]
    rows = [HEADER, *(_row(format, rules) for format in formats.NAMED.values())]
    print("\n".join(aligned(rows, left=range(len(HEADER)))))
    aliases = ", ".join(f"{alias} = {format}" for alias, format in formats.ALIASES.items())
    print(f"\n{textwrap.fill(f'Also: {aliases}. {NOTES}', 100)}")
    return 0


def _formats() -> ModuleType:
    """lowbit.formats alone: importing its package imports torch, which takes seconds."""
    package = importlib.util.find_spec("lowbit")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("formats.py")
    spec = importlib.util.spec_from_file_location("lowbit_formats", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _element(format: "BlockFormat") -> str:
    exponent_bits = getattr(format.element, "exponent_bits", None)
    if exponent_bits is None:
        return f"int{format.element.bits}"
    return f"e{exponent_bits}m{format.element.mantissa_bits}"


def _power_of_two(value: float) -> str:
    return f"{value:g}" if value > 0.01 else f"2^{math.log2(value):.0f}"


def _row(format: "BlockFormat", rules: list[str]) -> tuple[str, ...]:
    default = format.scale_rule and format.scale_rule.value
    others = [rule for rule in rules if rule != default]
    second = {"e4m3": " + fp32 per tensor"}.get(format.scale.value, "")
    return (
        format.name,
        _element(format),
        f"{format.bits_per_value:g}",
        f"{format.element.max:g}",
        _power_of_two(format.element.smallest),
        "row" if format.block_size == -1 else str(format.block_size),
        format.scale.value + second,
        ", ".join([default, *others]) if default else "-",
    )


def _values(format: "BlockFormat") -> str:
    values = sorted({value + 0.0 for value in format.element.values})  # one zero
    shown = textwrap.fill(" ".join(f"{value:.15g}" for value in values), 100)
    return f"{format}: {_element(format)}, {len(values)} values, times the block's scale\n{shown}"
