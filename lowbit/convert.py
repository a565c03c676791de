"""Swap a model's linear layers for quantized ones, and change their recipes later."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lowbit.backend import Backend, Emulate
from lowbit.definition.noise import Randomness
from lowbit.linear import QuantLinear
from lowbit.operands import Keep
from lowbit.policy import LayerPolicy
from lowbit.recipe import Phase, QuantRecipe


def convert_linears(
    model: nn.Module,
    recipe: QuantRecipe | LayerPolicy,
    skip: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    randomness: Randomness | None = None,
    keep: Keep | None = None,
) -> nn.Module:
    """Make every `nn.Linear` of `model` a `QuantLinear`, in place, sharing its parameters.

    `skip` are glob patterns of layers left alone (a policy brings its own). Convert before
    `torch.compile` and before sharding. Raises ValueError, with the model unchanged, for a pattern
    that matches no layer and for a block that does not divide a layer's width, naming the layer.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 7))
    >>> convert_linears(model, QuantRecipe.uniform("mxint8"), skip=("1",))[1]
    Linear(in_features=32, out_features=7, bias=True)
    """
    if isinstance(recipe, LayerPolicy):
        if skip:
            raise ValueError(f"skip={tuple(skip)} beside a policy: it has its own, {recipe.skip}")
        policy = recipe
    else:
        policy = LayerPolicy(name="", recipe=recipe, skip=tuple(skip))
    converted: dict[str, QuantLinear] = {}
    backend = backend or Emulate()  # one for all: they share what they make of one input
    for index, (name, resolved) in enumerate(policy.resolve(model).items()):
        if resolved is None:
            continue
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            converted[name] = QuantLinear.from_linear(
                linear, resolved, backend=backend, randomness=randomness, index=index, keep=keep
            )
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    for name, layer in converted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def enter_phase(model: nn.Module, policy: LayerPolicy, phase: Phase | None) -> None:
    """Give every layer that `policy` converted its recipe of `phase`, from now on."""
    for name, recipe in policy.resolve(model, phase).items():
        layer = model.get_submodule(name)
        if recipe is not None:
            assert isinstance(layer, QuantLinear)
            layer.set_recipe(recipe)


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Within, every layer computes as the baseline does, with the same weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    recipes = [layer.recipe for layer in layers]
    try:
        for layer in layers:
            layer.set_recipe(QuantRecipe())
        yield
    finally:
        for layer, recipe in zip(layers, recipes, strict=True):
            layer.set_recipe(recipe)
