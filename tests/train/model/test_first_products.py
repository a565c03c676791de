"""What the layers of compiled blocks would compute is counted before there is a graph."""

from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaConfig

import lowbit.operands
from lowbit import Keep, LayerPolicy, Phase, QuantRecipe, Randomness
from train.model.backends import convert
from train.model.first_products import FirstProducts
from train.model.initial import empty_model

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96,
)  # fmt: skip
FORWARD = QuantRecipe.uniform("mxint8").only("fprop")
PHASED = LayerPolicy(
    "p", QuantRecipe.uniform("mxint8"), phases=(Phase(start=0.5, gemms=("fprop",)),)
)
POLICIES = {"plain": LayerPolicy("p", FORWARD), "phases": PHASED}


@pytest.mark.parametrize("policy", POLICIES)
def test_another_product_than_the_recipes_stops_what_will_be_compiled(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here dgrad takes fprop's format, of which the recipe says nothing, or not in every phase."""
    own = POLICIES[policy]
    model = empty_model(LLAMA)
    convert(model, own, Randomness(0), "emulate", None, Keep())
    FirstProducts().check_empty(model, own)
    assert all(p.grad is None for p in model.parameters())
    make = lowbit.operands.LayerNumerics.operand

    def other(self: Any, name: str, x: Tensor) -> Any:
        return make(self, "fprop_input" if name == "dgrad_grad_output" else name, x)

    monkeypatch.setattr(lowbit.operands.LayerNumerics, "operand", other)
    with pytest.raises(ValueError, match=r"14 products differ.*q_proj: dgrad ran mxint8 x bf16"):
        FirstProducts().check_empty(model, own)
