"""Swap a model's linear layers for quantized ones, and change their recipes later."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn

from lowbit.backend import Backend, Emulate
from lowbit.definition.noise import Randomness
from lowbit.linear import QuantLinear
from lowbit.policy import LayerPolicy
from lowbit.recipe import Phase, QuantRecipe
from lowbit.reuse import Keep


@dataclass(frozen=True)
class Conversion:
    """What `convert_linears` did to a model."""

    converted: tuple[str, ...]  #: names of layers
    skipped: dict[str, str]  #: the others, and why; also what holds matrices and is no `nn.Linear`
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
    policy = _policy(recipe, skip)
    recipes = policy.resolve(model)
    layers = {name: model.get_submodule(name) for name in recipes}
    make = partial(
        QuantLinear.from_linear,
        backend=backend or Emulate(),  # one for all: they share what they make of one input
        randomness=randomness,
        keep=keep,
    )
    first = randomness.claim(len(layers)) if randomness else 0
    shared = _further_places(layers)
    made = _quantized(layers, recipes, shared, make, first)
    skipped = {n: "left alone by skip or kept blocks" for n, own in recipes.items() if own is None}
    report = Conversion(tuple(made), skipped | _other_matrices(model), shared)
    for name, layer in made.items():
        model = _placed(model, name, layer)
    model.__dict__["_lowbit_conversion"] = report
    return model


def _policy(recipe: QuantRecipe | LayerPolicy, skip: Sequence[str]) -> LayerPolicy:
    if not isinstance(recipe, LayerPolicy):
        return LayerPolicy(name="", recipe=recipe, skip=tuple(skip))
    if skip:
        raise ValueError(f"skip={tuple(skip)} beside a policy: it has its own, {recipe.skip}")
    return recipe


def _further_places(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of layers at several places: each but the first -> the first."""
    firsts: dict[nn.Module, str] = {}
    return {n: firsts[layer] for n, layer in layers.items() if firsts.setdefault(layer, n) != n}


def _quantized(
    layers: Mapping[str, nn.Module],
    recipes: Mapping[str, QuantRecipe | None],
    shared: Mapping[str, str],
    make: Callable[..., QuantLinear],
    first: int,
) -> dict[str, QuantLinear]:
    """By place, those that have a recipe; the layers' indices count from `first`."""
    made: dict[str, QuantLinear] = {}
    errors: dict[str, list[str]] = {}
    for index, (name, recipe) in enumerate(recipes.items(), first):
        origin = shared.get(name, name)
        if recipe != recipes[origin]:
            errors.setdefault(f"is also {origin}, with another recipe", []).append(name)
        if recipe is None:
            continue
        try:
            made[name] = made.get(origin) or make(layers[name], recipe, index=index)
        except ValueError as error:
            errors.setdefault(str(error), []).append(name)
    if errors:
        raise ValueError("; ".join(_refusal(why, names) for why, names in errors.items()))
    return made


def _other_matrices(model: nn.Module) -> dict[str, str]:
    """Modules that may multiply by matrices of their own (Conv1D of GPT-2, experts in one tensor),
    by name, with their class.
    """
    known = nn.Linear | nn.Embedding | nn.EmbeddingBag
    return {
        name: f"{type(module).__name__} is no nn.Linear"
        for name, module in model.named_modules()
        if not isinstance(module, known)
        and any(p is not None and p.dim() > 1 for p in module._parameters.values())
    }


def _placed(model: nn.Module, name: str, layer: QuantLinear) -> nn.Module:
    """`model` with `layer` at that place; the layer itself where it is the whole model."""
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, layer)
    if isinstance(owner, nn.TransformerEncoderLayer):
        owner.activation_relu_or_gelu = 0  # no fast path, which reads weights past the layers
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
