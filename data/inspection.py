"""`lowbit prepare --inspect`: a prepared folder verified and shown."""

from pathlib import Path

from data.shards import SPLITS, Manifest, TokenShards
from data.verify import verify
from data.vocabulary import Vocabulary

_SAMPLE_TOKENS = 200


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
            sample = tokens.read(0, min(_SAMPLE_TOKENS, len(tokens)))
            lines.append(vocabulary.decode(sample.tolist()))
    return "\n".join(lines)
