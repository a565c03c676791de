"""Which layer gets which recipe, and when: each option alone, what is refused."""

from dataclasses import fields, replace

import pytest
from torch import nn

from lowbit import (
    LayerPolicy,
    LayerRule,
    Phase,
    QuantLinear,
    QuantRecipe,
    convert_linears,
    enter_phase,
    unquantized,
)

RECIPE = QuantRecipe.uniform("mxint8")
OTHER = QuantRecipe.uniform("mxfp8")
FORWARD = Phase(0.5, ("fprop",))
PLAIN = Phase(0.75)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.ModuleDict({n: nn.Linear(32, 32) for n in ("up", "down")}) for _ in range(4))
        self.layers = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(32, 7)


POLICY = LayerPolicy("p", RECIPE)
# field of LayerPolicy -> its value, and what becomes of layers that have RECIPE without it
FIELDS: dict[str, tuple[object, dict[str, QuantRecipe | None]]] = {
    "recipe": (OTHER, {f"layers.{i}.{n}": OTHER for i in range(4) for n in ("up", "down")}),
    "rules": ((LayerRule("*.up", OTHER),), {f"layers.{i}.up": OTHER for i in range(4)}),
    "skip": (("lm_head", "layers.1.*"), {"layers.1.up": None, "layers.1.down": None}),
    "keep_first": (1, {"layers.0.up": None, "layers.0.down": None}),
    "keep_last": (1, {"layers.3.up": None, "layers.3.down": None}),
}


def test_each_field_changes_the_layers_it_names() -> None:
    assert set(FIELDS) == {f.name for f in fields(LayerPolicy)} - {"name", "phases"}
    before = POLICY.resolve(Model())
    assert before["lm_head"] is None
    assert {recipe for name, recipe in before.items() if name != "lm_head"} == {RECIPE}
    for field, (value, changes) in FIELDS.items():
        assert replace(POLICY, **{field: value}).resolve(Model()) == before | changes, field


REFUSED = {
    "a rule that earlier ones shadow": (
        {"rules": (LayerRule("*.up", OTHER), LayerRule("layers.1.up", RECIPE))},
        "'layers.1.up' decides no layer",
    ),
    "a recipe that rules shadow": (
        {"rules": (LayerRule("layers.*", OTHER),)},
        "recipe decides no layer",
    ),
    "a rule for kept blocks": (
        {"rules": (LayerRule("layers.3.*", OTHER),), "keep_last": 1},
        "'layers.3.\\*' decides no layer",
    ),
    "a pattern that matches nothing": ({"skip": ("head",)}, "'head' matches no linear layer"),
    "more kept blocks than there are": ({"keep_first": 3, "keep_last": 2}, "of 4 blocks"),
    "a negative number of blocks": ({"keep_last": -1}, "keep_last=-1"),
    "phases out of order": ({"phases": (PLAIN, FORWARD)}, "later and later"),
    "a phase that changes nothing": (
        {"phases": (Phase(0.5, ("fprop", "dgrad", "wgrad")),)},
        "no effect",
    ),
    "a phase like the one before": (
        {"recipe": RECIPE.only("fprop"), "phases": (FORWARD,)},
        "no effect",
    ),
    "a phase that takes a reused copy away": (
        {
            "recipe": replace(RECIPE, dgrad_weight=None, reuse_fprop_weight=True),
            "phases": (Phase(0.5, ("dgrad",)),),
        },
        "cannot stay without fprop",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_without_effect_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        replace(POLICY, **changes).resolve(Model())


def test_phases_follow_the_step() -> None:
    policy = replace(POLICY, phases=(FORWARD, PLAIN))
    found = [policy.phase_at(step, 8) for step in range(8)]
    assert found == [None] * 4 + [FORWARD] * 2 + [PLAIN] * 2
    assert POLICY.phase_at(7, -1) is None
    with pytest.raises(ValueError, match="max_steps, which is -1"):
        policy.phase_at(0, -1)


def test_entering_a_phase_and_leaving_it() -> None:
    policy = replace(POLICY, phases=(FORWARD, PLAIN), keep_first=1)
    model = convert_linears(Model(), policy)
    for phase, expected in (
        (FORWARD, RECIPE.only("fprop")),
        (PLAIN, QuantRecipe()),
        (None, RECIPE),
    ):
        enter_phase(model, policy, phase)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert len(layers) == 6
        assert {layer.recipe for layer in layers} == {expected}


def test_unquantized_is_for_a_while() -> None:
    model = convert_linears(Model(), POLICY)
    layer = model.get_submodule("layers.2.up")
    with pytest.raises(KeyError), unquantized(model):
        assert layer.recipe == QuantRecipe()
        raise KeyError
    assert layer.recipe == RECIPE
