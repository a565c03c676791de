// Rows under wide scales without a division a value, which takes longer than all else: AVX512-BF16.
#pragma once

#include "scales.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// The general case: not done.
template <bool FLOAT, class In, class Out>
bool multiply(const Rows<In, Out>&, const Format&, float, Scratch&) {
    return false;
}

#ifdef __AVX512BF16__
// 1 / factor, and whether what follows is exact. A remainder is a multiple of the ulps of factor and
// quotient, at least 2^-139 for quotients that do not round to zero: FP32 holds it. Results are
// normal numbers, as AVX512-BF16 makes zeros of others.
bool reciprocals(const Format& f, int64_t n, Scratch& s) {
    const uint32_t* __restrict amax = s.amax.data();
    const float* __restrict factor = s.factor.data();
    float* __restrict inverse = s.inverse.data();
    int32_t unfit = f.is_float && f.min_exponent - f.mantissa_bits < -32;
#pragma omp simd reduction(| : unfit)
    for (int64_t i = 0; i < n; i++) {
        inverse[i] = 1.0f / factor[i];
        unfit |= int32_t(!(factor[i] >= 0x1p-60f)) | int32_t(!(factor[i] <= 0x1p60f));
        unfit |= int32_t(!(as_float(amax[i]) <= factor[i] * 0x1p20f));
    }
    return !unfit;
}

// What sixteen values need to know.
struct Entries {
    __m512 factor, inverse, scale;
};

// `COLUMNS`: each column has its own in the scratch space, else 2^shift share them.
template <bool COLUMNS>
Entries entries(const Scratch& s, int64_t column, int shift) {
    const auto sixteen = [&](const Lines<float>& of) {
        return COLUMNS ? _mm512_loadu_ps(&of[column]) : _mm512_set1_ps(of[column >> shift]);
    };
    return {sixteen(s.factor), sixteen(s.inverse), sixteen(s.scale)};
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

    // 1.5 * 2^23 ulps of the element: adding them rounds to nearest even.
    __m512 far(__m512 y) const {
        if (!FLOAT) return _mm512_castsi512_ps(one);
        const __m512i exponent = _mm512_set1_epi32(0x7F800000);
        const __m512i binade = _mm512_and_si512(_mm512_castps_si512(y), exponent);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_max_epu32(binade, least), to_ulps));
    }

    // x / factor as division rounds it: of a numerator of eight bits, one correction by the remainder
    // makes it so, for all pairs of significands (tests/lowbit/kernels/quotients.cpp).
    static __m512 quotient(__m512 x, const Entries& e) {
        const __m512 near = _mm512_mul_ps(x, e.inverse);
        const __m512 remainder = _mm512_fnmadd_ps(near, e.factor, x);
        return _mm512_fmadd_ps(remainder, e.inverse, near);
    }

    __m512 sixteen(const Bf16* from, const Entries& e) const {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        const __m512 y = quotient(x, e), ulps = far(y);
        const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(y, ulps), ulps);
        const __m512 code = _mm512_range_ps(rounded, max, 2);  // the lesser magnitude
        return _mm512_mul_ps(_mm512_mul_ps(code, e.scale), above);
    }

    __m512i thirty_two(const Bf16* x, const Entries& low, const Entries& high) const {
        const __m512 second = sixteen(x + 16, high), first = sixteen(x, low);
        const __m512i bits = __m512i(_mm512_cvtne2ps_pbh(second, first));  // none is subnormal
        const __m512i sign = _mm512_set1_epi16(-32768);  // of x: zeros have lost it
        return _mm512_ternarylogic_epi32(bits, _mm512_loadu_si512(x), sign, 0xF8);
    }

    // COUNT rows from row `r` on. Several at once are written past the caches where those hold no
    // result anyway: stores that wait for memory block loads at like addresses, a few lines apart.
    template <bool COLUMNS, int COUNT>
    void run(const Rows<Bf16, Bf16>& rows, int64_t r, const Scratch& s) const {
        const Bf16* x = rows.x + r * rows.stride;
        Bf16* out = rows.out + r * rows.out_stride;
        const int shift = __builtin_ctzll(rows.size);
        const bool past_caches = COUNT > 1 && rows.out_is_large && starts_line(out) &&
                                 starts_line(out + rows.out_stride);
        for (int64_t c = 0; c < rows.columns; c += 32) {
            const Entries low = entries<COLUMNS>(s, c, shift);
            const Entries high = entries<COLUMNS>(s, c + 16, shift);
            __m512i found[COUNT];
            for (int i = 0; i < COUNT; i++) found[i] = thirty_two(x + i * rows.stride + c, low, high);
            for (int i = 0; i < COUNT; i++) {
                auto* to = reinterpret_cast<__m512i*>(out + i * rows.out_stride + c);
                past_caches ? _mm512_stream_si512(to, found[i]) : _mm512_storeu_si512(to, found[i]);
            }
        }
    }

    static bool starts_line(const Bf16* out) { return reinterpret_cast<uintptr_t>(out) % 64 == 0; }
};

// Whether it is done.
template <bool FLOAT>
bool multiply(const Rows<Bf16, Bf16>& rows, const Format& f, float above, Scratch& s) {
    const int64_t size = rows.size;
    const bool shared_by_sixteens = size >= 16 && !(size & (size - 1));
    if (rows.columns % 32 || !(size == 1 || shared_by_sixteens) || f.min != -f.max) return false;
    if (!reciprocals(f, (rows.columns + size - 1) / size, s)) return false;
    const Multiplied<FLOAT> values(f, above);
    int64_t r = 0;
    for (; size == 1 && r + TOGETHER <= rows.count; r += TOGETHER)
        values.template run<true, TOGETHER>(rows, r, s);
    for (; r < rows.count; r++)
        size == 1 ? values.template run<true, 1>(rows, r, s)
                  : values.template run<false, 1>(rows, r, s);
    _mm_sfence();  // who waits for this thread sees what went past the caches
    return true;
}
#endif

}  // namespace
