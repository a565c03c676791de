"""What a model is calibrated on: a text, or conversations of a dataset in its own chat template."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from data.pretrained import load_vocabulary
from data.request import load_dataset
from train.ptq.source import Source
from train.subjects.text import Text, add_text_arguments, read_text

WINDOWS, SEQ_LEN = 16, 512
SEED = 0  # of the order in which conversations are taken
_ROLES = {"human": "user", "gpt": "assistant"}


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a text, None where not given, and those of a dataset."""
    add_text_arguments(parser, WINDOWS, SEQ_LEN, split="train")
    parser.set_defaults(windows=None, seq_len=None)
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="in place of --text: a hub dataset, a folder of one or a .jsonl file, whose"
        " conversations (`messages` or `conversations`) the model's chat template renders; rows"
        " of `text` are taken as they are",
    )
    parser.add_argument("--dataset-config", metavar="NAME", help="of --dataset")
    parser.add_argument("--dataset-split", metavar="NAME", help="of --dataset (train)")


def calibration(source: Source, args: argparse.Namespace, *, needed: bool) -> Text | None:
    """The windows that the arguments name; None where nothing is `needed` and nothing named.

    ValueError for arguments without effect, and for tokens that the model does not have.
    """
    named = args.text is not None or args.dataset is not None
    if args.dataset is None:
        _refuse(args, ("dataset_config", "dataset_split"), "without --dataset")
    if not needed and not named:
        what = "on rounding, which calibrates on no text but a --text or --dataset"
        _refuse(args, ("windows", "seq_len", "tokenizer"), what)
    if args.text is not None and args.dataset is not None:
        raise ValueError(f"--text {args.text} and --dataset {args.dataset}: give one of them")
    if not needed and not named:
        return None
    args.windows = WINDOWS if args.windows is None else args.windows
    args.seq_len = SEQ_LEN if args.seq_len is None else args.seq_len
    if args.dataset is None:
        text = read_text(source.subject, args, split="train")
    else:
        text = conversations(source, args)
    most, vocabulary = int(text.tokens.max()), source.config.get_text_config().vocab_size
    if most >= vocabulary:
        raise ValueError(f"{text.source} has the token {most}, {source.name} only {vocabulary}")
    return text


def _refuse(args: argparse.Namespace, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {value} has no effect {where}")


def conversations(source: Source, args: argparse.Namespace) -> Text:
    """Rows of --dataset in an order drawn with SEED, one after another, cut into windows."""
    if min(args.windows, args.seq_len) < 1:
        raise ValueError(f"--windows {args.windows} --seq-len {args.seq_len}: both at least 1")
    vocabulary = load_vocabulary(args.tokenizer) if args.tokenizer else source.subject.vocabulary
    if vocabulary is None:
        raise ValueError(f"{source.name} brings no readable tokenizer: give --tokenizer")
    split = args.dataset_split or "train"
    rows = load_dataset(args.dataset, args.dataset_config, split)
    span, ids, taken = args.seq_len + 1, list[int](), 0
    for text in _rendered(rows, source, args.dataset):
        ids += vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        taken += 1
        if len(ids) >= args.windows * span:
            break
    name = f"dataset {args.dataset} ({split})"
    if len(ids) < args.windows * span:
        raise ValueError(
            f"{name}: {len(ids)} tokens are fewer than {args.windows} windows of {span}"
        )
    tokens = torch.tensor(ids[: args.windows * span]).view(args.windows, span)
    return Text(tokens, f"{name}, {taken} of {len(rows)} rows")


def _rendered(rows: Any, source: Source, name: str) -> Iterator[str]:
    column = next((c for c in ("messages", "conversations", "text") if c in rows.column_names), "")
    if not column:
        found = ", ".join(rows.column_names)
        raise ValueError(f"--dataset {name} has columns {found}: expected messages or text")
    template = None if column == "text" else _template(source)
    for index in np.random.default_rng(SEED).permutation(len(rows)):
        row = rows[int(index)][column]
        yield row if template is None else template(_messages(row, f"{name}, row {index}"))


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    """With the keys of transformers; ShareGPT's `from` and `value` are theirs."""
    try:
        return [
            {"role": m["role"], "content": m["content"]}
            if "role" in m
            else {"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]}
            for m in row
        ]
    except (KeyError, TypeError):
        raise ValueError(
            f"--dataset {where} is no conversation: expected role and content, or from and value"
        ) from None


def _template(source: Source) -> Any:
    """The model's own, as a function of a conversation."""
    config = json.loads(source.files.get("tokenizer_config.json", b"{}"))
    if "chat_template.jinja" not in source.files and not config.get("chat_template"):
        raise ValueError(f"{source.name} has no chat template: give --text, or rows of `text`")
    with tempfile.TemporaryDirectory() as place:
        for file, data in source.files.items():
            (Path(place) / file).write_bytes(data)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)

    def render(messages: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template's own words: jinja2 is not ours to import
            said = str(error).strip().splitlines()[0][:120]
            raise ValueError(f"{source.name}'s chat template refuses a row: {said}") from None

    return render
