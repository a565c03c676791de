"""The quantizer in Triton: what quantize.cpp is for CPUs. Bit patterns in, bit patterns out.

Everything that could differ between compilers is done on bits: BF16, rounding, powers of two.
Products of powers of two are exact, so that no contraction to FMA can change a result.
"""

import triton
import triton.language as tl

E8M0: tl.constexpr = tl.constexpr(0)  # places in request.py's lists of scales and roundings
MINIFLOAT: tl.constexpr = tl.constexpr(1)
BF16_SCALE: tl.constexpr = tl.constexpr(2)
NEAREST: tl.constexpr = tl.constexpr(0)
STOCHASTIC: tl.constexpr = tl.constexpr(2)

INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # and all of the exponent's bits
LEAST: tl.constexpr = tl.constexpr(1 << 22)  # 2^-127
GREATEST: tl.constexpr = tl.constexpr(254 << 23)  # 2^127
GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B9)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nan_unless(condition, x):
    return tl.where(condition, x, float("nan"))


@triton.jit
def _at_least(x, low):  # keeps a NaN in `x`, as _at_most does
    return tl.where(x < low, low, x)


@triton.jit
def _at_most(x, high):
    return tl.where(x > high, high, x)


@triton.jit
def _bf16(x):
    """FP32 rounded to the nearest BF16, in the upper half of 32 bits."""
    bits = _bits(x)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000, 0x7FC00000)


@triton.jit
def _mix(x):  # lowbit/definition/noise.py
    x = ((x >> 16) ^ x) * 0x45D9F3B
    x = ((x >> 16) ^ x) * 0x45D9F3B
    return (x >> 16) ^ x


@triton.jit
def _uniform(position, segment, key, first_row):
    row, column = position // segment + first_row, position % segment
    state = row.to(tl.uint32) ^ key.to(tl.uint32)
    state = _mix(_mix(state) ^ ((row >> 32).to(tl.uint32) * GOLDEN))
    drawn = _mix(state ^ (column.to(tl.uint32) * GOLDEN)) >> 8
    return drawn.to(tl.int32).to(tl.float32) * 0.000000059604644775390625  # 2^-24


@triton.jit
def _round_whole(y, noise, ROUNDING: tl.constexpr):
    """To an integer; the sign of zero and a NaN stay."""
    magnitude = tl.abs(y)
    if ROUNDING == NEAREST:
        # adding 2^23 leaves no bit below one, and rounds ties to even
        whole = (magnitude + 8388608.0) - 8388608.0
    else:
        whole = magnitude.to(tl.int32).to(tl.float32)
        remainder = magnitude - whole
        up = (remainder > noise) if ROUNDING == STOCHASTIC else (remainder >= 0.5)
        whole += up.to(tl.float32)
    whole = tl.where(magnitude < 8388608.0, whole, magnitude)
    return _float(_bits(whole) | (_bits(y) & -0x80000000))


@triton.jit
def _round_element(
    y, noise, FLOAT: tl.constexpr, MANTISSA: tl.constexpr, LOW: tl.constexpr, ROUNDING: tl.constexpr
):
    """rounding.py's round_to_element_; LOW is the least exponent of a float."""
    if FLOAT:
        binade = tl.maximum(_bits(y) & INFINITY, (LOW + 127) << 23)
        ulp = binade - (MANTISSA << 23)
        y = _round_whole(y * _float(-ulp + GREATEST), noise, ROUNDING) * _float(ulp)
    else:
        y = _round_whole(y, noise, ROUNDING)
    return y


@triton.jit
def _e8m0(amax, MAX_EXPONENT: tl.constexpr, CARRY: tl.constexpr):
    """scale.py's e8m0_scale, of and as bits; CARRY: what the mantissa may reach."""
    byte = ((amax + (0x7FFFFF - CARRY)) >> 23) - (MAX_EXPONENT - 1)
    if MAX_EXPONENT == 1:
        byte = tl.where(amax > LEAST + CARRY // 2, byte, 0)
    byte = tl.minimum(tl.maximum(byte, 0), 254)
    return tl.maximum(byte << 23, LEAST)


@triton.jit
def _spread(per_block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """One number of each block of R x C, for each value of a tile."""
    shape: tl.constexpr = (ROWS // R, R, COLUMNS // C, C)
    return tl.reshape(tl.broadcast_to(per_block[:, None, :, None], shape), (ROWS, COLUMNS))


@triton.jit
def _quantized(x, noise, above, FORMAT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Code x block scale of a tile of whole blocks, R x C each, under the outer scale `above`."""
    FLOAT: tl.constexpr = FORMAT[0]
    MANTISSA: tl.constexpr = FORMAT[1]
    LOW: tl.constexpr = FORMAT[2]
    MIN: tl.constexpr = FORMAT[3]
    MAX: tl.constexpr = FORMAT[4]
    SCALE: tl.constexpr = FORMAT[5]
    ROUNDING: tl.constexpr = FORMAT[9]
    SCALE_ROUNDING: tl.constexpr = STOCHASTIC if FORMAT[13] else NEAREST  # any remainder sends up
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    magnitude = tl.reshape(_bits(x) & 0x7FFFFFFF, (ROWS // R, R, COLUMNS // C, C))
    bits = tl.max(tl.max(magnitude, axis=3), axis=1)
    finite = bits < INFINITY
    amax = _nan_unless(finite, _float(bits))
    if SCALE == E8M0:
        scale_bits = _e8m0(bits, FORMAT[6], FORMAT[7])
        scale = _nan_unless(finite, _float(scale_bits))
        inverse = tl.maximum((-scale_bits + (GREATEST + LEAST)) & INFINITY, LEAST)
        y = x * _spread(_nan_unless(finite, _float(inverse)), ROWS, COLUMNS, R, C)
        scale = _spread(scale, ROWS, COLUMNS, R, C)
    else:
        scale = tl.div_rn(amax, MAX)
        if SCALE == MINIFLOAT:
            if FORMAT[14]:
                scale = tl.div_rn(scale, above)
            scale = _at_most(_at_least(scale, FORMAT[8]), FORMAT[12])
            scale = _round_element(scale, 0.0, True, FORMAT[10], FORMAT[11], SCALE_ROUNDING)
            divisor = scale * above
        else:
            if SCALE == BF16_SCALE:
                up = _bits(scale) + 0xFFFF & -0x10000
                scale = _at_most(_float(up if FORMAT[13] else _bf16(scale)), FORMAT[12])
            scale = tl.where(scale == 0.0, 1.0, scale)
            divisor = scale
        y = tl.div_rn(x, _spread(divisor, ROWS, COLUMNS, R, C))
        scale = _spread(scale, ROWS, COLUMNS, R, C)
    code = _round_element(y, noise, FLOAT, MANTISSA, LOW, ROUNDING)
    return _at_most(_at_least(code, MIN), MAX) * scale


@triton.jit
def _load(pointer, offset, inside):
    bits = tl.load(pointer + offset, mask=inside, other=0)
    if bits.dtype == tl.int16:
        bits = bits.to(tl.int32) << 16
    return _float(bits)


@triton.jit
def _store(pointer, offset, inside, value, limit):
    value = _at_most(_at_least(value, -limit), limit)
    if pointer.dtype.element_ty == tl.int16:
        tl.store(pointer + offset, (_bf16(value) >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(pointer + offset, _bits(value), mask=inside)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where this program's tile lies: matrix [...,] of the batch, row, column, inside or not."""
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    program = tl.program_id(0).to(tl.int64)
    r = program // across % down * ROWS + tl.arange(0, ROWS)[:, None]
    c = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return program // across // down, r, c, (r < rows) & (c < columns)


@triton.jit
def _above(pointer, outer, r, c, rows, columns, OUTER: tl.constexpr, DOWN: tl.constexpr):
    """The tensor's scale; or of each line of a tile, along its rows or DOWN its columns."""
    if OUTER == 0:
        scale = 1.0
    elif OUTER == 1:
        scale = tl.load(pointer)
    elif DOWN:
        scale = tl.load(pointer + outer * columns + c, mask=c < columns, other=1.0)
    else:
        scale = tl.load(pointer + outer * rows + r, mask=r < rows, other=1.0)
    return scale


@triton.jit(do_not_specialize=["key", "first_row"])
def quantize(
    x, out, above, rows, columns, limit, segment, key, first_row, FORMAT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    APPLY: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """`x` [outer, rows, columns] to `out`, which lies like it, in blocks of R x C.

    Tensors are seen as int16 (BF16) or int32 (FP32). `above` is the tensor scale, multiplied in
    where APPLY, or that of each line along the blocks, which lie DOWN the columns or not; noise is
    drawn by position, in rows of `segment` values.
    """
    outer, r, c, inside = _tile(rows, columns, ROWS, COLUMNS)
    offset = (outer * rows + r) * columns + c
    tensor_scale = _above(above, outer, r, c, rows, columns, FORMAT[14], DOWN)
    noise = _uniform(offset, segment, key, first_row) if FORMAT[9] == STOCHASTIC else 0.0
    value = _quantized(_load(x, offset, inside), noise, tensor_scale, FORMAT, R, C)
    if APPLY:
        value = value * tensor_scale
    _store(out, offset, inside, value, limit)


@triton.jit(do_not_specialize=["key_across", "key_down", "row_across", "row_down"])
def quantize_both(
    x, across, down, above_across, above_down, rows, columns, limit_across, limit_down, key_across,
    key_down, row_across, row_down, ACROSS: tl.constexpr, DOWN: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The matrix `x` in blocks of C along its rows, and of R along its columns: `down` lies
    transposed, [columns, rows].
    """
    _, r, c, inside = _tile(rows, columns, ROWS, COLUMNS)
    offset = r * columns + c
    value = _load(x, offset, inside)
    scale = _above(above_across, 0, r, c, rows, columns, ACROSS[14], False)
    noise = _uniform(offset, columns, key_across, row_across) if ACROSS[9] == STOCHASTIC else 0.0
    _store(across, offset, inside, _quantized(value, noise, scale, ACROSS, 1, C), limit_across)
    scale = _above(above_down, 0, r, c, rows, columns, DOWN[14], True)
    noise = _uniform(offset, columns, key_down, row_down) if DOWN[9] == STOCHASTIC else 0.0
    _store(down, c * rows + r, inside, _quantized(value, noise, scale, DOWN, R, 1), limit_down)


@triton.jit
def finite_amax(x, out, size, SIZE: tl.constexpr):
    """The largest finite magnitude, as bits, to `out`, int32 and zero before."""
    offset = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    magnitude = _bits(_load(x, offset, offset < size)) & 0x7FFFFFFF
    tl.atomic_max(out, tl.max(tl.where(magnitude < INFINITY, magnitude, 0), axis=0))
