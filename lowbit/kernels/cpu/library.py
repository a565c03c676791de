"""The built library: its structs and functions."""

import ctypes
from functools import lru_cache
from typing import Any

from lowbit.kernels.cpu import build


class Format(ctypes.Structure):
    """`Format` of quantize.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("is_float", "mantissa_bits", "min_exponent")),
        *((name, ctypes.c_float) for name in ("min", "max")),
        *((name, ctypes.c_int32) for name in ("scale", "max_exponent", "carry")),
        *(("least", ctypes.c_float), ("rounding", ctypes.c_int32)),
        *((name, ctypes.c_int32) for name in ("scale_mantissa_bits", "scale_min_exponent")),
        *(("scale_max", ctypes.c_float), ("up", ctypes.c_int32), ("limit", ctypes.c_float)),
    ]


class Job(ctypes.Structure):
    """`Job` of quantize.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out", "scales", "amax")),
        *((n, ctypes.c_int64) for n in ("outer", "rows", "columns", "block_rows", "block_columns")),
        *(("segment", ctypes.c_int64), ("tensor_scale", ctypes.c_void_p)),
        *((name, ctypes.c_int32) for name in ("apply_tensor_scale", "transposed", "scale_lines")),
        *(("key", ctypes.c_uint32), ("first_row", ctypes.c_int64)),
    ]


class Product(ctypes.Structure):
    """`Product` of matmul.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_scales", "b_scales", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "blocks", "size")),
        *((f"{side}_{axis}_step", ctypes.c_int64) for side in "ab" for axis in ("row", "block")),
        *((name, ctypes.c_int32) for name in ("bf16", "threads")),
    ]


@lru_cache
def library() -> ctypes.CDLL:
    """The built kernels."""
    lib = build.load()
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int32
    lib.lowbit_quantize.argtypes = [pointer] * 2 + [number] * 3
    lib.lowbit_quantize.restype = None
    lib.lowbit_quantize_both.argtypes = [pointer] * 4 + [number] * 4
    lib.lowbit_quantize_both.restype = None
    lib.lowbit_integer_matmul.argtypes = [pointer]
    lib.lowbit_errors.argtypes = [pointer] * 2 + [number] * 3 + [pointer]
    lib.lowbit_errors.restype = None
    lib.lowbit_crest_factors.argtypes = [pointer] + [number] * 2 + [pointer]
    lib.lowbit_crest_factors.restype = None
    lib.lowbit_tensor_scale.argtypes = [pointer] + [number] * 2 + [ctypes.c_float]
    lib.lowbit_tensor_scale.restype = None
    return lib
