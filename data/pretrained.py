"""Existing tokenizers: a tokenizer.json, a folder or hub id, a Llama-3 tokenizer.model."""

import base64
import binascii
import itertools
import json
import re
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data.vocabulary import EOS, Vocabulary, byte_characters, byte_vocabulary

_ENDS = (EOS, "<|end_of_text|>", "</s>", "<eos>")  # what published tokenizers close a document with
# Of Llama 3's 256 special tokens those that have a use; the others are reserved.
_LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
]
_LLAMA3_SPECIAL += [f"<|reserved_special_token_{index}|>" for index in range(2, 246)]
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def ask_hub_once() -> None:
    """Where the hub does not answer, what is cached is all there is: its own client would ask
    again for half a minute a file. Before anything with a hub id is loaded.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whichever library the session is of
        constants.HF_HUB_OFFLINE = True


def load_vocabulary(name: str, eos: str | None = None) -> Vocabulary:
    """The tokenizer called `name`: `bytes`, a file, a folder or a hub id."""
    path = Path(name).expanduser()
    if name == "bytes":
        return byte_vocabulary()
    if path.is_file() and path.suffix == ".model":
        tokenizer = llama3_tokenizer(path)
    elif path.is_file():
        tokenizer = _from_json(path)
    elif not path.exists() and (path.suffix in (".json", ".model") or name.startswith((".", "/"))):
        raise FileNotFoundError(f"--tokenizer {name}: no such file")
    else:
        tokenizer, own_eos = _from_transformers(str(path) if path.exists() else name)
        eos = eos or own_eos
    _refuse_chance(tokenizer, name)
    return Vocabulary(tokenizer.to_str(), _end_of_document(tokenizer, name, eos))


def tokenizer_files(name: str | None) -> list[Path]:
    """The files that a local tokenizer is made of; none for a hub id or bytes."""
    if name is None or name == "bytes":
        return []
    path = Path(name).expanduser()
    if path.is_dir():
        own = r"(tokenizer|special_tokens|added_tokens|vocab|merges|config\.json).*|.+\.model"
        return sorted(p for p in path.iterdir() if p.is_file() and re.fullmatch(own, p.name))
    return [path] if path.is_file() else []


def _refuse_chance(tokenizer: Tokenizer, name: str) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    for option in ("dropout", "alpha", "nbest_size"):  # of BPE; of Unigram's sampling
        if model.get(option):
            raise ValueError(
                f"tokenizer {name} draws at random ({option} {model[option]}): the same text would "
                f"not have the same tokens; set model.{option} to null in its tokenizer.json"
            )


def _end_of_document(tokenizer: Tokenizer, name: str, eos: str | None) -> int:
    candidates = [eos] if eos else _ENDS
    for token in candidates:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise ValueError(f"tokenizer {name} has none of {list(candidates)}: name its end with --eos")


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error


def _from_transformers(name: str) -> tuple[Tokenizer, str | None]:
    from transformers import AutoTokenizer  # imports torch

    if not Path(name).exists():
        ask_hub_once()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"tokenizer {name} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name} has no fast version, which the `tokenizers` library needs"
        )
    return tokenizer.backend_tokenizer, tokenizer.eos_token


def llama3_tokenizer(path: Path) -> Tokenizer:
    """Meta's file of base64 tokens by rank, as an equivalent byte-level BPE."""
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"{path} is not a Llama-3 tokenizer.model: expected base64 ranks"
        ) from error
    characters = byte_characters()

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [
        (spell(pair[0]), spell(pair[1])) for token in ranks if (pair := _last_merge(token, ranks))
    ]
    vocab = {spell(token): rank for token, rank in ranks.items()}
    # ignore_merges: a word that is a token is taken whole, as tiktoken does.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_LLAMA3_SPECIAL)
    return tokenizer


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that byte pair encoding of `token` ends in, formed of earlier tokens alone."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], ranks[token]))
        if ranks.get(pairs[best], ranks[token]) >= ranks[token]:
            return None
        parts[best : best + 2] = [pairs[best]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
