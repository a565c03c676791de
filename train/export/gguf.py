"""GGUF, llama.cpp's container: mxint8 as Q8_0, mxint4 as Q4_0, mxfp4 as MXFP4, without loss.

| type  | a block of 32                                | exact for                                 |
|-------|----------------------------------------------|-------------------------------------------|
| Q8_0  | F16 scale, 32 codes of 8 bits                | powers of two in 2^-24 .. 2^15            |
| Q4_0  | F16 scale, 16 bytes: code + 8, i and i + 16  | the same                                  |
| MXFP4 | E8M0 scale, 16 bytes: E2M1, i and i + 16     | all                                       |

llama.cpp keeps the rows of each query and key head with the halves of its rotary pairs interleaved.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit import BlockFormat, IntFormat, QuantizedTensor, ScaleFormat
from lowbit.formats import E2M1
from train.export.gguf_file import Stored, Tokens
from train.quantized.layout import StoredLayer
from train.quantized.model import QuantizedModel

NAME = "gguf"
HOLDS = "mxint8, mxint4, mxfp4 without a transform, of Llama models"
_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {"llama", "mistral"}
_F32, _Q4_0, _Q8_0, _BF16, _MXFP4 = 0, 2, 8, 30, 39  # GGML's numbers


def refuse(layer: StoredLayer) -> str | None:
    """Why a layer cannot be written; None if it can."""
    format, width = layer.weight.format, layer.weight.codes.shape[1]
    if _type(format) is None:
        return f"{format} is none of mxint8, mxint4, mxfp4"
    if layer.transform is not None:
        return "its weights are rotated, and no reader of GGUF turns activations"
    if width % 32:
        return f"{width} inputs are no whole blocks of 32"
    if isinstance(format.element, IntFormat):
        used = layer.weight.codes.reshape(len(layer.weight.codes), -1, 32).any(-1)
        exponents = layer.weight.scale[used].int() - 127
        if len(exponents) and not -24 <= int(exponents.min()) <= int(exponents.max()) <= 15:
            least, most = int(exponents.min()), int(exponents.max())
            return f"scales of 2^{least} .. 2^{most} do not fit F16, which ends at 2^-24 and 2^15"
    return None


def refuse_model(model: QuantizedModel) -> str | None:
    """It is written for plain Llama models alone."""
    kind, rope = model.config.get("model_type"), model.config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", "default")
    if kind not in _ARCHITECTURES:
        return f"a {kind} model is not among {', '.join(sorted(_ARCHITECTURES))}"
    if scaled != "default":
        return f"rotary embeddings of type {scaled} are not written"
    unknown = [name for name in (*model.others, *model.layers) if _name(name) is None]
    return f"{unknown[0]} has no place in a plain Llama model" if unknown else None


def _type(format: BlockFormat) -> tuple[int, Callable[[QuantizedTensor], Tensor]] | None:
    if format.scale != ScaleFormat.E8M0 or format.block_size != 32:
        return None
    match format.element:
        case IntFormat(bits=8):
            return _Q8_0, _q8_0
        case IntFormat(bits=4):
            return _Q4_0, _q4_0
        case element if element == E2M1:
            return _MXFP4, _mxfp4
    return None


def _name(name: str) -> str | None:
    """llama.cpp's name of a module or tensor."""
    stem = name.removesuffix(".weight")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    _, _, rest = stem.partition("model.layers.")
    number, _, part = rest.partition(".")
    return f"blk.{number}.{_PARTS[part]}.weight" if number and part in _PARTS else None


def pack(model: QuantizedModel) -> dict[str, Stored]:
    """The tensors of a model that can be written, by llama.cpp's names."""
    stored = {}
    for name, tensor in model.stay().items():
        kind = _F32 if tensor.ndim == 1 else _BF16  # llama.cpp wants norms in F32
        values = tensor.float() if tensor.ndim == 1 else tensor
        stored[_known(name)] = Stored(kind, tuple(values.shape), values.view(torch.uint8))
    for name, layer in model.layers.items():
        known = _type(layer.weight.format)
        assert known is not None  # refuse has been asked
        kind, blocks = known
        shape = layer.weight.codes.shape
        data = blocks(layer.weight).reshape(shape[0], -1)
        if heads := _heads(name, model.config):
            data = _interleaved(data, heads)
        stored[_known(name)] = Stored(kind, tuple(shape), data)
    return stored


def _known(name: str) -> str:
    found = _name(name)
    assert found is not None  # refuse_model has been asked
    return found


def _heads(name: str, config: Any) -> int | None:
    heads = config["num_attention_heads"]
    if name.endswith("q_proj"):
        return int(heads)
    return int(config.get("num_key_value_heads") or heads) if name.endswith("k_proj") else None


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    split = rows.view(heads, 2, len(rows) // heads // 2, -1)
    return split.transpose(1, 2).reshape(rows.shape)


def _blocks(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Codes [blocks, 32], and F16 scales as bytes [blocks, 2]: zero for a block of zeros."""
    codes = weight.codes.reshape(-1, 32)
    scale = torch.where(codes.any(-1), weight.scale_values().reshape(-1), 0.0)
    return codes, scale.half().view(torch.uint8).reshape(-1, 2)


def _q8_0(weight: QuantizedTensor) -> Tensor:
    codes, scale = _blocks(weight)
    return torch.cat([scale, codes.view(torch.uint8)], 1)


def _q4_0(weight: QuantizedTensor) -> Tensor:
    codes, scale = _blocks(weight)
    return torch.cat([scale, _halves((codes + 8).view(torch.uint8))], 1)


def _mxfp4(weight: QuantizedTensor) -> Tensor:
    return torch.cat([weight.scale.reshape(-1, 1), _halves(weight.codes.reshape(-1, 32))], 1)


def _halves(codes: Tensor) -> Tensor:
    return codes[:, :16] | codes[:, 16:] << 4


def metadata(model: QuantizedModel, tokens: Tokens | None) -> dict[str, Any]:
    """What llama.cpp builds a model from."""
    config = model.config
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {
        "general.architecture": "llama",
        "general.name": "lowbit export",
        "general.quantization_version": 2,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": float(theta),
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        **(tokens.metadata(config) if tokens else {"tokenizer.ggml.model": "no_vocab"}),
    }


def notes(tokens: Tokens | None) -> list[str]:
    """What a user has to know."""
    found = ["read by: llama.cpp and what builds on it, gguf, transformers (gguf_file=)"]
    if tokens is None:
        found.append("no tokenizer in the file: GGUF has no name for how this one splits text")
    return found
