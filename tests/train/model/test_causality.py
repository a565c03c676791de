"""What a model predicts under the shipped recipes: of no later token with rows' scales; and what is
validated does not depend on the batch.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit import BlockFormat, LayerPolicy, OuterScale, QuantRecipe, Randomness, convert_linears
from train.config.policies import read_policy
from train.config.strict_yaml import read_yaml
from train.model.step import apart, token_losses

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = {path.stem: path for path in sorted((CONFIGS / "recipe").glob("*.yaml"))}
LENGTH = 16


def _policy(name: str) -> LayerPolicy:
    return replace(read_policy(read_yaml(SHIPPED[name])["model"]["policy"]), phases=())


def _by_rows(format: BlockFormat | None) -> BlockFormat | None:
    spans = format is not None and format.outer is OuterScale.TENSOR
    return replace(format, outer_scale=OuterScale.ROW) if format and spans else format


def _causal(recipe: QuantRecipe) -> QuantRecipe:
    return replace(recipe, fprop_input=_by_rows(recipe.fprop_input))


def _model(policy: LayerPolicy) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 256)
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    convert_linears(model, policy, randomness=Randomness(0))
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _changed(tokens: torch.Tensor, at: int) -> torch.Tensor:
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 64
    return changed


@pytest.mark.parametrize("name", SHIPPED)
def test_no_prediction_depends_on_a_later_token_or_another_window(
    name: str, tokens: torch.Tensor
) -> None:
    policy = _policy(name)
    model = _model(replace(policy, recipe=_causal(policy.recipe)))
    before = model(input_ids=tokens).logits
    for at in (3, LENGTH - 1):
        after = model(input_ids=_changed(tokens, at)).logits
        assert torch.equal(after[0, :at], before[0, :at])
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[0, at:], before[0, at:])
    losses = [token_losses(model, part) for part in apart(model, _batch(tokens))]
    assert len(losses) == 1  # all at once


def test_one_scale_for_a_whole_input_lets_the_future_in(tokens: torch.Tensor) -> None:
    """nvfp4.yaml as shipped, its changed token an outlier."""
    model = _model(replace(_policy("nvfp4"), keep_last=0))
    model.model.embed_tokens.weight[5] = torch.eye(256)[0]  # past the norm an outlier
    changed = tokens.clone()
    changed[0, -1] = 5
    before, after = (model(input_ids=x).logits for x in (tokens, changed))
    assert not torch.equal(after[0, :-1], before[0, :-1])
    assert not torch.equal(after[1:], before[1:])


def _batch(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = tokens.roll(-1, 1)
    return {"input_ids": tokens, "labels": labels, "first_sample": torch.tensor(7)}


def test_what_is_validated_does_not_depend_on_the_batch(tokens: torch.Tensor) -> None:
    model = _model(_policy("nvfp4"))
    model.model.embed_tokens.weight[5] = torch.eye(256)[0]  # past the norm an outlier
    own, others = tokens.clone(), tokens.clone()
    others[1:] = 5
    first = []
    for batch in (own, others):
        parts = list(apart(model, _batch(batch)))
        assert [int(part["first_sample"]) for part in parts] == [7, 8, 9]
        losses = torch.cat([token_losses(model, part) for part in parts])
        assert losses.shape == tokens.shape
        first.append(losses[0])
    assert torch.equal(*first)
    at_once = [token_losses(model, _batch(batch))[0] for batch in (own, others)]
    assert not torch.equal(*at_once)
