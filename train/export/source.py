"""Where an export comes from: what `lowbit quantize` left, or a run under a recipe (QAT)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.vocabulary import Vocabulary
from lowbit import QuantizedTensor, QuantRecipe, ScaleFormat, quantize, rotate
from lowbit.definition.transforms import Transform
from train.checkpoints.folder import complete_checkpoints, step_of
from train.config.policies import read_policy
from train.quantized.layout import StoredLayer, check_stored
from train.quantized.model import (
    QuantizedModel,
    fused,
    linear_names,
    plain_config,
    read_quantized,
)
from train.quantized.reciprocal import divisible, is_nvfp4
from train.runs.record import has_record, read_config, read_record
from train.subjects.models import load_subject


def of_quantized(folder: Path) -> QuantizedModel:
    """What `lowbit quantize` left; ValueError for a damaged folder."""
    model = read_quantized(folder)
    layers = {name: _without_identity(layer) for name, layer in model.layers.items()}
    return replace(model, layers=layers)


def _without_identity(layer: StoredLayer) -> StoredLayer:
    turned = layer.transform is not None and layer.transform.name != "identity"
    return layer if turned else replace(layer, transform=None)


def of_run(run: Path, *, fuse: bool) -> QuantizedModel:
    """The final weights of a run in its recipe's formats of fprop's operands.

    `fuse`: layers that engines multiply as one get one tensor scale. ValueError for a run that
    quantized no weights, or whose last phase does not.
    """
    config, record = read_config(run), read_record(run)
    policy = read_policy(config["model"]["policy"])
    subject = load_subject(str(run), Path(".cache"))
    model = subject.model
    step = record["max_steps"]
    if record["status"] != "finished":  # the newest checkpoint's weights
        step = step_of(complete_checkpoints(run / "checkpoints")[-1])
    phase = policy.phase_at(step - 1, record["max_steps"])
    recipes = {n: r for n, r in policy.resolve(model, phase).items() if r and r.fprop_weight}
    if not recipes:
        raise ValueError(
            f"{run} ended under {policy.name}, with no weights quantized in its forward pass: "
            "`lowbit quantize` it first"
        )
    state = dict(model.state_dict())
    weights = {name: state.pop(f"{name}.weight") for name in recipes}
    made = dict(_quantized(weights, recipes, fuse=fuse))
    return QuantizedModel(
        source=subject.source,
        config=plain_config(model),
        layers=made,
        others=state,
        kept=tuple(n for n in linear_names(model) if n not in made),
        files=_tokenizer_files(subject.vocabulary),
        method={
            "name": "QAT: trained under the recipe, its weights rounded to nearest",
            "recipe": policy.name,
            "steps": step,
            "data": record["data"]["fingerprint"][:12],
        },
    )


def _quantized(
    weights: Mapping[str, Tensor], recipes: Mapping[str, QuantRecipe], *, fuse: bool
) -> Iterator[tuple[str, StoredLayer]]:
    groups = [g for g in fused(recipes) if fuse and all(_has_tensor_scale(recipes[n]) for n in g)]
    alone = [(name,) for name in recipes if not any(name in group for group in groups)]
    for group in (*groups, *alone):
        kinds: dict[QuantRecipe, list[str]] = {}
        for name in group:
            kinds.setdefault(recipes[name], []).append(name)
        for recipe, names in kinds.items():
            yield from round_together({name: weights[name] for name in names}, recipe).items()


def _has_tensor_scale(recipe: QuantRecipe) -> bool:
    return recipe.fprop_weight is not None and recipe.fprop_weight.scale == ScaleFormat.E4M3


def round_together(weights: Mapping[str, Tensor], recipe: QuantRecipe) -> dict[str, StoredLayer]:
    """Layers rounded to nearest as one matrix: under one tensor scale where there is one."""
    format, rotation = recipe.fprop_weight, recipe.fprop_rotation
    assert format is not None
    check_stored(format)
    whole = torch.cat([weight.float() for weight in weights.values()])
    transform = None
    if rotation is not None:
        if whole.shape[1] % rotation.size:
            raise ValueError(
                f"{next(iter(weights))}: rotation size={rotation.size} does not divide its "
                f"{whole.shape[1]} inputs, which no file can hold"
            )
        whole, transform = rotate(whole, rotation), Transform.of(rotation)
    rows = [len(weight) for weight in weights.values()]
    made = along_rows(quantize(whole, format), rows)
    if is_nvfp4(made.format) and made.tensor_scale is not None:
        made = replace(made, tensor_scale=divisible(made.tensor_scale))
    codes, scales = torch.split(made.codes, rows), torch.split(made.scale, rows)
    return {
        name: StoredLayer(
            QuantizedTensor(codes[i], scales[i], made.tensor_scale, made.format, -1),
            recipe.fprop_input,
            transform,
        )
        for i, name in enumerate(weights)
    }


def along_rows(made: QuantizedTensor, rows: Sequence[int]) -> QuantizedTensor:
    """2-D blocks as 1-D ones, every row of a block with its scale: the same values."""
    if not isinstance(made.format.block_size, tuple):
        return made
    height, width = made.format.block_size
    if any(count % height for count in rows[:-1]):
        raise ValueError(f"{made.format} blocks cross the border of fused layers")
    scale = made.scale.repeat_interleave(height, 0)[: sum(rows)]
    format = replace(made.format, block_size=width)
    return QuantizedTensor(made.codes, scale, made.tensor_scale, format, -1)


def _tokenizer_files(vocabulary: Vocabulary | None) -> dict[str, bytes]:
    if vocabulary is None:
        return {}
    end = vocabulary.tokenizer.id_to_token(vocabulary.eos_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    return {
        "tokenizer.json": vocabulary.json.encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
    }


def check_finite(model: QuantizedModel) -> None:
    """ValueError for a layer with a block that is not finite: no layout says what that is."""
    for name, layer in model.layers.items():
        if not bool(layer.weight.scale_values().isfinite().all()):
            raise ValueError(f"{name} has blocks that are not finite")


def is_run(path: Path) -> bool:
    """Whether it is a run folder."""
    return has_record(path)
