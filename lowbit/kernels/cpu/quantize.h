// What the quantizer's entry points and its inner loops share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct Bf16 {
    uint16_t bits;
};

// A block format, and what saturates its values. kernels/cpu.py holds the same struct.
struct Format {
    int32_t is_float;  // else an integer element
    int32_t mantissa_bits, min_exponent;  // of a float element
    float min, max;  // of the element
    int32_t scale;  // enum Scale
    int32_t max_exponent;  // of the element's max, as frexp has it
    int32_t carry;  // E8M0: the exponent rises where the 23 mantissa bits of amax exceed this
    float least;  // minifloats: the smallest block scale
    int32_t rounding;  // enum Rounding
    int32_t scale_mantissa_bits, scale_min_exponent;  // of a minifloat scale
    float scale_max;
    int32_t up;  // scales are rounded up, else to nearest
    float limit;  // values saturate here
};

enum Scale : int32_t { E8M0, MINIFLOAT, BF16_SCALE, FP32_SCALE };
enum ScaleLines : int32_t { WHOLE, OF_ROWS, OF_COLUMNS };  // [outer, rows]; [outer, columns]
enum Rounding : int32_t { NEAREST, HALF_AWAY, STOCHASTIC };

// One tensor, seen as [outer, rows, columns] in blocks of block_rows x block_columns.
struct Job {
    const void* x;
    void* out;  // null: the values stay in the scratch space
    float* scales;  // of each block, for codes; else null
    void* amax;  // bits of the largest magnitude of each block, in the type of x; null: not kept
    int64_t outer, rows, columns, block_rows, block_columns;
    int64_t segment;  // length of the tensor's own last axis: rows of random numbers
    float* tensor_scale;  // NV formats, else null; of each line where scale_lines says so
    int32_t apply_tensor_scale;  // multiply it into the values
    int32_t transposed;  // write [columns, rows]
    int32_t scale_lines;  // enum ScaleLines
    uint32_t key;
    int64_t first_row;
};

constexpr uint32_t GOLDEN = 0x9E3779B9u;

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint32_t max_u(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Both keep a NaN in `v`.
inline float at_least(float v, float low) { return v < low ? low : v; }
inline float at_most(float v, float high) { return v > high ? high : v; }

inline float load(float v) { return v; }
inline float load(Bf16 v) { return as_float(uint32_t(v.bits) << 16); }

inline uint32_t magnitude(float v) { return as_bits(v) & 0x7FFFFFFFu; }
inline uint16_t magnitude(Bf16 v) { return v.bits & 0x7FFFu; }
inline uint32_t widen(uint32_t m) { return m; }
inline uint32_t widen(uint16_t m) { return uint32_t(m) << 16; }
constexpr uint32_t INFINITE = 0x7F800000u;  // and NaN above

// To nearest even, above bits that do not count; a NaN stays one, since none here has low bits that could
// carry out of it.
inline uint32_t rounded_to_bf16(float v) {
    uint32_t bits = as_bits(v);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
}
inline uint32_t bf16_bits(float v) { return rounded_to_bf16(v) >> 16; }

template <bool EXACT>
inline void store(float* out, float v) { *out = v; }
template <bool EXACT>
inline void store(Bf16* out, float v) {
    out->bits = uint16_t(EXACT ? as_bits(v) >> 16 : bf16_bits(v));
}

inline uint32_t mix(uint32_t x) {  // lowbit/definition/noise.py
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    x = ((x >> 16) ^ x) * 0x45D9F3Bu;
    return (x >> 16) ^ x;
}

inline float uniform(uint32_t row_state, uint32_t column) {
    return float(int32_t(mix(row_state ^ (column * GOLDEN)) >> 8)) * 0x1p-24f;
}

// 2^floor(log2 |y|) but at least the smallest normal, over the mantissa: an ulp, as bits.
inline uint32_t ulp_bits(float y, const Format& f) {
    uint32_t binade = as_bits(y) & 0x7F800000u;
    return max_u(binade, uint32_t(f.min_exponent + 127) << 23) - (uint32_t(f.mantissa_bits) << 23);
}

template <int ROUNDING>
inline float round_whole(float y, float noise) {
    if (ROUNDING == NEAREST) return __builtin_rintf(y);
    float whole = __builtin_truncf(y);
    float remainder = __builtin_fabsf(y - whole);
    bool up = ROUNDING == HALF_AWAY ? remainder >= 0.5f : remainder > noise;
    return whole + __builtin_copysignf(up ? 1.0f : 0.0f, y);
}

// rounding.py's round_to_element
template <bool FLOAT, int ROUNDING>
inline float round_element(float y, const Format& f, float noise) {
    if (!FLOAT) return round_whole<ROUNDING>(y, noise);
    uint32_t ulp = ulp_bits(y, f);
    float inverse = as_float(0x7F000000u - ulp);  // exact: ulp is a power of two
    return round_whole<ROUNDING>(y * inverse, noise) * as_float(ulp);
}
