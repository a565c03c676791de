"""`lowbit eval`: what casting a trained model into a format does to its predictions."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import BlockFormat, QuantLinear, QuantRecipe, Rotation, convert_linears
from train.analysis.formats import formats_called
from train.analysis.tasks import check_installed, task_rows
from train.config.notation import HELP as HELP_FORMAT
from train.export.subject import load_judged
from train.microscope.layers import other_weights
from train.model.head import NAMES, compared
from train.model.initial import weights_hash
from train.output.files import write_csv, write_json
from train.output.tables import table
from train.runs.folders import check_results_folder
from train.runs.metrics import perplexity
from train.stats.intervals import interval
from train.subjects.models import HELP
from train.subjects.text import Text, add_text_arguments, read_text

TOP = 25  # logits of the baseline in the study's KL
CHUNK = 256  # tokens whose probabilities are held in float64 at a time
SEQ_LEN = 1024
ARITHMETIC = {"float32": "32-true", "bfloat16": "bf16-true", "bf16-mixed": "bf16-mixed"}
BASELINE = "bf16"  # the recipe's name: all operands as the baseline has them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "model", nargs="+", metavar="MODEL",
        help=f"{HELP}; what `lowbit quantize` or `lowbit export` left",
    )  # fmt: skip
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="the baseline of one or more MODELs, each as it computes; --formats then cast it",
    )
    parser.add_argument(
        "--formats", nargs="+", default=[], metavar="FORMAT",
        help=f"each {HELP_FORMAT}; the baseline, {BASELINE}, is always the first row",
    )  # fmt: skip
    parser.add_argument("--weight-only", action="store_true", help="leave activations as they are")
    parser.add_argument(
        "--rotation", default="none", metavar="SIZE",
        help="Hadamard rotation of both operands: none, block (of the format), 16, 32, 64 or 128",
    )  # fmt: skip
    parser.add_argument("--skip", nargs="*", default=["lm_head"], help="layers left alone (globs)")
    parser.add_argument(
        "--dtype", choices=[*ARITHMETIC],
        help="bf16-mixed: as a run computes; logits are FP32 throughout (default: a run's own, else"
        " float32)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help="of the LM evaluation harness besides, under every format (needs lm_eval)",
    )  # fmt: skip
    parser.add_argument(
        "--fewshot", type=int, metavar="N", help="examples in a task's prompt (default: the task's)"
    )
    parser.add_argument("--out", type=Path, help="folder for eval.csv and eval.json")
    add_text_arguments(parser, windows=8, seq_len=None, unit=f"a run's own, else {SEQ_LEN}")


def run(args: argparse.Namespace) -> int:
    """Cast the model into each format; print and write what it loses."""
    if args.out:
        check_results_folder(args.out)
    if args.tasks:
        check_installed()
    elif args.fewshot is not None:
        raise ValueError(f"--fewshot {args.fewshot} has no effect without --tasks")
    formats = formats_called([name for name in args.formats if name != BASELINE], two_d=True)
    recipes = {BASELINE: QuantRecipe()}
    for format in formats:
        recipes[str(format)] = cast_recipe(format, args.weight_only, args.rotation)
    if not args.against and (len(args.model) > 1 or not args.formats):
        raise ValueError("give --formats to cast one MODEL into, or --against a baseline")
    if not formats and (args.weight_only or args.rotation != "none"):
        raise ValueError("--weight-only and --rotation have no effect without --formats")
    subject = load_judged(args.against or args.model[0], args.cache)
    if args.tasks and subject.vocabulary is None:
        raise ValueError(f"--tasks: {subject.source} brings no readable tokenizer")
    args.seq_len = args.seq_len or subject.seq_len or SEQ_LEN
    text = read_text(subject, args)
    dtype = args.dtype or ("bf16-mixed" if subject.precision == "bf16-mixed" else "float32")
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = subject.model.to(kind)
    digest = weights_hash(model)
    judged = {n: load_judged(n, args.cache) for n in (args.model if args.against else ())}
    others = {name: other.model.to(kind) for name, other in judged.items()}
    converted = convert_linears(model, QuantRecipe(), tuple(args.skip)) if formats else model
    quantized = [module for module in converted.modules() if isinstance(module, QuantLinear)]
    left = other_weights(converted, quantized) if formats else None
    if formats and not quantized:
        raise ValueError(
            f"{subject.source}: nothing would be quantized: formats go onto nn.Linear alone, less"
            f" --skip {args.skip}, and the model's weights are in {left}"
        )
    scores = evaluate(converted, recipes, text, others, autocast=dtype == "bf16-mixed")
    rows = [summary(name, score, scores[BASELINE]) for name, score in scores.items()]
    if len(others) > 1:
        first = scores[next(iter(others))]
        rows = [row | paired(scores[row["format"]], first) for row in rows]
    lines = [
        f"model: {subject.source}, weights sha256 {digest[:12]}; the baseline is this model in"
        f" {dtype}: {NAMES[ARITHMETIC[dtype]]}",
        *(f"{name}: {other.source}" for name, other in judged.items()),
        *protocol(args, text),
        *([f"not quantized: {left}"] if left else []),
    ]
    print("\n".join([*lines, "", table(rows)]))
    tasks = []
    if args.tasks:
        assert subject.vocabulary is not None
        own = subject.vocabulary
        tasks = task_rows(converted, own, recipes, args.tasks, args.fewshot)
        for name, other in others.items():
            tasks += task_rows(other, own, {name: QuantRecipe()}, args.tasks, args.fewshot)
        print("\n".join(["", *(table([row]) for row in tasks)]))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(rows, args.out / "eval.csv")
        windows = {name: vars(score) for name, score in scores.items()}
        document = {"protocol": lines, "rows": rows, "windows": windows, "tasks": tasks}
        write_json(document, args.out / "eval.json")
    return 0


def protocol(args: argparse.Namespace, text: Text) -> list[str]:
    """The convention of every number."""
    what = "weights" if args.weight_only else "inputs and weights"
    cast = (
        f"cast: {what} of every linear layer but {args.skip or 'none'}, blocks along in_features,"
        f" rotation {args.rotation}; no calibration"
    )
    return [
        *([cast] if args.formats else []),
        f"text: {text.source}; {args.windows} windows x {args.seq_len} tokens, evenly spread,"
        " no BOS",
        "loss, KL: nats per token, mean ± half of the Student-t 95 % interval over windows;"
        " perplexity: exp of the mean loss",
        f"KL(baseline || cast) over the vocabulary; top-{TOP}: over the baseline's {TOP} likeliest"
        f" tokens, both renormalised; study: that / {TOP} x 1e6, as its script averages",
    ]


def cast_recipe(format: BlockFormat, weight_only: bool, rotation: str) -> QuantRecipe:
    """`format` for the forward GEMM."""
    if rotation == "none":
        turned = None
    elif rotation == "block":
        if not isinstance(format.block_size, int) or format.block_size < 1:
            raise ValueError(f"--rotation block: {format} has no block size, give a number")
        turned = Rotation(format.block_size)
    elif rotation.isdecimal():
        turned = Rotation(int(rotation))
    else:
        raise ValueError(f"--rotation {rotation!r}: none, block, 16, 32, 64 or 128")
    recipe = QuantRecipe(fprop_weight=format, fprop_rotation=turned)
    return recipe if weight_only else replace(recipe, fprop_input=format)


@dataclass(frozen=True)
class Score:
    """Means over the tokens of each window, nats."""

    loss: list[float]
    kl: list[float]
    kl_top: list[float]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    recipes: Mapping[str, QuantRecipe],
    text: Text,
    others: Mapping[str, nn.Module] | None = None,
    *,
    autocast: bool = False,
) -> dict[str, Score]:
    """Every recipe of `model`, then all `others`, on every window; the first recipe is the
    baseline of the divergences. ValueError for another of another vocabulary.

    Logits are FP32, as in a sweep's cast gap; `autocast`: all before them as in a BF16 run.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    arms: dict[str, tuple[nn.Module, QuantRecipe | None]] = {
        n: (model, r) for n, r in recipes.items()
    }
    arms |= {name: (other.to(device).eval(), None) for name, other in (others or {}).items()}
    scores = {name: Score([], [], []) for name in arms}
    for inputs, labels in zip(text.inputs.to(device), text.labels.to(device), strict=True):
        reference = None
        for name, (arm, recipe) in arms.items():
            if recipe is not None:
                for layer in layers:
                    layer.set_recipe(recipe)
            with compared(arm, device, autocast=autocast):
                logits = arm(input_ids=inputs[None], use_cache=False).logits[0]
            if reference is None:
                reference = logits.double().log_softmax(-1)
            if logits.shape != reference.shape:
                sizes = f"{logits.shape[-1]} tokens, the baseline {reference.shape[-1]}"
                raise ValueError(f"{name} has a vocabulary of {sizes}")
            found = divergences(reference, logits, labels)
            scores[name].loss.append(found[0])
            scores[name].kl.append(found[1])
            scores[name].kl_top.append(found[2])
    return scores


def divergences(reference: Tensor, logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Loss of `logits`, KL(reference || logits), and that over the reference's top tokens: means
    over the tokens. `reference` are log-probabilities in float64.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=logits.device)
    for start in range(0, len(labels), CHUNK):
        here = slice(start, start + CHUNK)
        p, q, right = reference[here], logits[here].double().log_softmax(-1), labels[here]
        best = p.topk(min(TOP, p.shape[-1]), dim=-1).indices
        sums[0] += F.nll_loss(q, right, reduction="sum")
        sums[1] += _kl(p, q)
        sums[2] += _kl(p.gather(-1, best).log_softmax(-1), q.gather(-1, best).log_softmax(-1))
    loss, kl, kl_top = (sums / len(labels)).tolist()
    return loss, kl, kl_top


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="sum", log_target=True)


def summary(name: str, score: Score, baseline: Score) -> dict[str, Any]:
    """One row of the table."""
    gaps = [ours - theirs for ours, theirs in zip(score.loss, baseline.loss, strict=True)]
    mean = float(np.mean(score.kl_top))
    return {
        "format": name, "perplexity": perplexity(float(np.mean(score.loss))),
        "loss": float(np.mean(score.loss)), "loss gap": float(np.mean(gaps)), "± gap": _half(gaps),
        "KL": float(np.mean(score.kl)), "± KL": _half(score.kl),
        f"top-{TOP} KL": mean, f"± top-{TOP}": _half(score.kl_top), "study x1e6": mean / TOP * 1e6,
    }  # fmt: skip


def paired(score: Score, first: Score) -> dict[str, float]:
    """KL less that of the first MODEL, window by window."""
    gaps = [ours - theirs for ours, theirs in zip(score.kl, first.kl, strict=True)]
    return {"KL - first": float(np.mean(gaps)), "± paired": _half(gaps)}


def _half(values: Sequence[float]) -> float:
    """Half the width of the interval of the mean; NaN for a single window."""
    if len(values) < 2:
        return math.nan
    found = interval(np.array(values))
    return float(found.high - found.mean)
