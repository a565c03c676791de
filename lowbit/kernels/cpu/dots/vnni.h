// Scaled dot products on AVX-512's byte dot-product instruction, which takes unsigned times signed.
#pragma once

#include "panels.h"

#include <immintrin.h>

namespace {

constexpr int64_t ROWS = 6, COLUMNS = 32;  // 12 dot products and 12 sums leave 8 of 32 registers
using Code = int8_t;
constexpr bool OFFSET_LEFT = true;
constexpr int64_t GROUP = 4;
constexpr bool GROUPS_LEFT = false;
using Panel = PanelOf<Code>;

bool allow_tiles() { return true; }
void set_tiles(const Shape&) {}
void clear_tiles() {}

void span_product(const Shape& shape, const Panel& left, const Panel& right, float* out) {
    __m512 sum[ROWS][2];
    for (auto& row : sum) row[0] = row[1] = _mm512_setzero_ps();
    const int8_t *a = left.codes, *b = right.codes;
    for (int64_t block = 0; block < shape.blocks; block++, a += shape.size * ROWS) {
        __m512i dot[ROWS][2];
        for (int64_t m = 0; m < ROWS; m++)
            for (int half = 0; half < 2; half++)
                dot[m][half] = _mm512_loadu_si512(right.starts + block * COLUMNS + half * 16);
        for (int64_t k = 0; k < shape.size; k += 4, b += 4 * COLUMNS) {
            const __m512i low = _mm512_loadu_si512(b), high = _mm512_loadu_si512(b + 64);
            for (int64_t m = 0; m < ROWS; m++) {
                int32_t four;
                std::memcpy(&four, a + m * shape.size + k, 4);
                const __m512i value = _mm512_set1_epi32(four);
                dot[m][0] = _mm512_dpbusd_epi32(dot[m][0], value, low);
                dot[m][1] = _mm512_dpbusd_epi32(dot[m][1], value, high);
            }
        }
        for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_loadu_ps(right.scales + block * COLUMNS + half * 16);
            for (int64_t m = 0; m < ROWS; m++) {
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][half]), scale);
                const __m512 factor = _mm512_set1_ps(left.scales[block * ROWS + m]);
                sum[m][half] = _mm512_fmadd_ps(value, factor, sum[m][half]);
            }
        }
    }
    for (int64_t m = 0; m < ROWS; m++)
        for (int half = 0; half < 2; half++)
            _mm512_storeu_ps(out + m * COLUMNS + half * 16, sum[m][half]);
}

}  // namespace
