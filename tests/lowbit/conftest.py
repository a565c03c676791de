"""An independent reference in numpy: grids from ml_dtypes, float64 exponents, nearest by search."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from lowbit import kernels
from lowbit.formats import BlockFormat, IntFormat, Rounding, ScaleFormat, ScaleRule

settings.register_profile("lowbit", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("lowbit")

FLOATS = {
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
# significant bits below the leading one, of the largest magnitude
MANTISSA_BITS = {8: 6, 6: 4, 4: 2} | {name: ml_dtypes.finfo(t).nmant for name, t in FLOATS.items()}


@pytest.fixture
def definition() -> Iterator[None]:
    """The plain PyTorch implementation, no kernel in its place."""
    with kernels.using("off"):
        yield


def _grid(format: BlockFormat) -> tuple[np.ndarray, int]:
    """Magnitudes of codes, ascending (an even index is an even code), and mantissa bits."""
    if isinstance(format.element, IntFormat):
        bits = format.element.bits
        return np.arange(2.0 ** (bits - 1)), MANTISSA_BITS[bits]
    dtype = FLOATS[format.name]
    patterns = np.arange(2 ** (ml_dtypes.finfo(dtype).bits - 1), dtype=np.uint8)
    values = patterns.view(dtype).astype(np.float64)
    return values[np.isfinite(values)], MANTISSA_BITS[format.name]


def _exponent(amax: np.ndarray, format: BlockFormat) -> np.ndarray:
    """The exponent each rule's formula gives, found by comparing with exact powers of two."""
    grid, mantissa_bits = _grid(format)
    biggest, emax = grid[-1], math.floor(math.log2(grid[-1]))
    candidates = np.arange(-200, 200)
    powers = np.exp2(candidates.astype(np.float64))
    match format.scale_rule:
        case ScaleRule.RCEIL:
            found = np.searchsorted(biggest * powers, amax)  # the first that is not below amax
        case ScaleRule.CEIL:
            found = np.searchsorted(powers * 2.0**emax, amax)
        case rule:
            if rule is ScaleRule.EVEN:
                step = np.exp2(np.frexp(amax)[1] - 1.0 - mantissa_bits)
                amax = np.floor(amax / step + 0.5) * step
            found = np.searchsorted(powers * 2.0**emax, amax, side="right") - 1  # not above amax
    return np.clip(candidates[found], -127, 127)


def _nearest(y: np.ndarray, format: BlockFormat) -> np.ndarray:
    """The grid value nearest to each y; of two, the one of even code, or the outer one."""
    grid, _ = _grid(format)
    magnitude = np.minimum(np.abs(y), grid[-1])
    above = np.searchsorted(grid, magnitude).clip(1)
    below = above - 1
    to_above, to_below = grid[above] - magnitude, magnitude - grid[below]
    prefers_above = above % 2 == 0
    if format.rounding is Rounding.HALF_AWAY:
        prefers_above = np.ones_like(prefers_above)
    up = (to_above < to_below) | ((to_above == to_below) & prefers_above)
    return np.copysign(np.where(up, grid[above], grid[below]), y)


@dataclass(frozen=True)
class Reference:
    """Values, and scales by block (E8M0 exponents as floats)."""

    values: np.ndarray
    scale: np.ndarray


def _reference_blocks(blocks: np.ndarray, format: BlockFormat) -> Reference:
    """float32 [blocks, size] -> values; float64 throughout but where FP32 is what is meant."""
    finite = np.isfinite(blocks).all(1, keepdims=True)
    clean = np.where(finite, blocks, np.float32(1))
    amax = np.abs(clean).max(1, keepdims=True)
    above = np.float32(1)
    match format.scale:
        case ScaleFormat.E8M0:
            scale = np.exp2(np.where(amax == 0, -127.0, _exponent(amax.astype(np.float64), format)))
            y = clean.astype(np.float64) / scale
        case ScaleFormat.E4M3:
            biggest = np.float32(_grid(format)[0][-1])
            finite_amax = np.abs(blocks[np.isfinite(blocks)]).max(initial=0)
            above = max(finite_amax / (np.float32(448) * biggest), np.float32(2.0**-117))
            ratio = np.clip(amax / biggest / above, np.float32(2.0**-9), np.float32(448))
            scale = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            y = clean / (scale * above)
        case _:
            scale = amax / np.float32(_grid(format)[0][-1])
            if format.scale is ScaleFormat.BF16:
                scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
            scale = np.where(scale == 0, np.float32(1), scale)
            y = clean / scale
    codes = _nearest(y.astype(np.float64), format)
    values = codes * scale.astype(np.float64)
    if format.scale is ScaleFormat.E4M3:
        values = values.astype(np.float32) * above
    limit = np.finfo(np.float32).max
    values = np.clip(values, -limit, limit).astype(np.float32)
    return Reference(np.where(finite, values, np.float32(np.nan)), np.where(finite, scale, np.nan))


@pytest.fixture(scope="session")
def reference() -> Callable[..., Tensor]:
    """reference(x, format, dim): what fake_quantize of FP32 `x` should be."""

    def quantize(x: Tensor, format: BlockFormat, dim: int = -1) -> Tensor:
        rows = x.movedim(dim, -1).numpy()
        size = rows.shape[-1] if format.block_size == -1 else format.block_size
        padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % size)])
        values = _reference_blocks(padded.reshape(-1, size), format).values
        return torch.from_numpy(values.reshape(padded.shape)[..., : rows.shape[-1]].copy()).movedim(
            -1, dim
        )

    return quantize


@pytest.fixture(scope="session")
def wide() -> Callable[..., Tensor]:
    """wide(rows, columns, decades): Gaussian values whose sizes span so many powers of ten."""

    def draw(rows: int, columns: int, decades: float = 12.0, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) - 0.5

        # most of the spread is between blocks, some of it inside them
        exponents = 0.8 * decades * uniform(rows, columns // 16, 1) + 0.2 * decades * uniform(
            rows, columns // 16, 16
        )
        return torch.randn(rows, columns, generator=generator) * 10.0 ** exponents.reshape(
            rows, columns
        )

    return draw


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Equal shape, dtype, values and signs of zero; any NaN equals any NaN."""

    def same(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        equal = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
        return bool(equal.all())

    return same
