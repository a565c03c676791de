"""The model card: what was done to which model, what it costs, how to repeat and to read it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.export.layouts import Layout
from train.quantized.model import QuantizedModel


def card(
    model: QuantizedModel, layout: Layout, said: Sequence[str], figures: Path | None, command: str
) -> str:
    """README.md; `figures`: the eval.json that `lowbit eval --out` left."""
    formats = ", ".join(map(str, model.formats))
    activations = {layer.activations for layer in model.layers.values()}
    shown = ", ".join(sorted(str(a or "as they are") for a in activations))
    transforms = ", ".join(f"{t.name} of {t.size}" for t in model.transforms) or "none"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [quantized, lowbit]", "---", "",
        f"# {formats} weights, layout {layout.name}", "",
        f"Made by lowbit from `{model.source}`.", "",
        f"- weights: {formats} in {len(model.layers)} linear layers; kept in BF16: "
        f"{', '.join(model.kept) or 'none'}, embeddings and norms",
        f"- activations: {shown}",
        f"- transform of both operands: {transforms}",
        *(f"- {key}: {_plain(value)}" for key, value in model.method.items()),
        "", "## Readers", "", *(f"- {line}" for line in said), "",
        "## Figures", "", *_figures(figures), "",
        "## Command", "", "```", command, "```", "",
        "`export.json` holds the SHA-256 of every file.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if key != "fingerprints"}
    return json.dumps(value) if isinstance(value, Mapping | list) else str(value)


def _figures(path: Path | None) -> list[str]:
    if path is None:
        return [
            "Not measured here: `lowbit eval THIS_FOLDER --against MODEL --out FOLDER` prints KL "
            "and perplexity with intervals, and `lowbit export --figures FOLDER/eval.json` brings "
            "them here."
        ]
    document = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = document["rows"]
    head = list(rows[0])
    table = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in table), "", *document["protocol"]]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
