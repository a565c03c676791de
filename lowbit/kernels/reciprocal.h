// Rows under wide scales without divisions, which take longer than all else: with AVX512-BF16.
#pragma once

#include "scales.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// The general case: not done.
template <bool FLOAT, class In, class Out>
bool multiply(const Rows<In, Out>&, const Format&, float, const Scratch&) {
    return false;
}

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES = true;

// What sixteen values need to know.
struct Entries {
    __m512 down, up, factor, scale;
};

// `COLUMNS`: each column has its own in the scratch space, else 2^shift share them.
template <bool COLUMNS>
Entries entries(const Scratch& s, int64_t column, int shift) {
    const auto sixteen = [&](const std::vector<float>& of) {
        return COLUMNS ? _mm512_loadu_ps(&of[column]) : _mm512_set1_ps(of[column >> shift]);
    };
    return {sixteen(s.down), sixteen(s.up), sixteen(s.factor), sixteen(s.scale)};
}

template <bool FLOAT>
struct Multiplied {
    const __m512 max, above;
    const __m512i least, to_ulps, one;

    Multiplied(const Format& f, float tensor_scale)
        : max(_mm512_set1_ps(f.max)), above(_mm512_set1_ps(tensor_scale)),
          least(_mm512_set1_epi32((f.min_exponent + 127) << 23)),
          to_ulps(_mm512_set1_epi32(((23 - f.mantissa_bits) << 23) + (1 << 22))),
          one(_mm512_set1_epi32(as_bits(0x1.8p23f))) {}

    // 1.5 * 2^23 ulps of the element: adding them rounds to nearest even, a fused product once.
    __m512 far(__m512 y) const {
        if (!FLOAT) return _mm512_castsi512_ps(one);
        const __m512i exponent = _mm512_set1_epi32(0x7F800000);
        const __m512i binade = _mm512_and_si512(_mm512_castps_si512(y), exponent);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_max_epu32(binade, least), to_ulps));
    }

    // x / factor, rounded to FP32, lies between x * down and x * up. Where both round to one code,
    // so does it; where they do not, only dividing tells.
    __m512 sixteen(const Bf16* from, const Entries& e) const {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        const __m512 ulps = far(_mm512_mul_ps(x, e.up));
        __m512 sum = _mm512_fmadd_ps(x, e.up, ulps);
        if (__builtin_expect(_mm512_cmpneq_ps_mask(sum, _mm512_fmadd_ps(x, e.down, ulps)), 0))
            sum = _mm512_add_ps(_mm512_div_ps(x, e.factor), ulps);
        const __m512 code = _mm512_range_ps(_mm512_sub_ps(sum, ulps), max, 2);  // least magnitude
        return _mm512_mul_ps(_mm512_mul_ps(code, e.scale), above);
    }

    void thirty_two(const Bf16* x, Bf16* out, const Entries& low, const Entries& high) const {
        const __m512 second = sixteen(x + 16, high), first = sixteen(x, low);
        const __m512i bits = __m512i(_mm512_cvtne2ps_pbh(second, first));  // none is subnormal
        const __m512i sign = _mm512_set1_epi16(-32768);
        const __m512i signed_bits = _mm512_ternarylogic_epi32(  // zeros have lost that of x
            bits, _mm512_loadu_si512(x), sign, 0xF8);
        _mm512_storeu_si512(out, signed_bits);
    }

    // COUNT rows from row `r` on.
    template <bool COLUMNS, int COUNT>
    void run(const Rows<Bf16, Bf16>& rows, int64_t r, const Scratch& s) const {
        const Bf16* x = rows.x + r * rows.stride;
        Bf16* out = rows.out + r * rows.out_stride;
        const int shift = __builtin_ctzll(rows.size);
        for (int64_t c = 0; c < rows.columns; c += 32) {
            const Entries low = entries<COLUMNS>(s, c, shift);
            const Entries high = entries<COLUMNS>(s, c + 16, shift);
            for (int i = 0; i < COUNT; i++)
                thirty_two(x + i * rows.stride + c, out + i * rows.out_stride + c, low, high);
        }
    }
};

// Whether it is done; `reciprocals` has found the scales fit for it.
template <bool FLOAT>
bool multiply(const Rows<Bf16, Bf16>& rows, const Format& f, float above, const Scratch& s) {
    const int64_t size = rows.size;
    const bool shared_by_sixteens = size >= 16 && !(size & (size - 1));
    if (rows.columns % 32 || !(size == 1 || shared_by_sixteens) || f.min != -f.max) return false;
    const Multiplied<FLOAT> values(f, above);
    int64_t r = 0;
    for (; size == 1 && r + TOGETHER <= rows.count; r += TOGETHER)
        values.template run<true, TOGETHER>(rows, r, s);
    for (; r < rows.count; r++)
        size == 1 ? values.template run<true, 1>(rows, r, s)
                  : values.template run<false, 1>(rows, r, s);
    return true;
}
#else
constexpr bool MULTIPLIES = false;
#endif

}  // namespace
