// Scaled dot products on 256-bit vectors: of bytes where AVX-VNNI is there, unsigned times signed, else
// of pairs of 16-bit values. AVX2's product of bytes adds two in 16 bits: exact for codes up to 127 in
// magnitude (2 x 127 x 127 = 32258), not for two of -128 (32768), and it wants a magnitude and a sign:
// as many instructions, more of them on the two ports that multiply.
#pragma once

#include "panels.h"

#include <algorithm>

#include <immintrin.h>

namespace {

// 12 dot products, two vectors of b, one of a and a product fill 16 registers; sums stay in memory.
constexpr int64_t ROWS = 6, COLUMNS = 16;
#ifdef __AVXVNNI__
using Code = int8_t;
constexpr bool OFFSET_LEFT = true;
#else
using Code = int16_t;
constexpr bool OFFSET_LEFT = false;
#endif
constexpr int64_t GROUP = 4 / sizeof(Code);
constexpr bool GROUPS_LEFT = true;
using Panel = PanelOf<Code>;

bool allow_tiles() { return true; }
void set_tiles(const Shape&) {}
void clear_tiles() {}

inline __m256i add_products(__m256i dot, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(dot, a, b);
#else
    __m256i product;
    // Together, or GCC multiplies ahead, and dot products must leave their registers.
    asm("vpmaddwd %[b], %[a], %[product]\n\tvpaddd %[product], %[dot], %[dot]"
        : [dot] "+x"(dot), [product] "=&x"(product)
        : [a] "x"(a), [b] "x"(b));
    return dot;
#endif
}

inline __m256i load_eight(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// SIZE where the compiler shall know it.
template <int64_t SIZE>
void block_product(int64_t given, const Panel& left, const Panel& right, float* out) {
    const int64_t size = SIZE ? SIZE : given;
    const Code *a = left.codes, *b = right.codes;
    __m256i dot[ROWS][2];
    for (int half = 0; half < 2; half++)
        for (auto& row : dot)
            row[half] = OFFSET_LEFT ? load_eight(right.starts + half * 8) : _mm256_setzero_si256();
    for (int64_t k = 0; k < size; k += GROUP, a += GROUP * ROWS, b += GROUP * COLUMNS) {
        const __m256i low = load_eight(b), high = load_eight(b + GROUP * 8);
        for (int64_t m = 0; m < ROWS; m++) {
            int32_t group;
            std::memcpy(&group, a + m * GROUP, 4);
            const __m256i value = _mm256_set1_epi32(group);
            dot[m][0] = add_products(dot[m][0], value, low);
            dot[m][1] = add_products(dot[m][1], value, high);
        }
    }
    for (int half = 0; half < 2; half++) {
        const __m256 scale = _mm256_loadu_ps(right.scales + half * 8);
        for (int64_t m = 0; m < ROWS; m++) {
            float* sum = out + m * COLUMNS + half * 8;
            const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[m][half]), scale);
            const __m256 factor = _mm256_set1_ps(left.scales[m]);
            _mm256_storeu_ps(sum, _mm256_fmadd_ps(value, factor, _mm256_loadu_ps(sum)));
        }
    }
}

void span_product(const Shape& shape, const Panel& left, const Panel& right, float* out) {
    std::fill_n(out, ROWS * COLUMNS, 0.0f);
    const auto product = shape.size == 32 ? block_product<32> : block_product<0>;
    for (int64_t block = 0; block < shape.blocks; block++)
        product(shape.size, left.from(block, shape.size, ROWS),
                right.from(block, shape.size, COLUMNS), out);
}

}  // namespace
