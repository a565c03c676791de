"""Swap a model's linear layers for quantized ones, and change their recipes later."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from lowbit.backend import Backend, Emulate
from lowbit.definition.noise import Randomness
from lowbit.linear import QuantLinear
from lowbit.operands import Keep
from lowbit.policy import LayerPolicy
from lowbit.recipe import Phase, QuantRecipe


@dataclass(frozen=True)
class Conversion:
    """What `convert_linears` did to a model."""

    converted: tuple[str, ...]  #: names of layers
    skipped: dict[str, str]  #: the others, and why
    shared: dict[str, str]  #: further places of a layer -> its first


def convert_linears(
    model: nn.Module,
    recipe: QuantRecipe | LayerPolicy,
    skip: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    randomness: Randomness | None = None,
    keep: Keep | None = None,
) -> nn.Module:
    """Make every `nn.Linear` of `model` a `QuantLinear`, in place, with its parameters and hooks.

    `skip` are glob patterns of layers left alone (a policy brings its own). A layer at several
    places is converted once for all of them; `conversion(model)` says what was done. Convert before
    `torch.compile` and before sharding. Raises ValueError, with the model unchanged, for a pattern
    that matches no layer, for a block that does not divide a layer's width, and for layers that
    compute something else than `nn.Linear` does, by name. A lone `nn.Linear` cannot be changed in
    place: take what is returned.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 7))
    >>> convert_linears(model, QuantRecipe.uniform("mxint8"), skip=("1",))[1]
    Linear(in_features=32, out_features=7, bias=True)
    >>> conversion(model).skipped
    {'1': 'left alone by skip or kept blocks'}
    """
    if isinstance(recipe, LayerPolicy):
        if skip:
            raise ValueError(f"skip={tuple(skip)} beside a policy: it has its own, {recipe.skip}")
        policy = recipe
    else:
        policy = LayerPolicy(name="", recipe=recipe, skip=tuple(skip))
    resolved = policy.resolve(model)
    backend = backend or Emulate()  # one for all: they share what they make of one input
    first = randomness.claim(len(resolved)) if randomness else 0
    made: dict[nn.Module, QuantLinear] = {}
    places: dict[str, QuantLinear] = {}
    shared: dict[str, str] = {}
    names: dict[nn.Module, str] = {}
    errors: dict[str, list[str]] = {}
    for index, (name, own) in enumerate(resolved.items(), first):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear in names:
            shared[name] = names[linear]
            if own != resolved[names[linear]]:
                errors.setdefault(f"is also {names[linear]}, with another recipe", []).append(name)
        names.setdefault(linear, name)
        if own is None:
            continue
        try:
            if linear not in made:
                made[linear] = QuantLinear.from_linear(
                    linear, own, backend=backend, randomness=randomness, index=index, keep=keep
                )
            places[name] = made[linear]
        except ValueError as error:
            errors.setdefault(str(error), []).append(name)
    if errors:
        raise ValueError("; ".join(_refusal(why, layers) for why, layers in errors.items()))
    for name, layer in places.items():
        parent, _, child = name.rpartition(".")
        if not name:
            model = layer
            continue
        owner = model.get_submodule(parent)
        setattr(owner, child, layer)
        if isinstance(owner, nn.TransformerEncoderLayer):
            owner.activation_relu_or_gelu = 0  # no fast path, which reads weights past the layers
    skipped = {n: "left alone by skip or kept blocks" for n, own in resolved.items() if own is None}
    model.__dict__["_lowbit_conversion"] = Conversion(tuple(places), skipped, shared)
    return model


def _refusal(why: str, layers: list[str]) -> str:
    first, *others = layers
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return f"layer {first}: {why}" + (f" (also {', '.join(others[:2])}{more})" if others else "")


def conversion(model: nn.Module) -> Conversion:
    """What the last `convert_linears` did to `model`; ValueError where it was not called."""
    found = vars(model).get("_lowbit_conversion")
    if not isinstance(found, Conversion):
        raise ValueError("this model was not converted by convert_linears")
    return found


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
