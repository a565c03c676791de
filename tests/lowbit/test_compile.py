"""The definition under torch.compile: one graph, the same bits, no compilation per step."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lowbit import Arithmetic, BlockFormat, Key, Rounding, ScaleFormat, ScaleRule, fake_quantize
from lowbit.formats import INT8, MXFP8, MXFP8_E5M2, MXINT8, NAMED, NVFP4, NVINT8

pytestmark = pytest.mark.usefixtures("definition")

# importing inductor's C++ back end warns about torch.jit
inductor = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STOCHASTIC = replace(MXFP8, rounding=Rounding.STOCHASTIC)
ALL = [
    *NAMED.values(),
    # a rule knows of an element its largest value and its bits: each rule with both kinds
    *(
        replace(format, scale_rule=rule)
        for format, rule in zip(
            (f for f in NAMED.values() if f.scale_rule), cycle(list(ScaleRule)[1:])
        )
    ),
    *(replace(format, rounding=Rounding.HALF_AWAY) for format in (MXINT8, MXFP8, NVFP4)),
    *(replace(f, arithmetic=Arithmetic.BF16) for f in (MXINT8, MXFP8_E5M2, NVINT8)),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32),
    replace(INT8, scale=ScaleFormat.BF16, block_size=32, arithmetic=Arithmetic.BF16),
    replace(MXINT8, block_size=(16, 16)),
    STOCHASTIC,
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _hard(wide: Callable[..., Tensor]) -> Tensor:
    x = wide(40, 80, 85.0)
    x[3] = 0.0
    x[5] = -0.0
    x[7, 11] = torch.nan
    return x


def _check(
    format: BlockFormat, cases: list[tuple[int, Tensor]], same_bits: Callable[..., bool], **how: Any
) -> None:
    """One graph for all cases, (dim, x)."""
    key = Key.of(0).fold(1) if format.rounding is Rounding.STOCHASTIC else None

    def function(*xs: Tensor) -> list[Tensor]:
        return [fake_quantize(x, format, cases[i][0], key=key) for i, x in enumerate(xs)]

    inputs = [x for _, x in cases]
    compiled = torch.compile(function, fullgraph=True, dynamic=False, **how)(*inputs)
    for (dim, x), ours, eager in zip(cases, compiled, function(*inputs), strict=True):
        assert same_bits(ours, eager), (format, dim, x.dtype)


# the slow tier compiles all of them whole
@pytest.mark.parametrize("format", [MXINT8, MXFP8, NVFP4, *ALL[-5:]], ids=str)
def test_every_scale_traces_as_one_graph(format: BlockFormat, wide: Any, same_bits: Any) -> None:
    _check(format, [(0, _hard(wide))], same_bits, backend="eager")


@inductor
@pytest.mark.slow
def test_rows_of_two_and_a_half_blocks(wide: Any, same_bits: Any) -> None:
    """Inductor 2.13 cuts their loop to 2 blocks (see `from_blocks`)."""
    _check(replace(NVFP4, block_size=32), [(1, _hard(wide).bfloat16())], same_bits)


@inductor
@pytest.mark.slow
@pytest.mark.parametrize("format", ALL, ids=str)
def test_every_format_compiled_equals_eager(format: BlockFormat, wide: Any, same_bits: Any) -> None:
    """Both dimensions and both dtypes once: what differs in the graphs differs there."""
    x = _hard(wide)
    cases = [(1, x.bfloat16()), (0, x)]
    alone = format.rounding is Rounding.STOCHASTIC  # the graph of the noise is large
    _check(format, cases[:1] if alone else cases, same_bits)


def test_a_new_step_or_row_does_not_compile_again() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x: Tensor, step: Tensor, row: Tensor) -> Tensor:
        return fake_quantize(x, STOCHASTIC, key=Key.of(0).fold(step).fold(7).at(row))

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        row = 4 * step
        y = compiled(x, torch.tensor(step), torch.tensor(row))
        key = Key.of(0).fold(step).fold(7).at(row)
        assert torch.equal(y, fake_quantize(x, STOCHASTIC, key=key))
    assert counter.frame_count == 1
