"""The weights a run starts from, and their hash: what makes two runs a pair."""

import copy
import hashlib
import math
import re
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from data.plain import explained
from data.pretrained import ask_hub_once
from train.model.controls import Control, perturb
from train.runs.exports import check_export

# of a configuration, on what trained weights compute; dropout is the training's own
OF_NO_EFFECT = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("attention_dropout", "model_type"),
}
_UNSET: tuple[Any, ...] = (None, False, 0, 1, "", [], {})
#: spelt otherwise before transformers 5, about tokens alone, or how something is run
_ASIDE = re.compile(
    r"_.*|(transformers|unsloth|tokenizer|is_llama).*|torch_dtype|rope_(theta|scaling)"
    r"|.*(max_length|max_sequence_length|attn_implementation)"
)


class InitialWeights:
    """Of one run: random, or those of `init_from`, and disturbed where that is the control."""

    def __init__(
        self, config: LlamaConfig, seed: int, init_from: str | None, control: Control | None
    ) -> None:
        self._config, self._seed, self._init_from, self._control = config, seed, init_from, control
        self._read: LlamaForCausalLM | None = None
        self.replaced = False  #: by a checkpoint's, once they are there
        self.hash: str | None = None  #: of those drawn last, where they were asked for with it

    def read(self) -> None:
        """Read those of `init_from` now: what is wrong with them is said before a start."""
        if self._init_from:
            self._read = pretrained_model(self._init_from, self._config)

    def draw(self, *, hashed: bool = True) -> LlamaForCausalLM:
        """Random ones also where a checkpoint's will replace them: `init_from` may be gone."""
        if not self.replaced and self._read is None:
            self.read()
        model, self._read = self._read or random_model(self._config, self._seed), None
        if self._control == "perturbed":
            perturb(model, self._seed)
        if hashed and not (self._init_from and self.replaced):
            self.hash = weights_hash(model)
        return model


class Undrawn(LightningModule):
    """A module whose weights may not be there yet."""

    def cpu(self) -> Self:
        """Lightning's end of a run, also of one that failed before it had weights: there it would
        raise, and what failed would never be said.
        """
        return self if any(p.is_meta for p in self.parameters()) else super().cpu()


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
    """FP32 weights of a folder or a hub id, a Llama that is in every field what `config` says.

    Raises ValueError for another architecture, and for a tensor too many, too few or of another
    shape, before and after the weights are read.
    """
    check_source(source, config)
    check_export(Path(source))
    with explained(f"init_from={source} cannot be read"):
        loaded: Any = LlamaForCausalLM.from_pretrained(
            source, config=copy.deepcopy(config), dtype=torch.float32, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    model: LlamaForCausalLM = loaded[0]
    report = loaded[1]
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, report[f"{kind}_keys"])):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"init_from={source}: {kind} tensors {', '.join(keys[:3])}{more}")
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(f"init_from={source} is tied and has an lm_head.weight of its own")
    model.train()  # from_pretrained leaves dropout off
    return model


def check_source(source: str, config: LlamaConfig) -> None:
    """Raise ValueError, field by field, unless the model at `source` is the Llama of `config`."""
    if not Path(source).exists():
        ask_hub_once()
    with explained(f"init_from={source} cannot be read"):
        found = AutoConfig.from_pretrained(source, trust_remote_code=False)
    kinds = [*map(str, found.architectures or ["LlamaForCausalLM"])]
    if found.model_type != "llama" or kinds != ["LlamaForCausalLM"]:
        raise ValueError(
            f"init_from={source} is a {found.model_type} ({', '.join(kinds)}), expected a llama "
            "(LlamaForCausalLM)"
        )
    if getattr(found, "quantization_config", None):
        raise ValueError(f"init_from={source} holds quantized weights: expected floating point")
    theirs, ours = found.to_dict(), config.to_dict()
    _check_known(source, theirs)
    fields = LlamaConfig().to_dict().keys() - OF_NO_EFFECT
    if differs := [name for name in sorted(fields) if theirs.get(name) != ours.get(name)]:
        has, says = (
            ", ".join(f"{n}={str(o.get(n))[:40]}" for n in differs) for o in (theirs, ours)
        )
        raise ValueError(f"init_from={source} has {has}; model.llama says {says}")


def _check_known(source: str, theirs: dict[str, Any]) -> None:
    """ValueError for a field that some other model computed with, and no Llama does."""
    known = LlamaConfig().to_dict().keys()
    others = {n: v for n, v in sorted(theirs.items()) if n not in known and not _ASIDE.fullmatch(n)}
    if said := [f"{n}={str(v)[:40]}" for n, v in others.items() if v is True or v not in _UNSET]:
        raise ValueError(
            f"init_from={source} has {', '.join(said[:3])}, of which a Llama knows nothing: the "
            "weights would compute something else"
        )


def _check(config: LlamaConfig) -> None:
    """What LlamaConfig accepts and LlamaForCausalLM cannot run."""
    if config.pad_token_id is not None:
        raise ValueError(
            f"model.llama.pad_token_id={config.pad_token_id} would keep that token's embedding at "
            "0: windows are never padded, leave it out"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or 0
    if min(heads, kv_heads, config.vocab_size, config.num_hidden_layers) < 1:
        raise ValueError(f"heads, kv heads, vocabulary and layers must be positive: {config}")
    for name, low, below in (
        ("attention_dropout", 0, 1),
        ("initializer_range", 0, math.inf),
        ("rms_norm_eps", 0, math.inf),
        ("max_position_embeddings", 1, math.inf),
        ("intermediate_size", 1, math.inf),
    ):
        value = getattr(config, name)
        if not low <= value < below:
            raise ValueError(f"model.llama.{name}={value}: expected {low} to below {below}")
    assert config.hidden_size is not None
    if config.hidden_size % heads or heads % kv_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads={heads}, "
            f"and that of num_key_value_heads={kv_heads}"
        )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
