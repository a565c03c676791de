"""`lowbit prepare --inspect`: a prepared folder verified and shown."""

from pathlib import Path

import numpy as np

from data.shards import SPLITS, Manifest, TokenShards
from data.verify import verify
from data.vocabulary import Vocabulary

_SAMPLE_TOKENS = 200
_CHUNK = 2**24


def inspect(folder: Path) -> str:
    """Statistics and the beginning of each split, after every hash was checked anew."""
    manifest = Manifest.load(folder)
    verify(folder, manifest, trust_earlier=False)
    json = (folder / manifest.tokenizer_file).read_text(encoding="utf-8")
    vocabulary = Vocabulary(json, manifest.eos_id)
    lines = [f"{folder}: every hash is right", manifest.summary()]
    for name in SPLITS:
        tokens = TokenShards(folder, manifest, name)
        lines.append(f"--- {name}: {len(manifest.split(name).shards)} shards, beginning with")
        if len(tokens):
            entropy = unigram_entropy(tokens, manifest.vocab_size)
            lines.append(f"{name} unigram entropy: {entropy:.4f} nats per token")
            sample = tokens.read(0, min(_SAMPLE_TOKENS, len(tokens)))
            lines.append(vocabulary.decode(sample.tolist()))
    return "\n".join(lines)


def unigram_entropy(tokens: TokenShards, vocab_size: int) -> float:
    """-sum p log p over the frequencies of the ids, in nats: what a model must beat that knows only
    how frequent each token is.
    """
    counts = np.zeros(vocab_size)
    for first in range(0, len(tokens), _CHUNK):
        chunk = tokens.read(first, min(first + _CHUNK, len(tokens)))
        counts += np.bincount(chunk, minlength=vocab_size)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
