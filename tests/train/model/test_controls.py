"""The controls disturb BF16 as they say: by how much, where, and with which mean."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit import (
    Key,
    LayerPolicy,
    QuantRecipe,
    Randomness,
    Rounding,
    block_format,
    convert_linears,
    fake_quantize,
)
from lowbit.recipe import OPERANDS
from train.config.strict_yaml import load_yaml
from train.model.controls import PERTURBATION, SignedError, perturb, with_keys
from train.runs.run import read_run

Fit = Callable[..., int]
CONTROLS = Path(__file__).parents[3] / "configs" / "control"


@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_noise_has_the_size_of_the_error_and_no_mean(name: str, dim: int) -> None:
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    format = block_format(name)
    (stochastic,) = {replace(format, rounding=Rounding.STOCHASTIC)}
    found = SignedError().operand(x, stochastic, dim, Key.of(0)).values - x
    error = fake_quantize(x, format, dim) - x
    torch.testing.assert_close(found.abs(), error.abs(), rtol=0, atol=1e-6)  # x + e - x rounds
    kept = error.abs() > 1e-5
    same = (found[kept].sign() == error[kept].sign()).double()
    assert abs(same.mean() - 0.5) < 4 * 0.5 / len(same) ** 0.5
    again = SignedError().operand(x, stochastic, dim, Key.of(0)).values - x
    assert torch.equal(found, again)
    assert not torch.equal(found, SignedError().operand(x, stochastic, dim, Key.of(1)).values - x)


def test_perturbation_is_normal_noise_of_its_size() -> None:
    model, same = (nn.Linear(256, 256) for _ in range(2))
    same.load_state_dict(model.state_dict())
    perturb(model, 0)
    change = (model.weight - same.weight).double() / PERTURBATION
    assert abs(change.std() - 1) < 0.02 and abs(change.mean()) < 4 / 256
    perturb(same, 0)
    assert torch.equal(model.weight, same.weight)


@pytest.mark.parametrize("path", sorted(CONTROLS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_control_is_a_run_that_says_so(path: Path, fit: Fit, tmp_path: Path) -> None:
    assert load_yaml(path.read_text())["model"]["policy"]["name"] == path.stem
    fit(tmp_path / "bf16", "bf16", "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    short = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    assert fit(tmp_path / path.stem, f"../control/{path.stem}", *short) == 0
    run, base = read_run(tmp_path / path.stem), read_run(tmp_path / "bf16")
    perturbed = path.stem == "bf16_perturbed"
    assert run.control == ("perturbed" if perturbed else "noise")
    assert (run.info["initial_weights"] != base.info["initial_weights"]) == perturbed
    assert 0 < abs(run.val_curve[1][-1] - base.val_curve[1][-1]) < 0.1
    assert json.loads((tmp_path / "bf16" / "run.json").read_text())["control"] is None


@pytest.mark.parametrize("operand", OPERANDS)
def test_noise_replaces_every_operand_of_the_layer(operand: str) -> None:
    """An operand's noise is in the result of its own GEMM alone, small, and drawn anew."""
    recipe = QuantRecipe(**{operand: block_format("mxint8")})  # type: ignore[arg-type]
    policy = with_keys(LayerPolicy("n", recipe, skip=()))
    assert policy.recipe.is_random
    layers = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    layers[1].load_state_dict(layers[0].state_dict())
    convert_linears(layers[0], policy, backend=SignedError(), randomness=Randomness(0))
    x, g = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for layer in layers:
        own = x.clone().requires_grad_()
        output = layer(own)
        output.backward(g)
        weight = layer.get_parameter("0.weight")
        results.append({"fprop": output.detach(), "dgrad": own.grad, "wgrad": weight.grad})
    for gemm, plain in results[1].items():
        noisy = results[0][gemm]
        assert noisy is not None and plain is not None
        if gemm == operand.partition("_")[0]:
            assert 0 < (noisy - plain).norm() / plain.norm() < 0.03
        else:
            torch.testing.assert_close(noisy, plain, rtol=0, atol=1e-4)
