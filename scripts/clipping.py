"""The clipping ablation by branches, and its mechanism: tables of docs/reproduction.md.

usage: python scripts/clipping.py SWEEP [--into PAGE.md] [--windows 4]
  SWEEP with compare/compare.json and branches: losses and shifts of the arms of
  configs/sweep/clipping.yaml that they have; biases of the operands at their first checkpoint
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ladder import table, verdict
from torch import Tensor, nn

from lowbit import BlockFormat, fake_quantize
from lowbit.recipe import OPERANDS, ROLES
from train.compare.branch_table import between
from train.config.layers import spelt_out
from train.config.policies import read_policy
from train.config.strict_yaml import read_yaml
from train.subjects.models import load_subject
from train.subjects.text import read_text

BEGIN, END = "<!-- clipping -->", "<!-- /clipping -->"
SUFFIXES = {"32": "", "128": "_128", "row": "_row"}
KINDS = ("asymmetric", "symmetric")
Biases = dict[tuple[str, str], list[float]]  #: (arm, operand) -> of each layer


def label(kind: str, block: str) -> str:
    return f"mxint8_{kind}_bf16{SUFFIXES[block]}"


def effect_table(found: dict[str, Any]) -> list[str]:
    """[-128, 127] minus [-127, 127] after the branches' steps: loss, and where the weights went."""
    pairs = {(row["a"], row["b"]): row for row in found["pairs"]}
    rows = []
    for block in SUFFIXES:
        row = pairs.get((label("symmetric", block), label("asymmetric", block)))
        if row is None or not row["units"]:
            continue
        gap, shift = (f"{one['mean']:{form}} ± {one['standard_error']:{form[1:]}}"
                      if one["standard_error"] else "-"
                      for one, form in ((row, "+.5f"), (row["weight_shift"], "+.1e")))  # fmt: skip
        moved = row["weight_shift"]
        bounds = "-" if moved["low"] is None else f"{moved['low']:+.1e} to {moved['high']:+.1e}"
        rows.append((block, str(row["units"]), gap, between(row), verdict(row), shift, bounds))
    head = ("block", "branches", f"loss, {found['horizon']} steps", "95 %, these checkpoints",
            "answer", "shift of the weights", "95 %")  # fmt: skip
    return table(head, rows)


def bias_table(biases: Biases) -> list[str]:
    """Signed bias mean(q - x) / mean |x|, asymmetric and symmetric, mean over the layers ± s.e."""
    rows = []
    for operand in OPERANDS:
        cells = []
        for block in SUFFIXES:
            both = [_with_error(biases[label(kind, block), operand]) for kind in KINDS]
            cells.append(" / ".join(both))
        rows.append((f"`{operand}`", *cells))
    return table(("operand", *(f"block {block}" for block in SUFFIXES)), rows)


def _with_error(values: list[float]) -> str:
    return f"{np.mean(values):+.1e} ± {np.std(values, ddof=1) / len(values) ** 0.5:.0e}"


def formats() -> dict[str, BlockFormat]:
    """By arm: one for all six operands."""
    folder = Path(__file__).parents[1]
    paths = read_yaml(folder / "configs/sweep/clipping.yaml")["recipes"][1:]
    found = {}
    for path in paths:
        policy = read_policy(spelt_out(read_yaml(folder / path)["model"]["policy"]))
        (found[policy.name],) = {policy.recipe.format(operand) for operand in OPERANDS}
    return {name: format for name, format in found.items() if format}


class Observer:
    """Biases of what flows through the blocks' linear layers, in BF16 as their products take it."""

    def __init__(self, model: nn.Module) -> None:
        self.formats, self.sums = formats(), defaultdict[tuple[str, str, str], Any](lambda: 0.0)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.register_forward_pre_hook(self._hook(name, "input"))
                layer.register_full_backward_hook(self._hook(name, "grad_output"))
                self.add(name, "weight", layer.weight)

    def _hook(self, name: str, tensor: str) -> Callable[..., None]:
        def hook(module: nn.Module, *values: Any) -> None:
            self.add(name, tensor, values[-1][0])

        return hook

    def add(self, name: str, tensor: str, x: Tensor) -> None:
        """Both operands that are made of it."""
        x = x.detach().bfloat16().reshape(-1, x.shape[-1])
        for role in (role for role in ROLES.values() if role.tensor == tensor):
            for arm, format in self.formats.items():
                error = (fake_quantize(x, format, role.axis).double() - x.double()).sum()
                sums = torch.stack([error, x.double().abs().sum()])
                self.sums[arm, role.name, name] = self.sums[arm, role.name, name] + sums

    def biases(self) -> Biases:
        found: Biases = defaultdict(list)
        for (arm, operand, _), (error, size) in self.sums.items():
            found[arm, operand].append(float(error / size))
        return found


def measure(checkpoint: str, windows: int) -> Biases:
    """One forward and backward pass over windows of the validation split, in BF16 autocast."""
    subject = load_subject(checkpoint, Path(".cache"))
    wanted = {"windows": windows, "seq_len": 256, "text": None, "tokenizer": None}
    text = read_text(subject, argparse.Namespace(**wanted))
    model: Any = subject.model
    observer = Observer(model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=text.inputs, use_cache=False).logits
    F.cross_entropy(logits.float().flatten(0, 1), text.labels.flatten()).backward()  # type: ignore[no-untyped-call]
    return observer.biases()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--into", type=Path, metavar="PAGE.md")
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    found = json.loads((args.sweep / "compare" / "compare.json").read_text(encoding="utf-8"))
    lines: list[str] = []
    for one in found["branches"]:
        if any(row["label"] == label("asymmetric", "32") for row in one["rows"]):
            lines += [*effect_table(one), ""]
    checkpoint = found["branches"][0]["checkpoints"][0]["path"]
    lines += [*bias_table(measure(checkpoint, args.windows)), ""]
    print("\n".join(lines))
    if args.into:
        before, _, rest = args.into.read_text(encoding="utf-8").partition(BEGIN)
        text = "\n".join([BEGIN, "", *lines, END])
        args.into.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
