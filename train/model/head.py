"""The arithmetic in which predictions are compared: the model's own, but for its output layer.

Under BF16 autocast logits are rounded to 8 significant bits. Two models that differ in nothing
then part by a KL of about 1e-5 nats: as much as an 8-bit format moves them. So divergences take
the hidden states as the model has them, and logits of FP32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

AUTOCAST = {"32-true": False, "bf16-mixed": True}  # precision of the trainer -> under autocast
NAMES = {
    "32-true": "FP32",
    "bf16-mixed": "BF16 autocast, output layer in FP32",
    "bf16-true": "BF16, output layer in FP32",
}


@contextmanager
def compared(model: nn.Module, device: torch.device, *, autocast: bool) -> Iterator[None]:
    """Within it `model` computes as its run does, and its logits are FP32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast), _fp32_head(model):
        yield


@contextmanager
def _fp32_head(model: nn.Module) -> Iterator[None]:
    """By way of the layer's own `forward`: a quantized head stays quantized, of FP32 operands."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]  # transformers'
    own, weight = type(head).forward, head._parameters["weight"]
    assert weight is not None

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = own(head, hidden.float())
            return logits

    head.__dict__["forward"] = forward
    if weight.dtype != torch.float32:
        head._parameters["weight"] = weight.float()  # type: ignore[assignment]  # it takes tensors
    try:
        yield
    finally:
        del head.__dict__["forward"]
        head._parameters["weight"] = weight
