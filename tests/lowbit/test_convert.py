"""Converting a model: what is swapped, what is shared, what is refused with the model unchanged."""

import pytest
from torch import nn

from lowbit import LayerPolicy, LayerRule, QuantLinear, QuantRecipe, convert_linears
from lowbit.formats import MXINT8

RECIPE = QuantRecipe.uniform("mxint8")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.lm_head = nn.Linear(32, 7)


def quantized(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]


def test_parameters_are_shared_and_keys_stay() -> None:
    model = Model()
    before = dict(model.named_parameters())
    convert_linears(model, RECIPE, skip=("lm_head",))
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert len(quantized(model)) == 8
    assert type(model.lm_head) is nn.Linear


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match="'lm_haed' matches no linear layer"):
        convert_linears(model, RECIPE, skip=("lm_haed",))
    assert not quantized(model)


def test_a_width_no_block_divides_is_refused_by_layer_name() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"lm_head: out_features=7 .* dgrad_\w+=mxint8.* 32"):
        convert_linears(model, RECIPE)
    assert not quantized(model)


def test_first_match_wins_and_kept_blocks_stay() -> None:
    model = Model()
    other = QuantRecipe(fprop_input=MXINT8)
    policy = LayerPolicy(
        name="p",
        recipe=RECIPE,
        rules=(LayerRule("*.down", other), LayerRule("layers.1.*", QuantRecipe())),
        keep_first=1,
        keep_last=1,
    )
    convert_linears(model, policy)
    assert quantized(model) == ["layers.1.up", "layers.1.down", "layers.2.up", "layers.2.down"]
    assert model.get_submodule("layers.1.down").recipe == other
    assert model.get_submodule("layers.1.up").recipe == QuantRecipe()
    assert model.get_submodule("layers.2.up").recipe == RECIPE


@pytest.mark.parametrize("kept", [{"keep_first": 5}, {"keep_first": 3, "keep_last": 2}])
def test_more_kept_blocks_than_there_are(kept: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="of 4 blocks"):
        LayerPolicy("p", RECIPE, **kept).resolve(Model())


def test_stochastic_rounding_needs_a_source_of_randomness() -> None:
    from lowbit import block_format
    from lowbit.formats import Rounding

    format = block_format("mxint8", rounding=Rounding.STOCHASTIC)
    with pytest.raises(ValueError, match="needs randomness"):
        convert_linears(Model(), QuantRecipe.uniform(format), skip=("lm_head",))
