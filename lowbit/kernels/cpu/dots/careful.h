// Scaled dot products whose factors leave FP32's range on the way to a term that does not. Layouts and
// bits are those of the header before it, which does all others.
#pragma once

#include "panels.h"

namespace {

// Whether dot products times these scales may overflow: none is beyond 2^31.
bool is_huge(const Panel& right, int64_t blocks, int64_t columns) {
    int32_t huge = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t n = 0; n < columns; n++) huge |= right.scales[b * COLUMNS + n] >= 0x1p96f;
    return huge;
}

// sum + dot b a, with the exponents of both scales added up first.
float add_term(float sum, float dot, float b, float a) {
    if (!std::isfinite(a) || !std::isfinite(b)) return sum + dot * b * a;
    int from_a, from_b;
    const float factor = std::frexp(a, &from_a), value = dot * std::frexp(b, &from_b);
    const int exponent = from_a + from_b, near = std::max(-120, std::min(exponent, 120));
    return __builtin_fmaf(std::ldexp(value, exponent - near), std::ldexp(factor, near), sum);
}

int64_t left_at(int64_t m, int64_t k, int64_t size) {
    return GROUPS_LEFT ? (k / GROUP * ROWS + m) * GROUP + k % GROUP : m * size + k;
}

void careful_product(const Shape& shape, const Panel& left, const Panel& right, float* out) {
    std::fill_n(out, ROWS * COLUMNS, 0.0f);
    for (int64_t block = 0; block < shape.blocks; block++) {
        const Panel a = left.from(block, shape.size, ROWS), b = right.from(block, shape.size, COLUMNS);
        for (int64_t i = 0; i < ROWS * COLUMNS; i++) {
            const int64_t m = i / COLUMNS, n = i % COLUMNS;
            int64_t dot = OFFSET_LEFT ? b.starts[n] : 0;
            for (int64_t k = 0; k < shape.size; k++) {
                const Code code = a.codes[left_at(m, k, shape.size)];
                const int64_t value = OFFSET_LEFT ? int64_t(uint8_t(code)) : code;
                dot += value * b.codes[(k / GROUP * COLUMNS + n) * GROUP + k % GROUP];
            }
            out[i] = add_term(out[i], float(dot), b.scales[n], a.scales[m]);
        }
    }
}

}  // namespace
