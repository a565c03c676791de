"""What each part of post-training quantization gains: KL to the unquantized model, cell by cell.

    python scripts/ablate_ptq.py runs/ptq --formats mxfp4 nvfp4 mxint4 nvint4 --cells best

Every cell is quantized by `lowbit quantize` on the wiki corpus and evaluated on other windows of
it, weights alone and with quantized inputs. A killed call goes on: cells that are there stay.

    python scripts/ablate_ptq.py runs/ptq --formats mxfp4 --cells refined --windows 6

evaluates what might refine a recipe on windows that are neither calibrated on nor those of the
figures (8 windows lie at ninths of the corpus, 6 at sevenths): a choice is made on these.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit import block_format
from train.analysis.scores import divergences
from train.cli import main
from train.output.tables import table
from train.quantized.linear import StoredLinear
from train.quantized.model import QuantizedModel, read_quantized
from train.quantized.module import as_module
from train.quantized.overlap import refuse_overlap
from train.stats.intervals import interval
from train.subjects.models import load_subject
from train.subjects.text import Text, read_text

SHIFT = ["--inputs", "propagated", "--alpha", "0.25"]
RTN = "rtn identity absmax"  # what the others are measured by


def cells(format: str, which: str) -> dict[str, list[str]]:
    """Flags by the name of a cell."""
    size = str(block_format(format).block_size)
    bases = {"identity": [], "hadamard": ["--transform", "hadamard", "--transform-size", size]}
    observers = {
        "absmax": ["--observer", "minmax"],
        "before": ["--search", "before"],
        "after": [],
    }
    rtn = {RTN: ["--method", "rtn", "--observer", "minmax"]}
    if which == "best":
        turned = bases["hadamard"]
        shifted = {"gptq hadamard after alpha .25": [*turned, *SHIFT]}
        unturned: dict[str, list[str]] = {"gptq identity after": []}
        more = {"nvfp4": unturned, "mxfp4": shifted}
        return rtn | {"gptq hadamard after": turned} | more.get(format, {})
    if which == "refined":
        turned, behind = bases["hadamard"], ["--inputs", "propagated"]
        return rtn | {
            "gptq hadamard after": turned,
            "gptq hadamard after propagated": [*turned, *behind],
            "gptq hadamard after alpha .25": [*turned, *SHIFT],
            "gptq hadamard after alpha .25 33x512": [*turned, *SHIFT, "--windows", "33"],
        }
    found = {
        f"{method} {base} {observer}": [*turned, *searched, "--method", method]
        for method in ("rtn", "gptq")
        for observer, searched in observers.items()
        for base, turned in bases.items()
    }
    shifted = {
        f"{name} alpha .25": [*flags, *SHIFT]
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


class Judge:
    """The held-out windows, and the unquantized model's last hidden states in them."""

    @torch.no_grad()
    def __init__(self, base: Any, windows: Tensor) -> None:
        self.windows, self.head = windows, base.get_output_embeddings()
        self.hidden = [base.model(input_ids=w[None, :-1]).last_hidden_state[0] for w in windows]

    @torch.no_grad()
    def scores(self, stored: QuantizedModel, activations: str) -> list[list[float]]:
        """KL of each window, weights alone and with inputs in a format."""
        model, found = as_module(stored, torch.float32, exported=False), list[list[float]]()
        layers = [module for module in model.modules() if isinstance(module, StoredLinear)]
        for tokens, hidden in zip(self.windows, self.hidden, strict=True):
            reference = self.head(hidden).double().log_softmax(-1)
            found.append([])
            for format in (None, block_format(activations)):
                for layer in layers:
                    layer.activations = format
                logits = model(input_ids=tokens[None, :-1]).logits[0]
                found[-1].append(divergences(reference, logits, tokens[1:])[1])
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


def read(args: argparse.Namespace) -> tuple[str, Text, Any]:
    """What `lowbit quantize` calls the model, the held-out text, and the unquantized model."""
    subject, name = load_subject(args.model, args.cache), args.model
    space = argparse.Namespace(
        text="wiki", tokenizer=None, windows=args.windows, seq_len=512, cache=args.cache
    )
    if args.dither:
        name = str(dithered(subject.model, args.out / "dithered"))
        if subject.vocabulary is not None:
            (args.out / "dithered" / "tokenizer.json").write_text(subject.vocabulary.json)
    return name, read_text(subject, space), subject.model


def result_of(args: argparse.Namespace, format: str, cell: str) -> Path:
    """Where the KL of a cell's windows lie."""
    kind = "dithered " if args.dither else ""
    name = f"{kind}{format} {cell} {args.windows}x512.json".replace(" ", "-")
    return Path(args.out, name)


def run(args: argparse.Namespace) -> None:
    """Cell by cell, all formats of one before the next, so that what is there can be compared."""
    args.out.mkdir(parents=True, exist_ok=True)
    every = {format: cells(format, args.cells) for format in args.formats}
    todo = [
        (format, cell)
        for cell in dict.fromkeys(name for names in every.values() for name in names)
        for format in args.formats
        if cell in every[format] and not result_of(args, format, cell).exists()
    ]
    if todo and not args.tables:
        name, text, base = read(args)
        judge = Judge(base, text.tokens)
        for format, cell in todo:
            flags, result = every[format][cell], result_of(args, format, cell)
            out = Path(str(result).removesuffix(f"-{args.windows}x512.json"))
            where = ["--cache", str(args.cache), "--format", format]
            if "rtn" not in flags:
                where += ["--windows", "16", "--seq-len", "512"]
            if main(["quantize", name, str(out), *where, *flags]):
                raise SystemExit(2)
            stored = read_quantized(out)
            refuse_overlap(stored.method, text.tokens, text.source)
            result.write_text(json.dumps(judge.scores(stored, format)))
            if args.tidy:
                shutil.rmtree(out)
    for format in args.formats:
        found = {cell: result_of(args, format, cell) for cell in every[format]}
        kl = {cell: json.loads(p.read_text()) for cell, p in found.items() if p.exists()}
        if RTN in kl:
            print(table([row(format, cell, one, kl[RTN]) for cell, one in kl.items()]))
        if missing := [cell for cell in found if cell not in kl]:
            print(f"{format}: not run: {', '.join(missing)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "mxint4", "nvint4"])
    parser.add_argument("--cells", choices=["best", "refined", "all"], default="all")
    parser.add_argument("--windows", type=int, default=8, help="of 512 held-out tokens")
    parser.add_argument("--dither", action="store_true", help="weights off the file's 4-bit grid")
    parser.add_argument("--tables", action="store_true", help="of what is there; nothing is run")
    parser.add_argument("--tidy", action="store_true", help="keep a cell's KL, not its weights")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    run(parser.parse_args())
