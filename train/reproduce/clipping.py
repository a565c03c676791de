"""The clipping ablation (Table 10) on a small model: INT8 with BF16 scales and BF16 arithmetic,
codes down to -128 against the symmetric range, paired by seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import (
    Arithmetic,
    IntFormat,
    QuantRecipe,
    ScaleFormat,
    block_format,
    convert_linears,
)
from train.reproduce.claims import Claim
from train.stats.intervals import interval

PUBLISHED = {-1: (3.2544, 3.2560), 128: (3.1309, 3.1289), 32: (3.1354, 3.1251)}
"""Final loss of the 145M model with BF16 scales: [-128, 127], [-127, 127]."""


@dataclass(frozen=True)
class Size:
    """Of the small model and its training."""

    hidden: int
    layers: int
    steps: int
    seeds: int
    blocks: tuple[int, ...]


FAST = Size(hidden=64, layers=2, steps=25, seeds=2, blocks=(32,))
FULL = Size(hidden=128, layers=2, steps=80, seeds=3, blocks=(32, 128, -1))
BATCH, SEQ_LEN, LAST = 8, 64, 10  # sequences, their length, steps averaged at the end


def clipping_claims(size: Size) -> Iterator[Claim]:
    """By training both variants."""
    for block in size.blocks:
        gaps = [
            _final_loss(size, block, False, seed) - _final_loss(size, block, True, seed)
            for seed in range(size.seeds)
        ]
        found = interval(np.array(gaps))
        asymmetric, symmetric = PUBLISHED[block]
        worse = asymmetric > symmetric
        resolved = bool(found.low > 0 or found.high < 0)
        yield Claim(
            "clipping (Table 10)",
            f"loss of [-128,127] minus [-127,127], block {'row' if block < 0 else block}",
            f"{asymmetric - symmetric:+.4f}",
            f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]",
            resolved and bool(found.mean > 0) == worse,
            f"95 % interval over {size.seeds} paired seeds of a model {size.hidden} wide after"
            f" {size.steps} steps{'' if resolved else ': not resolved'}; 145M on 20B tokens there",
        )  # fmt: skip


def _final_loss(size: Size, block: int, symmetric: bool, seed: int) -> float:
    """Mean training loss of the last steps, nats; the pair differs in the range of codes alone."""
    format = block_format(
        "mxint8", scale=ScaleFormat.BF16, scale_rule=None, arithmetic=Arithmetic.BF16,
        block_size=block,
    )  # fmt: skip
    format = replace(format, element=IntFormat(8, symmetric=symmetric))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    convert_linears(model, QuantRecipe.uniform(format), ("lm_head",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    successors = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(7))
    losses = []
    for _ in range(size.steps):
        tokens = _walks(successors, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-LAST:]))


def _walks(successors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random walks over 256 tokens of four equally likely successors each: 1.386 nats at best."""
    tokens = torch.randint(0, 256, (BATCH, 1), generator=generator)
    turns = torch.randint(0, 4, (BATCH, SEQ_LEN), generator=generator)
    columns = [tokens[:, 0]]
    for position in range(SEQ_LEN):
        columns.append(successors[columns[-1], turns[:, position]])
    return torch.stack(columns, 1)
