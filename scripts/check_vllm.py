"""Exports inside vLLM on a CPU, beside the decoded BF16 model in transformers; check_vllm.sh runs
it in an environment of vLLM's own, which lowbit is not installed in.

usage: check_vllm.py BF16_FOLDER EXPORT float32|bfloat16
BF16_FOLDER: EXPORT itself where inputs are quantized too; transformers reads it then.

vLLM's loader, configuration and fusion of q/k/v are the stock ones. Its CPU build has no kernels
for most of these formats: stand-ins decode the weight it has fused to BF16, and multiply it in the
engine's dtype. In float32 what is left is the order of sums; in bfloat16 two engines round
different sums to 8 bits: EXPORT = BF16_FOLDER, without any format, shows by how much.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

import compressed_tensors
import torch
import torch.nn.functional as F
import transformers
import vllm
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as emulation
from vllm.platforms import PlatformEnum

PROMPTS, LENGTH = 10, 66
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FUSED = ("model.layers.0.self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"))


def nibbles(packed: Tensor) -> Tensor:
    """Values of E2M1 codes, the low half of each byte first."""
    return E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()]


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes [out, in] times scales [out, in / block], BF16."""
    blocks = codes.float().reshape(*scale.shape, -1) * scale.float()[..., None]
    return blocks.reshape(codes.shape).bfloat16()


def integer_weight(kernel: Any, layer: nn.Module) -> Tensor:
    """Of CompressedTensorsWNA16: I32 [out, in b/32], scales BF16 [out, in/32]."""
    packed, scale = getattr(layer, kernel.w_q_name).data, getattr(layer, kernel.w_s_name).data
    bits = kernel.config.weight_type.size_bits
    fields = packed[..., None] >> torch.arange(0, 32, bits) & 2**bits - 1
    return decoded(fields.flatten(-2) - 2 ** (bits - 1), scale)


def mxfp4_weight(kernel: Any, layer: Any) -> Tensor:
    """Of CompressedTensorsW4A4Mxfp4: U8 [out, in/2], E8M0 [out, in/32]."""
    return decoded(nibbles(layer.weight.data), torch.exp2(layer.weight_scale.data.float() - 127))


def nvfp4_weight(kernel: Any, layer: Any) -> Tensor:
    """Of CompressedTensorsW4A4Fp4, by vLLM's own emulation."""
    above, scale = layer.weight_global_scale, layer.weight_scale.data
    packed = layer.weight.data.view(torch.uint8)
    decode: Callable[..., Tensor] = emulation.dequantize_to_dtype
    return decode(packed, scale, above, torch.bfloat16, 16, swizzle=False)


def stand_in(base: type, weight_of: Callable[[Any, Any], Tensor]) -> type:
    """A kernel for any configuration that decodes once and multiplies in the input's dtype."""

    def keep(self: Any, layer: Any) -> None:
        layer.decoded = nn.Parameter(weight_of(self, layer), requires_grad=False)

    def apply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        above = getattr(layer, "input_global_scale_inv", None)
        if above is not None:  # of nvfp4 activations
            rows = x.reshape(-1, x.shape[-1])
            x = emulation.ref_nvfp4_quant_dequant(rows, above, 16).to(x.dtype).view(x.shape)
        return F.linear(x, layer.decoded.to(x.dtype), bias)

    yes = classmethod(lambda *_: (True, None))
    least = classmethod(lambda _: -1)
    members = {
        "process_weights_after_loading": keep, "apply_weights": apply, "is_supported": yes,
        "can_implement": yes, "get_min_capability": least,
    }  # fmt: skip
    return type(f"Decoding{base.__name__}", (base,), members)


def register() -> None:
    """Stand-ins before vLLM's own, which in their turn would refuse or pack anew."""
    cpu = PlatformEnum.CPU
    own: list[tuple[str, dict[Any, list[type]], type]] = [
        ("int", kernels._POSSIBLE_KERNELS, stand_in(kernels.MPLinearKernel, integer_weight)),
        ("mxfp4", kernels._POSSIBLE_MXFP4_KERNELS,
         stand_in(kernels.MxFp4LinearKernel, mxfp4_weight)),
        ("mxfp8", kernels._POSSIBLE_MXFP8_KERNELS, kernels.EmulationMxfp8LinearKernel),
        ("nvfp4", kernels._POSSIBLE_NVFP4_KERNELS,
         stand_in(kernels.NvFp4LinearKernel, nvfp4_weight)),
    ]  # fmt: skip
    for name, table, kernel in own:
        table[cpu] = [kernel, *table.get(cpu, [])]
        print(f"stand-in for {name}: {kernel.__name__}")
    # without activations vLLM takes Marlin's class by name, on a GPU or not
    for member in ("process_weights_after_loading", "apply_weights", "is_supported"):
        setattr(kernels.MarlinNvFp4LinearKernel, member, own[-1][2].__dict__[member])


def prompts(folder: Path, vocabulary: int) -> Tensor:
    """Token ids [PROMPTS, LENGTH] of a page of ours; random ones without a tokenizer."""
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (PROMPTS, LENGTH), generator=generator)
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text(encoding="utf-8")
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return torch.tensor(found[: PROMPTS * LENGTH]).view(PROMPTS, LENGTH)


@torch.no_grad()
def of_transformers(folder: Path, ids: Tensor, dtype: str) -> Tensor:
    """Log-probabilities of every token but the first, BF16 weights, [PROMPTS, LENGTH - 1]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model(ids[:1])  # compressed weights unpack at the first call
    model.to(getattr(torch, dtype))
    logits = torch.cat([model(row[None]).logits.float() for row in ids])
    found = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return found.squeeze(-1)


def of_vllm(folder: Path, ids: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """The same of vLLM, and the weight of the first fused q/k/v as its kernel multiplies it."""
    engine = vllm.LLM(
        str(folder), dtype=dtype, enforce_eager=True, max_model_len=2 * LENGTH,
        skip_tokenizer_init=True, max_num_seqs=PROMPTS,
    )  # fmt: skip
    asked = [{"prompt_token_ids": row.tolist()} for row in ids]
    parameters = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = engine.generate(asked, parameters, use_tqdm=False)
    found = [
        [
            at[token].logprob
            for at, token in zip(a.prompt_logprobs[1:], row[1:].tolist(), strict=True)
        ]
        for a, row in zip(answers, ids, strict=True)
    ]

    def fused(model: nn.Module) -> Tensor | None:
        layer: Any = model.get_submodule(FUSED[0])
        weight = getattr(layer, "decoded", layer.weight if hasattr(layer, "weight") else None)
        return weight.data.bfloat16() if weight is not None and weight.element_size() > 1 else None

    (weight,) = engine.apply_model(fused)
    return torch.tensor(found), weight


def plain_weight(folder: Path) -> Tensor:
    """The first layer's q, k and v of the BF16 export, one above the other."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    parent = FUSED[0].rpartition(".")[0]
    return torch.cat([tensors[f"{parent}.{name}.weight"] for name in FUSED[1]])


def main() -> int:
    """One export a process: vLLM keeps its state for good."""
    plain, export, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    modules = (vllm, torch, transformers, compressed_tensors)
    print(", ".join(f"{module.__name__} {module.__version__}" for module in modules))
    register()
    config = json.loads((export / "config.json").read_text())
    ids = prompts(export, config["vocab_size"])
    ours = of_transformers(plain, ids, dtype)
    theirs, weight = of_vllm(export, ids, dtype)
    apart = (ours - theirs).abs()
    equal = "not decoded in advance"
    if (
        weight is not None and "quantization_config" in config and plain != export
    ):  # plain ones the CPU packs its way
        equal = "bit-equal" if torch.equal(weight, plain_weight(plain)) else "DIFFERENT"
    format = config.get("quantization_config", {"format": "no format"})["format"]
    print(
        f"{export.name}, {format}, in {dtype}: {apart.numel()} log-probabilities "
        f"{float(apart.mean()):.6f} apart on average, {float(apart.max()):.5f} at most; "
        f"fused q/k/v {equal}"
    )
    return int(equal == "DIFFERENT")


if __name__ == "__main__":
    sys.exit(main())
