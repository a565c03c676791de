"""What to ship in four bits: rounding, GPTQ, or a fine-tune under the format (QAT, QAD).

    python scripts/compare_qat.py runs/qat --formats mxfp4 nvfp4 mxint4 nvint4
    python scripts/compare_qat.py runs/qat-small --model runs/ladder/bf16-s0/hf \\
        --data corpus/shakespeare --seq-len 256 --batch 8 --tokens 65536 --lr 3e-4

SmolLM2-135M-Instruct on the wiki corpus, or another model on its prepared data, weights and inputs
of its linear layers in a format. Every arm has the same tokens: GPTQ calibrates on all of them, a
fine-tune takes --epochs of them, its forward products quantized and its backward ones in BF16, from
the labels (QAT) or from the BF16 model (QAD). BF16 fine-tuned on the labels shows what the tokens
alone teach. All are evaluated on other documents. A killed call goes on; arms that are evaluated
stay.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import corpus_documents
from data.prepare import prepare
from data.pretrained import load_vocabulary
from data.request import PrepareRequest
from data.shards import Manifest, TokenShards
from train.cli import main
from train.output.tables import table
from train.stats.intervals import interval
from train.subjects.models import load_subject

PASSAGE, SAMPLE, HELD_OUT = 4000, 200, 0.35
ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias"),
)
SETTINGS = ("model", "data", "seq_len", "tokens", "epochs", "batch", "lr", "windows")
ARMS = ("rtn", "gptq", "qat", "qad", "qad+ce")
CROSS_ENTROPY = {"qad": 0.0, "qad+ce": 0.5}


def call(*arguments: object) -> None:
    """A verb of lowbit, which goes on where it was killed."""
    if main([str(argument) for argument in arguments]):
        raise SystemExit(2)


def base_model(folder: Path, name: str, data: Path | None, cache: Path) -> None:
    """The model as safetensors with its tokenizer, and as the `model` section of a run."""
    if (folder / "run.yaml").exists():
        return
    subject: Any = load_subject(name, cache)
    subject.model.save_pretrained(folder)
    vocabulary = subject.vocabulary or load_vocabulary(f"{data}/tokenizer.json")
    (folder / "tokenizer.json").write_text(vocabulary.json)
    end = vocabulary.tokenizer.id_to_token(vocabulary.eos_id)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    config = subject.model.config.to_dict()
    llama = {name: config[name] for name in ARCHITECTURE if config.get(name) is not None}
    (folder / "run.yaml").write_text(json.dumps({"model": {"llama": llama}}))


def training_documents(args: argparse.Namespace) -> list[str]:
    """Of the wiki corpus; of --data passages of its training split."""
    if args.data is None:
        return corpus_documents("wiki", args.cache)
    shards = TokenShards(args.data, Manifest.load(args.data), "train")
    vocabulary = load_vocabulary(str(args.data / "tokenizer.json"))
    text = vocabulary.tokenizer.decode(shards.read(0, len(shards)).tolist())
    return [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]


def prepared(args: argparse.Namespace) -> int:
    """About --tokens tokens of documents spread over all, and some held out; the number of whole
    windows to train on.
    """
    data, text, model = args.out / "data", args.out / "text.jsonl", args.out / "model"
    if not text.exists():
        documents, sample = training_documents(args), SAMPLE
        ids = load_vocabulary(str(model)).tokenizer.encode("".join(documents[:sample])).ids
        size = len(ids) * len(documents) / min(sample, len(documents))  # in tokens
        every = max(1, round(size * (1 - HELD_OUT) / args.tokens))
        text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[::every]))
    prepare(data, PrepareRequest(text=(str(text),), tokenizer=str(model), val_fraction=HELD_OUT))
    return (Manifest.load(data).train.tokens - 1) // int(args.seq_len)


def fine_tuned(args: argparse.Namespace, format: str | None, arm: str, windows: int) -> Path:
    """The run of a fine-tune."""
    model, out = args.out / "model", args.out / f"{format or 'bf16'}-{arm}"
    recipe = {} if format is None else {"fprop_input": format, "fprop_weight": format}
    section = {"policy": {"name": f"{format}_fprop" if format else "bf16", "recipe": recipe}}
    (args.out / f"{out.name}.yaml").write_text(json.dumps({"model": section}))
    steps = args.epochs * windows // args.batch
    flags = {
        "model.init_from": model, "model.optimization.lr": args.lr, "data.path": args.out / "data",
        "model.optimization.warmup_steps": max(1, steps // 10), "data.seq_len": args.seq_len,
        "model.optimization.weight_decay": 0, "data.global_batch_size": args.batch,
        "trainer.max_steps": steps, "trainer.val_check_interval": steps, "data.val_windows": 2,
        "trainer.accelerator": "cpu", "trainer.precision": "bf16-mixed", "run_dir": out,
        "trainer.accumulate_grad_batches": args.batch, "checkpoint_every": args.save_every,
    }  # fmt: skip
    if arm in CROSS_ENTROPY:
        flags |= {
            "model.distill_from.teacher": model,
            "model.distill_from.cross_entropy": CROSS_ENTROPY[arm],
        }
    layers = [x for file in (model / "run.yaml", f"{out}.yaml") for x in ("-c", file)]
    call("fit", *layers, *[x for name, value in flags.items() for x in (f"--{name}", value)])
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # three times the weights
    return Path(out)


def arm_folder(args: argparse.Namespace, format: str, arm: str, windows: int) -> Path:
    """What `lowbit eval` reads of an arm."""
    model, place = args.out / "model", args.out / f"{format}-{arm}-quantized"
    where = ["--cache", args.cache]
    if arm == "rtn":
        rounding = ["--format", format, "--activations", format, "--method", "rtn"]
        call("quantize", model, place, *rounding, "--observer", "minmax", *where)
    elif arm == "gptq":
        text = ["--text", args.out / "data", "--windows", windows, "--seq-len", args.seq_len]
        call("quantize", model, place, "--recipe", f"configs/ptq/{format}_activations.yaml",
             *text, *where)  # fmt: skip
    elif not place.exists():
        call("export", fine_tuned(args, format, arm, windows), place, "--layout", "lowbit")
    return Path(place)


def evaluated(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """Losses and KL to the model it began from, window by window: of `lowbit eval`."""
    out = args.out / "eval" / name
    if not (out / "eval.json").exists():
        call("eval", folder, "--against", args.out / "model", "--text",
             args.data or args.out / "data",
             "--windows", args.windows, "--seq-len", args.seq_len, "--out", out,
             "--cache", args.cache)  # fmt: skip
    found: dict[str, Any] = json.loads((out / "eval.json").read_text())["windows"]
    return found


def row(name: str, found: dict[str, Any], rtn: Sequence[float] | None) -> dict[str, Any]:
    """Means over windows, ± half of their 95 % intervals; KL less rounding's is paired."""
    baseline, score = list(found.values())[:2]
    gap = interval(np.array(score["loss"]) - np.array(baseline["loss"]))
    kl = interval(np.array(score["kl"]))
    row = {"arm": name, "loss - BF16": gap.mean, "± loss": gap.high - gap.mean}
    row |= {"KL to BF16": kl.mean, "± KL": kl.high - kl.mean}
    less = interval(np.array(score["kl"]) - np.array(rtn)) if rtn else None
    return row | {
        "KL - RTN": less and less.mean, "± paired": less and less.high - less.mean,
    }  # fmt: skip


def keep_settings(args: argparse.Namespace) -> None:
    """ValueError for a folder of other tokens, steps or windows: its arms are no comparison."""
    path = args.out / "settings.json"
    now = {name: str(getattr(args, name)) for name in SETTINGS}
    args.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and (known := json.loads(path.read_text())) != now:
        raise ValueError(f"{args.out} holds arms under {known}, not {now}")
    path.write_text(json.dumps(now))


def run(args: argparse.Namespace) -> None:
    """All arms of a format before the next one; then the table of what is there."""
    keep_settings(args)
    base_model(args.out / "model", args.model, args.data, args.cache)
    windows = prepared(args)
    found: dict[str, dict[str, Any]] = {}
    todo = [(f, arm) for f in args.formats for arm in args.arms]
    for format, arm in todo:
        name = f"{format} {arm}"
        if args.tables and not (args.out / "eval" / name / "eval.json").exists():
            continue
        done = (args.out / "eval" / name / "eval.json").exists()
        folder = Path() if done else arm_folder(args, format, arm, windows)
        found[name] = evaluated(args, name, folder)
    name = "bf16 qat"
    if (args.out / "eval" / name / "eval.json").exists():
        found[name] = evaluated(args, name, Path())
    elif not args.tables:
        found[name] = evaluated(args, name, fine_tuned(args, None, "qat", windows) / "hf")
    tokens = windows * args.seq_len
    print(f"{tokens:,} tokens; fine-tunes: {args.epochs} epochs, lr {args.lr:g}")
    rows = []
    for name in sorted(found, key=lambda n: [*args.formats, "bf16"].index(n.split()[0])):
        first = found.get(f"{name.split()[0]} rtn")
        rtn = None if first is None or name.endswith(" rtn") else list(first.values())[1]["kl"]
        rows.append(row(name, found[name], rtn))
    if rows:
        print(table(rows))
    if missing := [f"{f} {a}" for f, a in todo if f"{f} {a}" not in found]:
        print(f"not run: {', '.join(missing)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "mxint4", "nvint4"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["rtn", "gptq", "qat", "qad"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--data", type=Path, help="prepared, whose validation split is evaluated on"
    )
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384, help="to learn from, about")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--windows", type=int, default=8, help="to evaluate on")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--tables", action="store_true", help="of what is there; nothing is run")
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    run(parser.parse_args())
