"""Floating-point operations of training, and what devices promise to do per second."""

from torch import nn
from transformers import LlamaForCausalLM

# dense BF16 peak in FLOP/s, from the makers' data sheets; memory in bytes
DEVICES: dict[str, tuple[float, int]] = {
    "a100-40": (312e12, 40 * 10**9),
    "a100": (312e12, 80 * 10**9),
    "h100": (989e12, 80 * 10**9),
    "h200": (989e12, 141 * 10**9),
    "b200": (2250e12, 180 * 10**9),
    "mi300x": (1307e12, 192 * 10**9),
}


def flops_per_token(model: LlamaForCausalLM, seq_len: int) -> float:
    """Of forward and backward, without what checkpointing computes again.

    6 per weight of a linear layer, and attention's two products over the whole square of a sequence
    (12 x layers x heads x head size x seq_len): the convention of model FLOPs utilisation (PaLM,
    arXiv 2204.02311, appendix B).
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_size = config.head_dim or config.hidden_size // heads
    return 6.0 * weights + 12.0 * layers * heads * head_size * seq_len


def device_peak(name: str) -> float | None:
    """BF16 FLOP/s of the device that calls itself `name` ("NVIDIA H100 80GB HBM3"), if known."""
    spelt = name.lower().replace(" ", "")
    for known in sorted(DEVICES, key=len, reverse=True):
        if known.split("-")[0] in spelt:
            return DEVICES[known][0]
    return None
