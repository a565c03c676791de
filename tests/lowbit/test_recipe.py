"""Each option of a recipe changes what it names and nothing else; one without effect is refused."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit import (
    Arithmetic,
    BlockFormat,
    Phase,
    QuantLinear,
    QuantRecipe,
    Randomness,
    Rotation,
    Rounding,
    ScaleFormat,
    ScaleRule,
    block_format,
)
from lowbit.formats import MXFP4, MXINT4, MXINT8, NVFP4, IntFormat, OuterScale
from lowbit.recipe import GEMMS, OPERANDS

RESULT_OF = {"fprop": "output", "dgrad": "grad_input", "wgrad": "grad_weight"}
BF16_SCALE = block_format("mxint8", scale=ScaleFormat.BF16, scale_rule=None)
BF16_ALL = replace(BF16_SCALE, arithmetic=Arithmetic.BF16)

# field of BlockFormat -> a format, and changes to that field alone
FORMAT_FIELDS: dict[str, list[tuple[BlockFormat, Any]]] = {
    "element": [(MXINT8, IntFormat(6)), (BF16_ALL, IntFormat(8, symmetric=False))],
    "scale": [(BF16_SCALE, ScaleFormat.FP32)],
    "block_size": [(MXINT8, 16), (MXINT8, -1)],
    "scale_rule": [(MXFP4, rule) for rule in ScaleRule if rule is not ScaleRule.RCEIL],
    "rounding": [(MXINT4, Rounding.HALF_AWAY), (MXINT4, Rounding.STOCHASTIC)],
    "arithmetic": [(BF16_SCALE, Arithmetic.BF16)],
    "scale_min": [(NVFP4, 2.0**-6)],
    "outer_scale": [(NVFP4, OuterScale.NONE)],
}
FULL = QuantRecipe.uniform(MXINT8)
# field of QuantRecipe -> recipe without it, recipe with it; what changes is that of its GEMM
RECIPE_FIELDS = {
    **{operand: (QuantRecipe(), QuantRecipe(**{operand: MXINT8})) for operand in OPERANDS},
    "reuse_fprop_weight": (
        QuantRecipe(fprop_weight=MXINT8),
        QuantRecipe(fprop_weight=MXINT8, reuse_fprop_weight=True),
    ),
    **{f"{g}_rotation": (FULL, replace(FULL, **{f"{g}_rotation": Rotation()})) for g in GEMMS},
}


def values(*shape: int) -> Tensor:
    """Gaussian, some rows in eighths, for ties; some rows and columns tiny, for small scales."""
    drawn = torch.randn(shape)
    drawn[::2] = drawn[::2].mul(8).round().div(8)
    drawn[:, : shape[1] // 4] *= 2.0**-14
    drawn[: shape[0] // 4] *= 2.0**-14
    return drawn


def run(recipe: QuantRecipe) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = values(64, 128)
    input = values(96, 128).requires_grad_()
    output = QuantLinear.from_linear(layer, recipe, randomness=Randomness(0))(input)
    output.backward(values(96, 64))
    assert input.grad is not None and layer.weight.grad is not None
    return {"output": output.detach(), "grad_input": input.grad, "grad_weight": layer.weight.grad}


def changed(before: QuantRecipe, after: QuantRecipe) -> set[str]:
    a, b = run(before), run(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_the_tables_below_cover_every_field() -> None:
    assert set(FORMAT_FIELDS) == {f.name for f in fields(BlockFormat)} - {"name"}
    assert set(RECIPE_FIELDS) == {f.name for f in fields(QuantRecipe)}
    assert {f.name for f in fields(Rotation)} == {"size", "seed"}


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("field", FORMAT_FIELDS)
def test_a_format_field_changes_its_operands_gemm_alone(field: str, operand: str) -> None:
    for format, value in FORMAT_FIELDS[field]:
        before = QuantRecipe(**{operand: format})
        after = QuantRecipe(**{operand: replace(format, **{field: value})})
        assert changed(before, after) == {RESULT_OF[operand.split("_")[0]]}, value


@pytest.mark.parametrize("field", RECIPE_FIELDS)
def test_a_recipe_field_changes_its_gemm_alone(field: str) -> None:
    gemm = "dgrad" if field == "reuse_fprop_weight" else field.split("_")[0]
    assert changed(*RECIPE_FIELDS[field]) == {RESULT_OF[gemm]}


@pytest.mark.parametrize("change", [{"size": 64}, {"seed": 1}])
def test_a_rotation_field_changes_its_gemm_alone(change: dict[str, int]) -> None:
    before = replace(FULL, wgrad_rotation=Rotation())
    after = replace(FULL, wgrad_rotation=Rotation(**change))
    assert changed(before, after) == {"grad_weight"}


TWO_D = replace(MXINT8, block_size=(32, 32))


def test_two_d_blocks_are_one_weight_for_both_gemms() -> None:
    own_copies = replace(FULL, fprop_weight=TWO_D, dgrad_weight=TWO_D)
    reused = replace(FULL, fprop_weight=TWO_D, dgrad_weight=None, reuse_fprop_weight=True)
    assert changed(own_copies, reused) == set()
    assert changed(FULL, own_copies) == {"output", "grad_input"}


WITHOUT_EFFECT = {
    "rotation of an unquantized GEMM": (
        lambda: QuantRecipe(dgrad_rotation=Rotation()),
        "no effect",
    ),
    "reuse without a copy": (lambda: QuantRecipe(reuse_fprop_weight=True), "fprop_weight=None"),
    "reuse beside an own copy": (
        lambda: replace(FULL, reuse_fprop_weight=True),
        "dgrad_weight=mxint8",
    ),
    "reuse of a rotated copy": (
        lambda: replace(
            *(FULL,), dgrad_weight=None, reuse_fprop_weight=True, fprop_rotation=Rotation()
        ),
        "axes differ",
    ),
    "2-D blocks of tokens": (lambda: QuantRecipe(fprop_input=TWO_D), "2-D blocks are for weights"),
    "rotation size": (lambda: Rotation(24), "size=24"),
    "GEMM": (lambda: FULL.only("bprop"), "bprop"),
    "dgrad without the copy it reuses": (
        lambda: replace(FULL, dgrad_weight=None, reuse_fprop_weight=True).only("dgrad"),
        "cannot stay without fprop",
    ),
    "phase at the start": (lambda: Phase(0.0), "start=0.0"),
    "phase at the end": (lambda: Phase(1.0), "start=1.0"),
    "phase of an unknown GEMM": (lambda: Phase(0.5, ("forward",)), "forward"),
    "phase of a GEMM twice": (lambda: Phase(0.5, ("fprop", "fprop")), "different ones"),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_what_has_no_effect_or_no_meaning_is_refused(case: str) -> None:
    build, message = WITHOUT_EFFECT[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_widths_are_checked_with_the_rotation() -> None:
    recipe = replace(FULL, fprop_rotation=Rotation(128))
    with pytest.raises(ValueError, match=r"in_features=64 .* rotation size 128"):
        QuantLinear.from_linear(nn.Linear(64, 32), recipe)


@pytest.mark.parametrize("start", [0.1, 0.7, 0.8, 1 / 3])
@pytest.mark.parametrize("steps", [1, 7, 10, 150, 38147])
def test_a_phase_begins_at_the_first_step_past_its_fraction(start: float, steps: int) -> None:
    begins = Phase(start).first_step(steps)
    assert begins >= start * steps - 1e-9
    assert begins - 1 < start * steps
    assert Phase(0.55).first_step(100) == 55  # though 0.55 * 100 > 55 in floating point
