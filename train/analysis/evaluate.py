"""`lowbit eval`: what casting a trained model into a format does to its predictions."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import BlockFormat, QuantLinear, QuantRecipe, Rotation, convert_linears
from train.analysis.formats import formats_called
from train.analysis.scores import TOP, Score, evaluate, paired, summary
from train.analysis.tasks import Tasks, check_installed, task_rows
from train.config.notation import HELP as HELP_FORMAT
from train.export.subject import load_judged
from train.microscope.layers import other_weights
from train.model.head import NAMES
from train.model.initial import weights_hash
from train.output.files import write_csv, write_json
from train.output.tables import table
from train.quantized.overlap import refuse_overlap
from train.runs.folders import check_results_folder
from train.subjects.models import HELP
from train.subjects.text import Text, add_text_arguments, read_text

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
    parser.add_argument(
        "--task-path", type=Path, metavar="DIR",
        help="task YAML of one's own for --tasks: a stock task's name over local rows, offline",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for eval.csv and eval.json")
    add_text_arguments(parser, windows=8, seq_len=None, unit=f"a run's own, else {SEQ_LEN}")


def run(args: argparse.Namespace) -> int:
    """Cast the model into each format; print and write what it loses."""
    recipes = asked(args)
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
    for one in (subject, *judged.values()):
        refuse_overlap(one.method, text.tokens, text.source)
    others = {name: other.model.to(kind) for name, other in judged.items()}
    left = None
    if len(recipes) > 1:
        model, left = castable(model, subject.source, args.skip)
    scores = evaluate(model, recipes, text, others, autocast=dtype == "bf16-mixed")
    lines = [
        f"model: {subject.source}, weights sha256 {digest[:12]}; the baseline is this model in"
        f" {dtype}: {NAMES[ARITHMETIC[dtype]]}",
        *(f"{name}: {other.source}" for name, other in judged.items()),
        *protocol(args, text),
        *([f"not quantized: {left}"] if left else []),
    ]
    rows = rows_of(scores, list(others))
    print("\n".join([*lines, "", table(rows)]))
    tasks: list[dict[str, Any]] = []
    if args.tasks:
        own = subject.vocabulary
        assert own is not None
        for arm, cast in ((model, recipes), *((o, {n: QuantRecipe()}) for n, o in others.items())):
            tasks += task_rows(arm, own, cast, Tasks(args.tasks, args.fewshot, args.task_path))
        print("\n".join(["", *(table([row]) for row in tasks)]))
    if args.out:
        write(args.out, {"protocol": lines, "rows": rows, "tasks": tasks}, scores)
    return 0


def asked(args: argparse.Namespace) -> dict[str, QuantRecipe]:
    """The baseline's recipe and each format's; ValueError for options that do not go together."""
    if args.out:
        check_results_folder(args.out)
    if args.tasks:
        check_installed()
        Tasks(args.tasks, args.fewshot, args.task_path).check()
    elif args.fewshot is not None or args.task_path is not None:
        flag = "--fewshot" if args.task_path is None else "--task-path"
        value = args.fewshot if args.task_path is None else args.task_path
        raise ValueError(f"{flag} {value} has no effect without --tasks")
    formats = formats_called([name for name in args.formats if name != BASELINE], two_d=True)
    if not args.against and (len(args.model) > 1 or not args.formats):
        raise ValueError("give --formats to cast one MODEL into, or --against a baseline")
    if not formats and (args.weight_only or args.rotation != "none"):
        raise ValueError("--weight-only and --rotation have no effect without --formats")
    recipes = {str(f): cast_recipe(f, args.weight_only, args.rotation) for f in formats}
    return {BASELINE: QuantRecipe()} | recipes


def castable(model: nn.Module, source: str, skip: list[str]) -> tuple[nn.Module, str | None]:
    """The model with layers that take formats, and what its other weights are in; ValueError
    where no layer takes one.
    """
    converted = convert_linears(model, QuantRecipe(), tuple(skip))
    quantized = [module for module in converted.modules() if isinstance(module, QuantLinear)]
    left = other_weights(converted, quantized)
    if not quantized:
        raise ValueError(
            f"{source}: nothing would be quantized: formats go onto nn.Linear alone, less"
            f" --skip {skip}, and the model's weights are in {left}"
        )
    return converted, left


def rows_of(scores: dict[str, Score], others: list[str]) -> list[dict[str, Any]]:
    """A row an arm; of several other models each also against the first of them."""
    rows = [summary(name, score, scores[BASELINE]) for name, score in scores.items()]
    if len(others) < 2:
        return rows
    return [row | paired(scores[row["format"]], scores[others[0]]) for row in rows]


def write(folder: Path, document: dict[str, Any], scores: dict[str, Score]) -> None:
    """eval.csv, and eval.json with every window."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(document["rows"], folder / "eval.csv")
    windows = {name: vars(score) for name, score in scores.items()}
    write_json(document | {"windows": windows}, folder / "eval.json")


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
