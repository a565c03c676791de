"""`lowbit analyze`: QSNR and crest factors of the operands of a model's linear layers."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.definition.rotation import SIZES
from lowbit.recipe import OPERANDS
from train.analysis.formats import BLOCK_SCALED, PAIRS, formats_called
from train.analysis.operands import CREST_BLOCKS, Findings, Look, observe
from train.config.notation import HELP as HELP_FORMAT
from train.microscope.layers import chosen_linears, other_weights
from train.output.files import write_csv, write_json, write_page
from train.output.tables import table
from train.runs.folders import check_results_folder
from train.subjects.models import HELP, Subject, load_subject
from train.subjects.text import Text, add_text_arguments, read_text

Rows = list[dict[str, Any]]
UNBIASEDNESS = "1/B test: |mean of B gradients - g|² / |g|², mean over layers, slope -1 if unbiased"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument("model", metavar="MODEL", help=HELP)
    parser.add_argument(
        "--formats", nargs="+", default=list(BLOCK_SCALED), metavar="FORMAT",
        help=f"each {HELP_FORMAT} (default: all named MX and NV formats)",
    )  # fmt: skip
    parser.add_argument(
        "--rotations", nargs="+", default=["none"], metavar="SIZE",
        help="Hadamard rotations to look through: none, block (of each format), 16, 32, 64, 128",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", default=["*layers*"], metavar="GLOB",
        help="linear layers by name (default: %(default)s, that is all but the head)",
    )  # fmt: skip
    parser.add_argument(
        "--unbiasedness", type=int, metavar="B",
        help="the 1/B test of both gradients of every layer besides: B draws, a power of two; each"
        " draw costs a backward pass of the layer and format, so choose few of them",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("analyze"), help="folder to write")
    add_text_arguments(parser, windows=1, seq_len=2048)


def run(args: argparse.Namespace) -> int:
    """Look at every operand; print and write what was found."""
    check_results_folder(args.out)
    for rotation in args.rotations:
        if rotation not in ("none", "block", *map(str, SIZES)):
            raise ValueError(f"--rotations {rotation}: none, block or one of {SIZES}")
    look = Look(tuple(formats_called(args.formats)), tuple(dict.fromkeys(args.rotations)))
    if "block" in look.rotations and any(f.block_size == -1 for f in look.formats):
        raise ValueError("--rotations block: a format of whole rows has no block size")
    draws = args.unbiasedness
    if draws is not None and (draws < 2 or draws & (draws - 1)):
        raise ValueError(f"--unbiasedness {draws}: a power of two, at least 2")
    subject = load_subject(args.model, args.cache)
    left = other_weights(subject.model, chosen_linears(subject.model, args.layers).values())
    text = read_text(subject, args)
    found = observe(subject.model, text, look, args.layers)
    layers = len({row["layer"] for row in found.qsnr})
    protocol = [
        f"model: {subject.source}, FP32, unquantized forward and backward pass",
        f"text: {text.source}; {args.windows} window(s) x {args.seq_len} tokens, loss"
        f" {found.loss:.4f} nats per token",
        f"{layers} linear layers ({' '.join(args.layers)}) x 6 operands, each along its own GEMM's"
        " contraction axis; QSNR over a whole tensor, crest factor = mean over its blocks",
        *([f"not looked at: {left}"] if left else []),
    ]
    tables = summaries(found)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [] if draws is None else _test_unbiasedness(args, subject, text, look, tables)
    write_csv(found.qsnr, args.out / "qsnr.csv")
    write_csv(found.crest, args.out / "crest.csv")
    write_json({"protocol": protocol, "tables": tables}, args.out / "analyze.json")
    from train.analysis.analyze_plot import plot_heat, plot_scatter

    pictures = [plot_scatter(found, look, args.out), plot_heat(found, look, args.out), *pictures]
    parts: list[Any] = [*protocol]
    print("\n".join(protocol))
    for title, rows in tables.items():
        parts += [title, rows]
        print(f"\n{title}\n\n{table(rows)}")
    write_page("Operands under block formats", [*parts, *pictures], args.out / "analyze.html")
    print(f"\nwritten: {args.out}/analyze.html .json, qsnr.csv, crest.csv, figures")
    return 0


def _test_unbiasedness(
    args: argparse.Namespace, subject: Subject, text: Text, look: Look, tables: dict[str, Rows]
) -> list[Path]:
    """Adds its table; the picture."""
    from train.analysis.unbiasedness import plot_unbiasedness, unbiasedness, verdicts

    rows = unbiasedness(subject.model, text, look.formats, args.layers, args.unbiasedness)
    tables[f"{UNBIASEDNESS}, {args.unbiasedness} draws"] = verdicts(rows)
    write_csv(rows, args.out / "unbiasedness.csv")
    return [plot_unbiasedness(rows, args.out)]


def summaries(found: Findings) -> dict[str, Rows]:
    """Tables by title; those without rows are left out."""
    tables = {
        "Crest factor: quartiles over tensors (INT-v-FP study: Q3 at block 32 is 2.96)":
            crest_table(found.crest),
        "Integer against float: mean QSNR in dB, share of tensors where the integer wins":
            win_table(found.qsnr),
        "Mean QSNR in dB by operand": mean_table(found.qsnr, "operand"),
        "Mean QSNR in dB by layer type": mean_table(found.qsnr, "type"),
        "Mean QSNR in dB by depth": mean_table(found.qsnr, "depth"),
    }  # fmt: skip
    return {title: rows for title, rows in tables.items() if rows}


def crest_table(rows: Rows) -> Rows:
    """Quartiles of the crest factors, by rotation and block size."""
    table = []
    for rotation in _distinct(rows, "rotation"):
        for block in CREST_BLOCKS:
            same = (r for r in rows if r["rotation"] == rotation and r["block"] == block)
            values = np.nanquantile([r["crest"] for r in same], [0, 0.25, 0.5, 0.75, 1])
            names = ("min", "Q1", "median", "Q3", "max")
            quartiles = dict(zip(names, (round(float(v), 2) for v in values), strict=True))
            table.append({"rotation": rotation, "block": str(block), **quartiles})
    return table


def win_table(rows: Rows) -> Rows:
    """By pair of formats: how often the integer one has the higher QSNR."""
    table = []
    for rotation in _distinct(rows, "rotation"):
        for pair in PAIRS:
            ours, theirs = (_values(rows, rotation=rotation, format=name) for name in pair)
            if len(ours) and len(theirs):
                table.append(
                    {
                        "rotation": rotation, "pair": " / ".join(pair), "tensors": len(ours),
                        "integer": round(float(np.nanmean(ours)), 2),
                        "float": round(float(np.nanmean(theirs)), 2),
                        "integer wins %": round(100 * float(np.mean(ours > theirs)), 1),
                    }
                )  # fmt: skip
    return table


def mean_table(rows: Rows, key: str) -> Rows:
    """One row a value of `key` and rotation, one column a format."""
    values = [o for o in OPERANDS if o in _distinct(rows, key)] or _distinct(rows, key)
    table = []
    for rotation in _distinct(rows, "rotation"):
        for value in values:
            means = {
                format: round(float(np.nanmean(own)), 2)
                for format in _distinct(rows, "format")
                if len(own := _values(rows, rotation=rotation, format=format, **{key: value}))
            }
            table.append({key: str(value), "rotation": rotation, **means})
    return table


def _values(rows: Rows, **where: Any) -> np.ndarray:
    """QSNR of the rows with these fields, in their order."""
    return np.array([r["qsnr_db"] for r in rows if all(r[k] == v for k, v in where.items())])


def _distinct(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    found: Iterable[Any] = (row[key] for row in rows)
    return list(dict.fromkeys(found))
