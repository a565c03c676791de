"""README.md of an exported model: what it was trained with, on what, how it ended, and by whom."""

import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

from lowbit.recipe import OPERANDS
from train.model.recipe_table import compact
from train.runs.metrics import is_empty, read_metrics
from train.runs.record import read_record

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [lowbit]
---

# {recipe}, seed {seed}

A Llama of {parameters:,} parameters, pretrained by `lowbit fit`. The weights are the run's FP32
master weights: a program that loads them computes without quantization. `lowbit.json` holds the
run's identity and the SHA-256 of every file. Documents end with the tokenizer's `eos_token`, which
is also what a text begins after.
"""


def model_card(run_dir: Path) -> str:
    """Of the run in `run_dir`, by its run.json and metrics.csv."""
    record = read_record(run_dir)
    sections = {
        "Recipe": _table(("layers", *OPERANDS), _recipe(record)) + _phases(record),
        "Training": _table(("", ""), [*_training(record)]),
        "Losses": _table(("", "nats per token"), [*_losses(run_dir)]),
        "Commands": "".join(f"    {shlex.join(c)}\n" for c in _commands(record)),
        "Versions": _table(("", ""), [*record["versions"].items(), ("commit", record["commit"])]),
    }
    body = "".join(f"\n## {title}\n\n{text}" for title, text in sections.items())
    return HEAD.format(**record) + body


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def _recipe(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Layers of one recipe together; those that are not listed compute as the baseline does."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in record["recipe_table"]:
        groups[tuple(row[operand] for operand in OPERANDS)].append(row["layer"])
    return [("<br>".join(compact(names)), *formats) for formats, names in groups.items()]


def _phases(record: dict[str, Any]) -> str:
    lines = [
        f"From step {row['first_step']} on: {', '.join(row['gemms']) or 'nothing'} quantized.\n"
        for row in record["phases"]
    ]
    if record["control"]:
        lines.append(f"A control: {record['control']}.\n")
    return "\n" + "".join(lines) if lines else ""


def _training(record: dict[str, Any]) -> list[tuple[str, Any]]:
    data = record["data"]
    batch = data["global_batch_size"], data["seq_len"]
    products = record.get("bf16_products", "native")
    return [
        ("data fingerprint", f"`{data['fingerprint']}`"),
        ("identity", f"`{record['identity']['hash']}`"),
        ("initial weights", f"`{record['initial_weights']}`"),
        ("steps", record["max_steps"]),
        ("batch", f"{batch[0]} windows of {batch[1]} tokens"),
        ("tokens seen", record["max_steps"] * batch[0] * batch[1]),
        (
            "precision",
            f"{record['precision']}, BF16 products {products}",
        ),
        ("backend", ", ".join(record["backend"])),
    ]


def _losses(run_dir: Path) -> list[tuple[str, float]]:
    """The last of each kind, at full precision."""
    metrics = read_metrics(run_dir / "metrics.csv", "running")
    names = ("train/loss", "val/loss", "val/loss_bf16")
    kept = {n: metrics[n][~is_empty(metrics[n])] for n in names if n in metrics}
    return [(name, float(values[-1])) for name, values in kept.items() if len(values)]


def _commands(record: dict[str, Any]) -> list[list[str]]:
    """Of every start, each once."""
    found = [start["command"] for start in record["starts"]]
    return [command for i, command in enumerate(found) if command not in found[:i]]
