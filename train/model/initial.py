"""The weights a run starts from, and their hash: what makes two runs a pair."""

import copy
import hashlib

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def empty_model(llama: LlamaConfig) -> LlamaForCausalLM:
    """Names and shapes on the meta device: no memory, whatever the size."""
    config = copy.deepcopy(llama)  # transformers writes into the one it gets
    config.use_cache = False
    _check(config)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """FP32 weights on the CPU that depend on `seed` alone, whatever device will train them."""
    context = torch.get_default_dtype()  # Lightning's: bfloat16 with precision bf16-true
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(context)


def pretrained_model(source: str, config: LlamaConfig) -> LlamaForCausalLM:
    """FP32 weights of a folder or a hub id, of the shape that `config` says."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    _check_same_shape(config, model.config, source)
    model.config.use_cache = False
    model.train()  # from_pretrained leaves dropout off
    return model


def _check(config: LlamaConfig) -> None:
    """What LlamaConfig accepts and LlamaForCausalLM cannot run."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    if min(heads, kv_heads, config.vocab_size, config.num_hidden_layers) < 1:
        raise ValueError(f"heads, kv heads, vocabulary and layers must be positive: {config}")
    assert config.hidden_size is not None
    if config.hidden_size % heads or heads % kv_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads={heads}, "
            f"and that of num_key_value_heads={kv_heads}"
        )


def _check_same_shape(wanted: LlamaConfig, found: LlamaConfig, source: str) -> None:
    fields = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
    )
    for name in fields:
        if getattr(wanted, name) != getattr(found, name):
            raise ValueError(
                f"init_from={source} has {name}={getattr(found, name)}, the model's configuration "
                f"says {getattr(wanted, name)}"
            )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
