"""What each part of post-training quantization gains: KL to the unquantized model, cell by cell.

    python scripts/ablate_ptq.py runs/ptq --formats mxfp4 nvfp4 mxint4 nvint4 --cells best

Every cell is quantized by `lowbit quantize` on the wiki corpus and evaluated on other windows of
it, weights alone and with quantized inputs. A killed call goes on: cells that are there stay.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit import block_format
from train.analysis.scores import divergences
from train.cli import main
from train.output.tables import table
from train.quantized.layout import StoredModel
from train.quantized.linear import StoredLinear
from train.quantized.overlap import refuse_overlap
from train.stats.intervals import interval
from train.subjects.models import load_subject
from train.subjects.text import read_text


def cells(format: str, which: str) -> dict[str, list[str]]:
    """Flags by the name of a cell."""
    size = str(block_format(format).block_size)
    bases = {"identity": [], "hadamard": ["--transform", "hadamard", "--transform-size", size]}
    observers = {
        "absmax": ["--observer", "minmax"],
        "before": ["--search", "before"],
        "after": [],
    }
    rtn = {"rtn identity absmax": ["--method", "rtn", "--observer", "minmax"]}
    if which == "best":
        best = {"gptq hadamard after": bases["hadamard"]}
        return rtn | best | ({"gptq identity after": []} if format == "nvfp4" else {})
    found = {
        f"{method} {base} {observer}": [*turned, *searched, "--method", method]
        for method in ("rtn", "gptq")
        for base, turned in bases.items()
        for observer, searched in observers.items()
    }
    shifted = {
        f"{name} alpha .25": [*flags, "--alpha", "0.25", "--inputs", "propagated"]
        for name, flags in found.items()
        if name.startswith("gptq")
    }
    return found | shifted


def dithered(model: Any, folder: Path) -> Path:
    """The model off the grid of 4-bit codes that its file has: half a step of noise a weight."""
    if not (folder / "config.json").exists():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                blocks = parameter.data.reshape(-1, 32)
                steps = blocks.sort(1).values.diff(dim=1)
                step = torch.where(steps > 1e-7, steps, torch.inf).amin(1, keepdim=True)
                step = torch.where(step.isfinite(), step, 0.0)
                blocks += step * (torch.rand(blocks.shape, generator=generator) - 0.5)
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def scores(base: nn.Module, stored: StoredModel, windows: Tensor, activations: str) -> list[Any]:
    """KL of each window, weights alone and with inputs in a format."""
    model, found = stored.load(), list[list[float]]()
    layers = [module for module in model.modules() if isinstance(module, StoredLinear)]
    for tokens in windows:
        inputs, labels = tokens[:-1], tokens[1:]
        reference = base(input_ids=inputs[None]).logits[0].double().log_softmax(-1)
        found.append([])
        for format in (None, block_format(activations)):
            for layer in layers:
                layer.activations = format
            logits = model(input_ids=inputs[None]).logits[0]
            found[-1].append(divergences(reference, logits, labels)[1])
    return found


def row(format: str, cell: str, kl: list[list[float]], rtn: list[list[float]]) -> dict[str, Any]:
    """Means, half-widths of their intervals over windows, and the ratio to rounding to nearest."""
    values, base = np.array(kl), np.array(rtn)
    found: dict[str, Any] = {"format": format, "cell": cell}
    for column, what in enumerate(("weights", "and inputs")):
        mean = interval(values[:, column])
        ratio = values[:, column].mean() / base[:, column].mean()
        # of the ratio: of the windows' residuals against it, in units of the denominator
        residual = interval(values[:, column] - ratio * base[:, column])
        found |= {
            f"KL, {what}": mean.mean, f"± {what}": mean.high - mean.mean, f"/ RTN {what}": ratio,
            f"± ratio {what}": (residual.high - residual.mean) / base[:, column].mean(),
        }  # fmt: skip
    return found


def run(args: argparse.Namespace) -> None:
    """All cells, then the table."""
    subject = load_subject(args.model, args.cache)
    name = args.model
    if args.dither:
        name = str(dithered(subject.model, args.out / "dithered"))
    space = argparse.Namespace(
        text="wiki", tokenizer=None, windows=args.windows, seq_len=512, cache=args.cache
    )
    text = read_text(subject, space)
    if args.dither and subject.vocabulary is not None:
        (args.out / "dithered" / "tokenizer.json").write_text(subject.vocabulary.json)
    for format in args.formats:
        rows: list[dict[str, Any]] = []
        rtn: list[list[float]] = []
        for cell, flags in cells(format, args.cells).items():
            out = args.out / f"{format} {cell}".replace(" ", "-")
            result = out.with_suffix(".json")
            if not result.exists():
                where = ["--cache", str(args.cache), "--format", format]
                if "--alpha" in flags or "rtn" not in cell:
                    where += ["--windows", "16", "--seq-len", "512"]
                if main(["quantize", name, str(out), *where, *flags]):
                    raise SystemExit(2)
                stored = StoredModel(out)
                refuse_overlap(stored.document["method"], text.tokens, text.source)
                result.write_text(json.dumps(scores(subject.model, stored, text.tokens, format)))
            kl = json.loads(result.read_text())
            rtn = rtn or kl
            rows.append(row(format, cell, kl, rtn))
        print(table(rows), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "mxint4", "nvint4"])
    parser.add_argument("--cells", choices=["best", "all"], default="all")
    parser.add_argument("--windows", type=int, default=8, help="of 512 held-out tokens")
    parser.add_argument("--dither", action="store_true", help="weights off the file's 4-bit grid")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    run(parser.parse_args())
