// Scaled dot products in plain C++, which compilers vectorise.
#pragma once

#include "panels.h"

#include <algorithm>

namespace {

constexpr int64_t ROWS = 16, COLUMNS = 16;
using Code = int8_t;
constexpr bool OFFSET_LEFT = false;
constexpr int64_t GROUP = 4;
constexpr bool GROUPS_LEFT = false;
using Panel = PanelOf<Code>;

bool allow_tiles() { return true; }
void set_tiles(const Shape&) {}
void clear_tiles() {}

void span_product(const Shape& shape, const Panel& left, const Panel& right, float* out) {
    std::fill_n(out, ROWS * COLUMNS, 0.0f);
    for (int64_t block = 0; block < shape.blocks; block++) {
        const int8_t* a = left.codes + block * shape.size * ROWS;
        const float *a_scale = left.scales + block * ROWS, *b_scale = right.scales + block * COLUMNS;
        for (int64_t m = 0; m < ROWS; m++, a += shape.size) {
            const int8_t* b = right.codes + block * shape.size * COLUMNS;
            int32_t dots[COLUMNS] = {};
            for (int64_t k = 0; k < shape.size; k += 4, b += 4 * COLUMNS)
                for (int64_t n = 0; n < COLUMNS; n++)
                    for (int64_t i = 0; i < 4; i++) dots[n] += int32_t(a[k + i]) * b[4 * n + i];
            float* sum = out + m * COLUMNS;
            for (int64_t n = 0; n < COLUMNS; n++)
                sum[n] = __builtin_fmaf(float(dots[n]) * b_scale[n], a_scale[m], sum[n]);
        }
    }
}

}  // namespace
