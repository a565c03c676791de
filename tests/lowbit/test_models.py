"""Models of others: what is converted is counted where it runs, what is not is named."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lowbit import QuantLinear, QuantRecipe, census, conversion, convert_linears

INT8 = QuantRecipe.uniform("mxint8")
PAIR = ("mxint8", "mxint8")
BLOCKS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
WORDS: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
Case = tuple[nn.Module, Any, int, tuple[str, ...]]  # linear layers, endings of what is named beside
IDS = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Tensor] = {"input_ids": IDS, "labels": IDS}


def llama() -> Case:
    config = transformers.LlamaConfig(**BLOCKS, **WORDS, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), TEXT, 2 * 7 + 1, ()


def gpt2() -> Case:
    """Its layers are Conv1D, but for the head."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **WORDS)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return transformers.GPT2LMHeadModel(config), TEXT, 1, names


def bert() -> Case:
    config = transformers.BertConfig(**BLOCKS, **WORDS, max_position_embeddings=64)
    return transformers.BertForMaskedLM(config), TEXT, 2 * 6 + 2, ()


def vit() -> Case:
    config = transformers.ViTConfig(**BLOCKS, image_size=32, patch_size=8, num_labels=32)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    names = ("embeddings", "patch_embeddings.projection")
    return transformers.ViTForImageClassification(config), batch, 2 * 6 + 1, names


def t5() -> Case:
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0, **WORDS
    )
    return transformers.T5ForConditionalGeneration(config), TEXT, 2 * 6 + 2 * 10 + 1, ()


def mixtral() -> Case:
    """Its experts lie in one tensor."""
    config = transformers.MixtralConfig(
        **BLOCKS, **WORDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    names = ("mlp.gate", "mlp.experts")
    return transformers.MixtralForCausalLM(config), TEXT, 2 * 4 + 1, names


MODELS: dict[str, Callable[[], Case]] = {
    made.__name__: made for made in (llama, gpt2, bert, vit, t5, mixtral)
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_converted_and_counted(name: str) -> None:
    """Every converted layer ran each of its three products once; the witness of what a layer is are
    forward hooks on the model as it was.
    """
    model, batch, linears, others = MODELS[name]()
    called: dict[str, int] = {}
    plain = copy.deepcopy(model)
    for path, module in plain.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(
                lambda *_, path=path: called.update({path: called.get(path, 0) + 1})
            )
    plain(**batch)
    convert_linears(model, INT8)
    report = conversion(model)
    assert set(report.converted) == set(called) and len(called) == linears
    assert all(any(found.endswith(other) for other in others) for found in report.skipped)
    assert {o for o in others if any(f.endswith(o) for f in report.skipped)} == set(others)
    expected = {
        path: {(g, *PAIR): n for g in ("fprop", "dgrad", "wgrad")} for path, n in called.items()
    }
    assert census(model, batch) == expected


@pytest.mark.parametrize("evaluated", [False, True])
def test_nn_transformer_but_for_its_attention(evaluated: bool) -> None:
    """`out_proj` is refused by name; without it all that was converted runs, in evaluation too."""
    model = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    with pytest.raises(ValueError, match=r"layer encoder\.layers\.0\.self_attn\.out_proj: .*skip"):
        convert_linears(model, INT8)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    convert_linears(model, INT8, skip=("*.out_proj",))
    report = conversion(model)
    assert len(report.converted) == 2 * 2 + 2 * 2
    assert {name.rsplit(".", 1)[-1] for name in report.skipped} == {
        "out_proj", "self_attn", "multihead_attn",
    }  # fmt: skip
    model.train(not evaluated)
    counted = census(model, (torch.randn(2, 8, 64), torch.randn(2, 8, 64)))
    assert counted == {
        name: {(gemm, *PAIR): 1 for gemm in ("fprop", "dgrad", "wgrad")}
        for name in report.converted
    }


def test_the_fast_path_of_an_encoder_does_not_pass_the_layers_by() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    convert_linears(layer, INT8, skip=("*.out_proj",))
    seen: list[str] = []
    for name, module in layer.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        layer(torch.randn(2, 8, 64))
    assert seen == ["linear1", "linear2"]


def _lora(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=32, target_modules=["q_proj", "v_proj"])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["adapters", "conversion"])
def test_lora_around_quantized_layers_and_before_them(first: str) -> None:
    """Frozen weights have no wgrad; adapters that were there are converted, later ones stay."""
    model, batch, linears, _ = llama()
    if first == "adapters":
        model = convert_linears(_lora(model), INT8)
        assert len(conversion(model).converted) == linears + 2 * 2 * 2
    else:
        model = _lora(convert_linears(model, INT8))
    counted = census(model, batch)
    trained = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and len(counted) == linears + (8 if first == "adapters" else 0)
    for name, products in counted.items():
        gemms = {gemm for gemm, *formats in products if tuple(formats) == PAIR}
        assert "fprop" in gemms and len(gemms) == len(products)
        assert ("wgrad" in gemms) == (name in trained), name
    assert trained <= set(counted) or first == "conversion"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
    ids=["weight_norm", "parametrizations.weight_norm", "spectral_norm"],
)
def test_a_computed_weight_is_refused_by_the_layers_name(norm: Callable[..., nn.Module]) -> None:
    model, batch, linears, _ = llama()
    norm(model.get_submodule("model.layers.1.mlp.up_proj"))
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: its weight is"):
        convert_linears(model, INT8)
    convert_linears(model, INT8, skip=("*.1.mlp.up_proj",))
    assert len(census(model, batch)) == linears - 1
