"""What each linear layer computes with, and when: for `run.json` and for a person."""

import re
from collections import defaultdict
from typing import Any

from lowbit import LayerPolicy, QuantRecipe
from lowbit.recipe import GEMMS
from train.model.module import PretrainModule


def phase_rows(policy: LayerPolicy, max_steps: int) -> list[dict[str, Any]]:
    """Each phase, with the first `step` of metrics.csv that it governs."""
    return [
        {
            "start": phase.start,
            "first_step": phase.first_step(max_steps) + 1,
            "gemms": list(phase.gemms),
        }
        for phase in policy.phases
    ]


def describe(module: PretrainModule, max_steps: int) -> list[str]:
    """Lines for a person: layers of one recipe together, their blocks as ranges."""
    resolved = module.policy.resolve(module.model)
    parameters = sum(p.numel() for p in module.parameters())
    quantized = [n for n, recipe in resolved.items() if recipe not in (None, QuantRecipe())]
    lines = [
        f"{parameters / 1e6:.1f} M parameters, {len(quantized)} of {len(resolved)} linear layers "
        f"quantized under {module.policy.name}"
    ]
    groups: dict[QuantRecipe, list[str]] = defaultdict(list)
    for name, recipe in resolved.items():
        groups[recipe or QuantRecipe()].append(name)
    for recipe, names in groups.items():
        lines += [f"  {pattern}" for pattern in compact(names)]
        lines += [f"    {line}" for line in _recipe_lines(recipe)]
    for row in phase_rows(module.policy, max_steps):
        kept = ", ".join(row["gemms"]) or "nothing"
        lines.append(f"  from step {row['first_step']} of {max_steps} on: {kept} quantized")
    return lines


def compact(names: list[str]) -> list[str]:
    """Names that differ in block numbers or in the last part share a line.

    >>> compact(["layers.0.mlp.up", "layers.0.mlp.down", "layers.1.mlp.up", "layers.1.mlp.down"])
    ['layers.0-1.mlp.{up,down}']
    """
    blocks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name in names:
        before, number, after = _split(name)
        blocks[before, after].append(number)
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (before, after), numbers in blocks.items():
        parent, _, last = after.rpartition(".")
        place = ".".join(part for part in (before, _ranges(numbers), parent) if part)
        lines[place, parent].append(last)
    return [
        f"{place}.{{{','.join(last)}}}" if len(last) > 1 else f"{place}.{last[0]}".strip(".")
        for (place, _), last in lines.items()
    ]


def _split(name: str) -> tuple[str, int, str]:
    """`layers.3.mlp.up` -> ("layers", 3, "mlp.up"); -1 where there is no number."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else ("", -1, name)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2,5`; nothing for [-1]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = (str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs if r[0] >= 0)
    return ",".join(shown)


def _recipe_lines(recipe: QuantRecipe) -> list[str]:
    table = recipe.table()
    if len(set(table.values())) == 1:
        return [f"all six operands: {table['fprop_input']}"]
    return [
        f"{gemm}: "
        + ", ".join(f"{operand.removeprefix(gemm + '_')} {table[operand]}" for operand in operands)
        for gemm, operands in GEMMS.items()
    ]
