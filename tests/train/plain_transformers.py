"""What transformers, torch and numpy make of an exported run: its witness, without a line of ours.

python plain_transformers.py HF SHARD SEQ_LEN WINDOWS PRECISION     prints the loss as JSON
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def windows_of(shard: Path, seq_len: int, count: int) -> torch.Tensor:
    """`count` windows of a split, each from the middle of one of as many equal stretches."""
    tokens = np.load(shard).astype(np.int64)
    total = (len(tokens) - 1) // seq_len
    starts = [(2 * i + 1) * total // (2 * count) * seq_len for i in range(count)]
    return torch.from_numpy(np.stack([tokens[s : s + seq_len + 1] for s in starts]))


@torch.no_grad()
def validation_loss(hf: Path, shard: Path, seq_len: int, count: int, precision: str) -> float:
    """Nats per token, as the model's own loss counts them."""
    model: Any = AutoModelForCausalLM.from_pretrained(hf).eval()
    assert model.dtype == torch.float32 and model.config.use_cache
    mixed = precision == "bf16-mixed"
    losses = []
    for window in windows_of(shard, seq_len, count):
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).double())
    return float(torch.stack(losses).mean())


def continuation(hf: Path, text: str) -> str:
    """Eight tokens of greedy generation, decoded."""
    tokenizer: Any = AutoTokenizer.from_pretrained(hf)
    model: Any = AutoModelForCausalLM.from_pretrained(hf)
    inputs = tokenizer([text, text * 2], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ids.shape[1] <= inputs["input_ids"].shape[1] + 8
    return str(tokenizer.decode(ids[1], skip_special_tokens=True))


if __name__ == "__main__":
    hf, shard = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    loss = validation_loss(hf, shard, int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    text = continuation(hf, "3 times 4 is")
    ours = sorted({name.partition(".")[0] for name in sys.modules} & {"train", "data", "lowbit"})
    print(json.dumps({"loss": loss, "text": text, "ours": ours}))
