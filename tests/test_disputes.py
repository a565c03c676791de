"""configs/recipe/disputes/: each file changes what it names of the file it is disputed with."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit import BlockFormat, LayerPolicy, Phase, QuantRecipe, Rotation, Rounding, fake_quantize
from lowbit.formats import NAMED
from lowbit.recipe import GEMMS
from train.config.formats import read_format
from train.config.layers import spelt_out
from train.config.policies import read_policy
from train.config.strict_yaml import load_yaml

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs" / "recipe"
DISPUTES = sorted((RECIPES / "disputes").glob("*.yaml"))


def policy(path: Path | str) -> LayerPolicy:
    return read_policy(spelt_out(load_yaml((RECIPES / path).read_text())["model"]["policy"]))


def stochastic(name: str) -> BlockFormat:
    return replace(NAMED[name], rounding=Rounding.STOCHASTIC)


PLAIN, MXFP8 = QuantRecipe.uniform("nvfp4"), QuantRecipe.uniform("mxfp8")
SQUARE = replace(NAMED["mxfp8"], block_size=(32, 32))
GRADIENTS = dict.fromkeys(("dgrad_grad_output", "wgrad_grad_output"), stochastic("nvfp4"))
#: what the file changes of the recipe beside it
MEANS: dict[str, tuple[QuantRecipe, dict[str, Any]]] = {
    "mxfp4_wgrad_only": (QuantRecipe(), dict.fromkeys(GEMMS["wgrad"], NAMED["mxfp4"])),
    "mxfp4_dgrad_only": (QuantRecipe(), dict.fromkeys(GEMMS["dgrad"], NAMED["mxfp4"])),
    "nvfp4_signs_none": (PLAIN, {"wgrad_rotation": Rotation(16)}),
    "nvfp4_signs_step": (PLAIN, {"wgrad_rotation": Rotation(16, "step")}),
    "nvfp4_signs_none_stochastic": (PLAIN, GRADIENTS | {"wgrad_rotation": Rotation(16)}),
    "nvfp4_signs_once_stochastic": (PLAIN, GRADIENTS | {"wgrad_rotation": Rotation(16, 0)}),
    "nvfp4_signs_step_stochastic": (PLAIN, GRADIENTS | {"wgrad_rotation": Rotation(16, "step")}),
    "mxfp8_2d_weights": (MXFP8, dict.fromkeys(("fprop_weight", "dgrad_weight"), SQUARE)),
    "nvfp4_forward_bf16": (policy("nvfp4.yaml").recipe, {}),
    "nve1m2": (QuantRecipe.uniform(read_format("nve1m2")), {}),
    "nve1m2_rotated": (
        QuantRecipe.uniform(read_format("nve1m2")),
        {f"{gemm}_rotation": Rotation(16, 0) for gemm in GEMMS},
    ),
    **{
        f"mxint8_symmetric_bf16_{block}": (
            policy(f"mxint8_asymmetric_bf16_{block}.yaml").recipe,
            {},
        )
        for block in ("128", "row")
    },
}


def symmetric(recipe: QuantRecipe) -> QuantRecipe:
    """Its twin that has no -128, whose formats are the same otherwise."""
    formats = {
        operand: replace(format, element=replace(format.element, symmetric=True))  # type: ignore[type-var, call-arg]
        for operands in GEMMS.values()
        for operand in operands
        if (format := recipe.format(operand))
    }
    return replace(recipe, **formats)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", DISPUTES, ids=lambda path: path.stem)
def test_a_file_changes_what_it_names_and_nothing_else(path: Path) -> None:
    own = policy(path)
    base, changes = MEANS[path.stem]
    expected = replace(base, **changes)
    if "symmetric" in path.stem:
        expected = symmetric(base)
        assert expected != base
    assert (own.name, own.recipe) == (path.stem, expected)
    late = path.stem == "nvfp4_forward_bf16"
    phases = (Phase(17 / 32, ("dgrad", "wgrad")),) if late else ()
    assert (own.phases, own.keep_last, own.rules) == (phases, int(late), ())
    assert re.search(r"arXiv\W+2\d{3}\.\d{5}", path.read_text().partition("model:")[0])


def test_every_file_is_in_the_table_and_an_arm_of_a_sweep() -> None:
    assert {path.stem for path in DISPUTES} == MEANS.keys()
    listed = {
        path
        for spec in ("disputes", "clipping", "ladder")
        for path in load_yaml((ROOT / f"configs/sweep/{spec}.yaml").read_text())["recipes"]
    }
    arms = {f"configs/recipe/disputes/{path.name}" for path in DISPUTES}
    left = {f"configs/recipe/disputes/{name}.yaml" for name in ("nve1m2", "nve1m2_rotated")}
    assert arms - listed == left and all((ROOT / path).is_file() for path in listed)


def test_the_late_forward_begins_inside_a_branch_of_the_ladder() -> None:
    own = policy("disputes/nvfp4_forward_bf16.yaml")
    phases = [own.phase_at(step, 320) for step in range(160, 180)]
    assert [phase is not None for phase in phases] == [False] * 10 + [True] * 10
    assert policy("nvfp4.yaml").phase_at(179, 320) is None


@pytest.mark.parametrize(("e1m2", "int4"), [("mxe1m2", "mxint4"), ("nve1m2", "nvint4")])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_e1m2_is_int4_bit_for_bit(e1m2: str, int4: str, scale: float) -> None:
    """Values 0 to 7 quarters: the block's scale takes up the factor of four."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * scale
    x[:, ::61] *= 40
    x[3, :32] = 0.0
    found = fake_quantize(x, read_format(e1m2))
    assert torch.equal(found, fake_quantize(x, read_format(int4))) and len(found.unique()) > 50
