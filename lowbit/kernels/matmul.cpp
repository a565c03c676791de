// Product of integer block operands: int32 within a block, FP32 across blocks, in ascending order, so
// that the bits depend neither on the number of threads nor on the instructions used.
//
//     out[m, n] = sum over blocks of  a_scale[m, block] b_scale[n, block]  sum of a[m, k] b[n, k]
//
// Operands are packed in panels of 16 rows. A panel of `a` holds, block by block, 16 rows; a panel of
// `b` holds, block by block, four values of each of 16 rows at a time, as dot-product units read them.

#include "dots.h"

#include <vector>

namespace {

struct Side {
    const int8_t* codes;  // [rows, blocks x size]
    const float* scales;  // of row r and block b at r * row_step + b * block_step
    int64_t rows, row_step, block_step;
    std::vector<int8_t> packed;
    std::vector<float> packed_scales;  // [panels, blocks, 16]

    int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
};

// `step` values of a row lie together.
void pack_panel(Side& side, const Shape& shape, int64_t panel, int64_t step) {
    const int64_t rows = std::min(PANEL, side.rows - panel * PANEL), depth = shape.blocks * shape.size;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = panel * PANEL + r;
        const int8_t* from = side.codes + row * depth;
        int8_t* to = side.packed.data() + panel * shape.panel() + r * step;
        const auto copy = [&](auto size) {
            for (int64_t k = 0; k < depth; k += size) std::memcpy(to + k * PANEL, from + k, size);
        };
        if (step == 4)
            copy(std::integral_constant<int64_t, 4>());
        else if (step == 32)
            copy(std::integral_constant<int64_t, 32>());
        else
            copy(step);
        float* scales = side.packed_scales.data() + panel * shape.blocks * PANEL + r;
        const float* given = side.scales + row * side.row_step;
        for (int64_t b = 0; b < shape.blocks; b++) scales[b * PANEL] = given[b * side.block_step];
    }
}

// Sums of this many blocks are summed again: rounding errors grow with the longer of the two sums.
constexpr int64_t SPAN = 32;

void panel_product(const Shape& shape, const int8_t* a, const float* a_scale, const int8_t* b,
                   const float* b_scale, float* out) {
    span_product({std::min(SPAN, shape.blocks), shape.size}, a, a_scale, b, b_scale, out);
    for (int64_t done = SPAN; done < shape.blocks; done += SPAN) {
        float more[PANEL * PANEL];
        const int64_t at = done * PANEL;
        span_product({std::min(SPAN, shape.blocks - done), shape.size}, a + at * shape.size,
                     a_scale + at, b + at * shape.size, b_scale + at, more);
        for (int64_t i = 0; i < PANEL * PANEL; i++) out[i] += more[i];
    }
}

template <class Out>
void write(const float* tile, int64_t rows, int64_t columns, Out* out, int64_t step) {
    if (columns == PANEL) {  // a length that the compiler knows
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = 0; n < PANEL; n++) store<false>(out + m * step + n, tile[m * PANEL + n]);
        return;
    }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < columns; n++) store<false>(out + m * step + n, tile[m * PANEL + n]);
}

}  // namespace

extern "C" {

struct Product {
    const int8_t *a, *b;
    const float *a_scales, *b_scales;
    void* out;
    int64_t m, n, blocks, size;
    int64_t a_row_step, a_block_step, b_row_step, b_block_step;
    int32_t bf16, threads;
};

// 0, or 1 where the operating system keeps the units that the code was compiled for.
int32_t lowbit_integer_matmul(const Product* p) {
    if (!allow_tiles()) return 1;
    const Shape shape{p->blocks, p->size};
    Side a{p->a, p->a_scales, p->m, p->a_row_step, p->a_block_step, {}, {}};
    Side b{p->b, p->b_scales, p->n, p->b_row_step, p->b_block_step, {}, {}};
    for (Side* side : {&a, &b}) {
        side->packed.resize(side->panels() * shape.panel());
        side->packed_scales.resize(side->panels() * shape.blocks * PANEL);
    }
    constexpr int64_t ROWS = 4, COLUMNS = 16;  // panels of a task
    const int64_t across = (b.panels() + COLUMNS - 1) / COLUMNS;
    const int64_t tasks = (a.panels() + ROWS - 1) / ROWS * across;
#pragma omp parallel num_threads(p->threads) if (p->threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < a.panels(); i++) pack_panel(a, shape, i, shape.size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b.panels(); i++) pack_panel(b, shape, i, 4);
        set_tiles(shape);
        float tile[PANEL * PANEL];
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t top = task / across * ROWS, left = task % across * COLUMNS;
            for (int64_t j = left; j < std::min(left + COLUMNS, b.panels()); j++) {
                for (int64_t i = top; i < std::min(top + ROWS, a.panels()); i++) {
                    panel_product(shape, a.packed.data() + i * shape.panel(),
                                  a.packed_scales.data() + i * shape.blocks * PANEL,
                                  b.packed.data() + j * shape.panel(),
                                  b.packed_scales.data() + j * shape.blocks * PANEL, tile);
                    const int64_t rows = std::min(PANEL, p->m - i * PANEL);
                    const int64_t columns = std::min(PANEL, p->n - j * PANEL);
                    const int64_t at = i * PANEL * p->n + j * PANEL;
                    if (p->bf16)
                        write(tile, rows, columns, static_cast<Bf16*>(p->out) + at, p->n);
                    else
                        write(tile, rows, columns, static_cast<float*>(p->out) + at, p->n);
                }
            }
        }
        clear_tiles();
    }
    return 0;
}

}  // extern "C"
