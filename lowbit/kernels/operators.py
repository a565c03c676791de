"""The kernels as `torch.library` operators, so that compiled graphs can hold them.

C++ answers for CPU tensors, Triton for CUDA tensors; the names are those of the functions there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit.kernels.cpu import calls as cpu
from lowbit.kernels.layout import LEAST, empty_both


def _like(x: Tensor, format: list[float], dim: int, dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _like_scaled(
    x: Tensor, format: list[float], dim: int, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), _like_scale(x)


def _like_both(
    x: Tensor, formats: list[float], dtypes: list[torch.dtype], *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_both(x, dtypes)


def _like_scale(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _like_codes(x: Tensor, format: list[float], dim: int, *_: Any) -> tuple[Tensor, Tensor]:
    codes, scales = cpu.empty_codes(x, format, dim)
    return codes, scales if dim == 1 else scales.t()


def _like_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


def _on_gpu(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        from lowbit.kernels.gpu import calls as gpu  # needs Triton, which only GPU machines have

        return getattr(gpu, name)(*arguments)

    return run


_OPERATORS: dict[str, Callable[..., Any]] = {
    "quantize(Tensor x, float[] format, int dim, ScalarType dtype, float limit, Tensor? state, "
    "Tensor? first_row) -> Tensor": _like,
    "quantize_scaled(Tensor x, float[] format, int dim, ScalarType dtype, float limit, bool apply, "
    "Tensor? state, Tensor? first_row) -> (Tensor, Tensor)": _like_scaled,
    "quantize_rows(Tensor x, float[] format, int dim, ScalarType dtype, float limit, Tensor above, "
    "Tensor? state, Tensor? first_row) -> Tensor": _like,
    "quantize_both(Tensor x, float[] formats, ScalarType[] dtypes, float[] limits, Tensor?[] "
    "tensor_scales, Tensor?[] noise) -> (Tensor, Tensor)": _like_both,
    f"tensor_scale(Tensor x, float most, float least={LEAST}) -> Tensor": _like_scale,
    "codes(Tensor x, float[] format, int dim, Tensor? tensor_scale, Tensor? state, Tensor? "
    "first_row) -> (Tensor, Tensor)": _like_codes,
    "integer_matmul(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, ScalarType dtype) -> "
    "Tensor": _like_product,
}
_ON_GPU = "quantize", "quantize_scaled", "quantize_rows", "quantize_both", "tensor_scale"
_library: Any = torch.library.Library("lowbit", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's
for _schema, _fake in _OPERATORS.items():
    _name = _schema.split("(")[0]
    _library.define(_schema)
    _library.impl(_name, getattr(cpu, _name), "CPU")
    if _name in _ON_GPU:
        _library.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=_library)
