"""`lowbit search`: formats of a bit budget, ranked on a model's operands or random numbers."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowbit import BlockFormat, QuantRecipe, fake_quantize
from lowbit.formats import NAMED
from train.analysis.evaluate import castable
from train.analysis.operands import Look, Observer, backward_pass
from train.analysis.scores import evaluate
from train.analysis.search_grid import GRID, grid, of_a_sample
from train.analysis.theory import DISTRIBUTIONS, samples
from train.output.files import write_csv, write_json
from train.output.tables import table
from train.runs.folders import check_results_folder
from train.subjects.models import HELP, load_subject
from train.subjects.text import Text, add_text_arguments, read_text

Row = dict[str, Any]
SAMPLE, SEGMENT = 2**14, 128  # values of a tensor; of them in a row, along the contraction
TOGETHER = 64  # tensors, whose values lie in the cache of no CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "subject", metavar="SUBJECT", help=f"{', '.join(DISTRIBUTIONS)}; or a model: {HELP}"
    )
    parser.add_argument(
        "--bits", type=float, default=4.5, help="a value, scale included (default: %(default)s)"
    )
    parser.add_argument(
        "--top", type=int, default=3, metavar="N",
        help="of a model: KL of casting it into the N best and the named (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of random numbers")
    parser.add_argument(
        "--layers", nargs="+", default=["*layers*"], metavar="GLOB", help="linear layers by name"
    )
    parser.add_argument("--out", type=Path, default=Path("search"), help="folder; goes on in it")
    add_text_arguments(parser, windows=1, seq_len=512)


def run(args: argparse.Namespace) -> int:
    """Measure every format of the grid, those that the folder lacks; print and draw the best."""
    check_results_folder(args.out)
    formats = grid(args.bits)
    if len(formats) <= len(NAMED) or args.top < 0:
        raise ValueError(f"--bits {args.bits} --top {args.top}: 2 to 10, and 0 or more")
    model, text, tensors, source = _subject(args)
    settings = {
        "grid": GRID, "bits": args.bits, "subject": source, "sample": [SAMPLE, SEGMENT],
        "data": hashlib.sha256(tensors.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    store = _Store(args.out, settings)
    for format in tqdm(formats, desc="formats", unit="format"):
        if str(format) not in store.rows:
            store.add(measured(format, tensors))
    rows = sorted(store.rows.values(), key=lambda row: -row["qsnr_db"])
    mark_front(rows)
    if model is not None and text is not None and args.top:
        fit = {str(format): format for format in formats if _divides(format, model)}
        best = _best([row for row in rows if row["format"] in fit], args)
        _casts(model, text, [fit[name] for name in best], rows)
    write_csv(rows, args.out / "search.csv")
    from train.analysis.search_plot import plot

    plot(rows, args.bits, source, args.out)
    print("\n".join(_report(rows, args, source, tensors)))
    return 0


def measured(format: BlockFormat, tensors: Tensor) -> Row:
    """QSNR of each tensor's sample [tensors, values], in dB: mean, and the lowest tenth."""
    errors = []
    for part in torch.split(tensors, TOGETHER):
        noise = (part - fake_quantize(part, of_a_sample(format), 1)).double().square().sum(1)
        errors.append(-10 * torch.log10(noise / part.double().square().sum(1)))
    found = torch.cat(errors)
    found = found[found.isfinite()]
    return {
        "format": str(format), "bits": format.bits_per_value, "qsnr_db": float(found.mean()),
        "p10_db": float(found.quantile(0.1)),
    }  # fmt: skip


def mark_front(rows: Sequence[Row]) -> None:
    """`pareto`: no other has as few bits and more dB, or fewer bits and as many dB."""
    for row in rows:
        row["pareto"] = not any(
            other["bits"] <= row["bits"] and other["qsnr_db"] >= row["qsnr_db"]
            and (other["bits"], other["qsnr_db"]) != (row["bits"], row["qsnr_db"])
            for other in rows
        )  # fmt: skip


class _Store:
    """Rows by format, each kept in the folder as soon as it is known."""

    def __init__(self, out: Path, settings: Row) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        self._path = out / "search.jsonl"
        if (out / "search.json").is_file():
            before = json.loads((out / "search.json").read_text())["search"]
            if other := [k for k in settings if before.get(k) != settings[k]]:
                raise ValueError(f"{out} holds a search of another {other[0]}, give another --out")
            for line in self._path.read_text().splitlines() if self._path.is_file() else ():
                try:
                    row = json.loads(line)
                except ValueError:  # cut short when it was stopped
                    continue
                self.rows[row["format"]] = row
        write_json({"search": settings}, out / "search.json")
        text = "".join(json.dumps(row) + "\n" for row in self.rows.values())
        self._path.write_text(text)

    def add(self, row: Row) -> None:
        self.rows[row["format"]] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class _Sampler(Observer):
    """Keeps some values of each operand, in rows along its contraction axis."""

    def __init__(self, model: nn.Module, patterns: Sequence[str]) -> None:
        super().__init__(model, Look(()), patterns)
        self.kept: list[Tensor] = []

    def _look(self, x: Tensor, dim: int) -> Tensor:
        lines = x.detach().float() if dim == 1 else x.detach().float().t()
        if lines.shape[1] < SEGMENT:
            raise ValueError(f"{SEGMENT} values in a row are wanted, an operand has {x.shape[dim]}")
        lines = lines[:, : lines.shape[1] // SEGMENT * SEGMENT].reshape(-1, SEGMENT)
        count = min(SAMPLE // SEGMENT, len(lines))
        return lines[torch.arange(count) * len(lines) // count].flatten()

    def _record(self, name: str, operand: str, found: Any) -> None:
        if len(found) == SAMPLE:
            self.kept.append(found)


def _subject(args: argparse.Namespace) -> tuple[nn.Module | None, Text | None, Tensor, str]:
    """The model and its text, if it is one; [tensors, SAMPLE] values; what they are."""
    if args.subject in DISTRIBUTIONS:
        tensors = samples(args.subject, 64 * SAMPLE, args.seed).reshape(-1, SAMPLE)
        return None, None, tensors, f"{args.subject}, seed {args.seed}"
    subject = load_subject(args.subject, args.cache)
    text = read_text(subject, args)
    sampler = _Sampler(subject.model, args.layers)
    try:
        backward_pass(subject.model, text)
    finally:
        sampler.remove()
    sampler.look_at_weights()
    if not sampler.kept:
        raise ValueError(f"no operand of {args.subject} has {SAMPLE} values")
    source = f"operands of {subject.source}; {text.source}, {args.windows} x {args.seq_len}"
    return subject.model, text, torch.stack(sampler.kept), source


def _divides(format: BlockFormat, model: nn.Module) -> bool:
    """Whether its blocks divide the inputs of all layers: others cannot be cast into it."""
    size = format.block_size
    assert isinstance(size, int)
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    return all(layer.in_features % size == 0 for layer in layers)


def _best(rows: Sequence[Row], args: argparse.Namespace) -> list[str]:
    """The first of `rows` within the budget, and the named ones near it."""
    best = [r["format"] for r in rows if r["bits"] <= args.bits][: args.top]
    near = [
        r["format"] for r in rows if r["format"] in NAMED and args.bits - 1 < r["bits"] <= args.bits
    ]
    return list(dict.fromkeys([*best, *near]))


def _casts(
    model: nn.Module, text: Text, formats: Sequence[BlockFormat], rows: Sequence[Row]
) -> None:
    """Adds the KL of casting the forward pass into each."""
    recipes = {str(f): QuantRecipe(fprop_input=f, fprop_weight=f) for f in formats}
    model, _ = castable(model, "the model", ["lm_head"])
    scores = evaluate(model, {"bf16": QuantRecipe(), **recipes}, text)
    for row in rows:
        kl = scores[row["format"]].kl if row["format"] in recipes else None
        row["KL"] = kl and sum(kl) / len(kl)


def _report(rows: Sequence[Row], args: argparse.Namespace, source: str, x: Tensor) -> list[str]:
    names = _best(rows, args)
    best = [row for row in rows if row["pareto"] or row["format"] in names or row.get("KL")]
    shown = [
        {
            "format": row["format"], "bits/value": row["bits"], "QSNR dB": round(row["qsnr_db"], 2),
            "lowest tenth": round(row["p10_db"], 2), "KL": row.get("KL"),
            "Pareto": "*" if row["pareto"] else "",
        }
        for row in best
    ]  # fmt: skip
    return [
        f"{len(rows)} formats on {source}: mean QSNR over {len(x)} tensors, {SAMPLE} values of each"
        f" in rows of {SEGMENT} along the contraction; a tensor's scale is that of its sample",
        f"grid: {GRID}; of them those of {args.bits - 1:g} to {args.bits:g} bits, and all named",
        "KL: of the best and the named ones whose blocks divide the layers' inputs",
        "", table(shown), "", f"written: {args.out}/search.csv .json .png .svg",
    ]  # fmt: skip
