"""NVFP4 as its owners' own code computes it: FP32 in their order of operations, bit for bit.

    torchao             t = amax / 2688                kept for the tensor
                        s = (amax_b / 6) / t           a block's scale, nearest E4M3, from 2^-6 on
                        y = x ((1 / t) / s)            value = code (t s)
    compressed_tensors  g = (1 / amax) 2688            this and amax_b / 6 in BF16 where x is
                        s = g (amax_b / 6)             1/8 where that rounds to 0
                        y = x / (s / g)                value = code (s / g)
    transformer_engine  amax itself                    G = 2688 / amax
                        s = amax_b (G (1 / 6))         0 where that rounds to 0: the block vanishes
                        y = x (1 / (s (1 / G)))        value = code ((s amax) (1 / 2688))

Of torchao 0.18, compressed-tensors' `calculate_qparams` and `fake_quantize`, and Transformer
Engine's PyTorch reference and `dequantize_nvfp4`. Values beyond a dtype are infinite.
"""

import torch
from torch import Tensor

from lowbit.definition.rounding import round_to_element_
from lowbit.formats import Arithmetic, ScaleFormat

OWNERS = (Arithmetic.TORCHAO, Arithmetic.COMPRESSED_TENSORS, Arithmetic.TRANSFORMER_ENGINE)
_MOST = 2688.0  # 448 x 6
_FLOAT32_MAX = torch.finfo(torch.float32).max


def _e4m3(ratio: Tensor, least: float) -> Tensor:
    return round_to_element_(ratio.clamp(least, 448.0), ScaleFormat.E4M3)


def kept(amax: Tensor, owner: Arithmetic, dtype: torch.dtype) -> Tensor:
    """What stands above the block scales, FP32, of a tensor of `dtype` whose largest is `amax`."""
    match owner:
        case Arithmetic.TORCHAO:
            return amax / _MOST
        case Arithmetic.COMPRESSED_TENSORS:
            own = amax.to(dtype).clamp(min=torch.finfo(torch.float32).tiny)
            return torch.nan_to_num(own.reciprocal() * _MOST, nan=1.0, posinf=1.0).float()
    return amax


def block_scale(amax: Tensor, above: Tensor, owner: Arithmetic, dtype: torch.dtype) -> Tensor:
    """E4M3 values of blocks whose largest magnitudes are `amax`; `above` is what is kept."""
    match owner:
        case Arithmetic.TORCHAO:
            return _e4m3(amax / 6 / above, 2.0**-6)
        case Arithmetic.COMPRESSED_TENSORS:
            scale = _e4m3(above * (amax.to(dtype) / 6).float(), 0.0)
            return torch.where(scale == 0, 0.125, scale)
    sixth = torch.tensor(6.0, device=amax.device).reciprocal()
    return _e4m3(amax * (_encoding(above) * sixth), 0.0)


def quotient(x: Tensor, scale: Tensor, above: Tensor, owner: Arithmetic) -> Tensor:
    """`x` in units of its block's scale, within E2M1's range; no zero has a sign but torchao's."""
    match owner:
        case Arithmetic.TORCHAO:
            return (x * ((1.0 / above) / scale)).clamp_(-6.0, 6.0)
        case Arithmetic.COMPRESSED_TENSORS:
            y = x / (scale / above)
        case _:
            y = x * (1.0 / (scale * (1.0 / _encoding(above)))).clamp(max=_FLOAT32_MAX)
    return y.clamp_(-6.0, 6.0).add_(0.0)


def factor(scale: Tensor, above: Tensor, owner: Arithmetic) -> Tensor:
    """What a code is multiplied with, FP32."""
    match owner:
        case Arithmetic.TORCHAO:
            return above * scale
        case Arithmetic.COMPRESSED_TENSORS:
            return scale / above
    return scale * above * torch.tensor(1 / _MOST, device=scale.device)


def _encoding(amax: Tensor) -> Tensor:
    return (amax.new_full((), _MOST) / amax).clamp(max=_FLOAT32_MAX)
