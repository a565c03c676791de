"""Tensor scales of NVFP4 as engines store them: divisors, reciprocals of ours, rounded to FP32.

Theirs multiply codes by (scale / divisor), ours by scale x tensor scale. Both are the same BF16
numbers unless a product lies on the border of two of them, as it does for many at once where the
tensor scale has few bits: 7/8192, say, of weights in BF16 whose largest is 2.296875.
"""

import torch
from torch import Tensor

from lowbit import BlockFormat, ScaleFormat
from lowbit.formats import E2M1, E4M3

_SCALES = torch.tensor(E4M3.values[128:]).reshape(-1, 1)  # positive
_CODES = torch.tensor(E2M1.values[8:])
_NEAR = (0, 1, -1, 2, -2)  # steps of FP32


def is_nvfp4(format: BlockFormat) -> bool:
    """Whether engines hold such weights under a divisor."""
    return format.element == E2M1 and format.scale == ScaleFormat.E4M3


def divisor(tensor_scale: Tensor | None) -> Tensor:
    """The reciprocal, F32 [1]: of the numbers next to it the first under which every E4M3 scale
    times every E2M1 code is the same BF16 number as under `tensor_scale`.
    """
    if tensor_scale is None:
        return torch.ones(1)
    nearest = (1 / tensor_scale).reshape(1)
    exact = (step for step in _NEAR if _same(tensor_scale, _moved(nearest, step)))
    return _moved(nearest, next(exact, 0))


def divisible(tensor_scale: Tensor) -> Tensor:
    """The FP32 number nearest to it that has such a divisor: itself, but for one in a hundred."""
    for distance in range(64):
        for step in (distance, -distance) if distance else (0,):
            near = _moved(tensor_scale, step)
            if _same(near, divisor(near)):
                return near
    return tensor_scale


def _moved(x: Tensor, steps: int) -> Tensor:
    return (x.float().view(torch.int32) + steps).view(torch.float32)


def _same(tensor_scale: Tensor, divisor: Tensor) -> bool:
    ours = (_CODES * _SCALES * tensor_scale).bfloat16()
    return torch.equal((_CODES * (_SCALES / divisor)).bfloat16(), ours)
