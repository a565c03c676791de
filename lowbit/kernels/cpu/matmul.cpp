// Product of integer block operands: int32 within a block, FP32 across blocks, in ascending order, so
// that the bits depend neither on the number of threads nor on the instructions used.
//
//     out[m, n] = sum over blocks of  a_scale[m, block] b_scale[n, block]  sum of a[m, k] b[n, k]
//
// Operands are packed in panels of ROWS and COLUMNS rows; dots/panels.h says how.

#if defined(__AMX_INT8__) && defined(__linux__)
#include "dots/amx.h"
#elif defined(__AVX512VNNI__)
#include "dots/vnni.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "dots/avx2.h"
#else
#include "dots/portable.h"
#endif
#include "dots/careful.h"
#include "lines.h"

#include <algorithm>

namespace {

struct Product {
    const int8_t *a, *b;
    const float *a_scales, *b_scales;
    void* out;
    int64_t m, n, blocks, size;
    int64_t a_row_step, a_block_step, b_row_step, b_block_step;
    int32_t bf16, threads;
};

struct Side {
    const int8_t* given;  // [rows, blocks x size]
    const float* given_scales;  // of row r and block b at r * row_step + b * block_step
    int64_t rows, row_step, block_step;
    int64_t width;  // rows of a panel
    Lines<Code> codes;
    Lines<float> scales;
    Lines<int32_t> starts;

    void reserve(const Shape& shape, bool has_starts) {
        const int64_t padded = panels() * width;
        codes = Lines<Code>(padded * shape.blocks * shape.size);
        scales = Lines<float>(padded * shape.blocks);
        if (has_starts) starts = Lines<int32_t>(padded * shape.blocks);
    }
    int64_t panels() const { return (rows + width - 1) / width; }
    Panel panel(int64_t i, const Shape& shape) const {
        return Panel{codes.data(), scales.data(), starts.data()}.from(i * shape.blocks, shape.size, width);
    }
};

// A block of a row, as it lies in a panel of WIDTH rows: its values together, or GROUPED.
template <bool GROUPED, int64_t WIDTH, class Change>
void pack_block(const int8_t* from, Code* to, int64_t size, Change change) {
    for (int64_t k = 0; k < size; k += 16) {
        Code values[16];
        for (int64_t i = 0; i < 16; i++) values[i] = change(from[k + i]);
        for (int64_t i = 0; i < 16; i += GROUP)
            std::memcpy(GROUPED ? to + (k + i) * WIDTH : to + k + i, values + i, 4);
    }
}

// Block by block, so that lines which all rows of a panel write into are in the nearest cache. What
// belongs to rows that are not there stays unset: nobody reads their products.
template <bool GROUPED, int64_t WIDTH, class Change>
void pack_panel(const Side& side, const Shape& shape, int64_t panel, Change change) {
    const int64_t rows = std::min(WIDTH, side.rows - panel * WIDTH), depth = shape.blocks * shape.size;
    for (int64_t b = 0; b < shape.blocks; b++) {
        const int64_t at = (panel * shape.blocks + b) * WIDTH;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = panel * WIDTH + r;
            const int8_t* from = side.given + row * depth + b * shape.size;
            Code* to = side.codes.data() + at * shape.size + r * (GROUPED ? GROUP : shape.size);
            pack_block<GROUPED, WIDTH>(from, to, shape.size, change);
            side.scales.data()[at + r] = side.given_scales[row * side.row_step + b * side.block_step];
            if (!side.starts.data()) continue;
            int32_t sum = 0;  // of a block so short that 128 times it fits, as any of its dot products
            for (int64_t k = 0; k < shape.size; k++) sum += from[k];
            side.starts.data()[at + r] = -128 * sum;
        }
    }
}

void pack_left(const Side& side, const Shape& shape, int64_t panel) {
    pack_panel<GROUPS_LEFT, ROWS>(side, shape, panel,
                                  [](int8_t v) { return Code(OFFSET_LEFT ? int8_t(v ^ -128) : v); });
}

void pack_right(const Side& side, const Shape& shape, int64_t panel) {
    pack_panel<true, COLUMNS>(side, shape, panel, [](int8_t v) { return Code(v); });
}

// Sums of this many blocks are summed again: rounding errors grow with the longer of the two sums.
constexpr int64_t SPAN = 32;
constexpr int64_t DOWN = 96 / ROWS, ACROSS = 256 / COLUMNS;  // panels of a task
using Tile = float[ROWS * COLUMNS];

int64_t rows_of(const Product& p, int64_t i) { return std::min(ROWS, p.m - i * ROWS); }

// Lines that are written when tile (i, j) is done come meanwhile: stores that wait for memory hold up all
// stores after them.
void expect(const Product& p, int64_t i, int64_t j) {
    const int64_t size = p.bf16 ? 2 : 4, at = i * ROWS * p.n + j * COLUMNS;
    for (int64_t m = 0; m < rows_of(p, i); m++)
        __builtin_prefetch(static_cast<char*>(p.out) + (at + m * p.n) * size, 1);
}

template <class Out>
void write(const float* tile, int64_t rows, int64_t columns, Out* out, int64_t step) {
    if (columns == COLUMNS) {  // a length that the compiler knows
        for (int64_t m = 0; m < rows; m++)
            for (int64_t n = 0; n < COLUMNS; n++)
                store<false>(out + m * step + n, tile[m * COLUMNS + n]);
        return;
    }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < columns; n++) store<false>(out + m * step + n, tile[m * COLUMNS + n]);
}

void write(const float* tile, const Product& p, int64_t i, int64_t j, int64_t columns) {
    const int64_t at = i * ROWS * p.n + j * COLUMNS;
    if (p.bf16)
        write(tile, rows_of(p, i), columns, static_cast<Bf16*>(p.out) + at, p.n);
    else
        write(tile, rows_of(p, i), columns, static_cast<float*>(p.out) + at, p.n);
}

// Panels of `a` from `top` to `end` times panel `j` of `b`, of which a span stays in the nearest cache.
void column_of_tiles(const Product& p, const Side& a, int64_t top, int64_t end, const Side& b,
                     int64_t j) {
    const Shape shape{p.blocks, p.size};
    const Panel right = b.panel(j, shape);
    const int64_t columns = std::min(COLUMNS, p.n - j * COLUMNS);
    const auto product = is_huge(right, shape.blocks, columns) ? careful_product : span_product;
    alignas(64) Tile tiles[DOWN], more;
    for (int64_t done = 0; done < shape.blocks; done += SPAN) {
        const Shape span{std::min(SPAN, shape.blocks - done), shape.size};
        const bool last = done + SPAN >= shape.blocks;
        for (int64_t i = top; i < end; i++) {
            float* sums = tiles[i - top];
            if (last) expect(p, i, j);
            product(span, a.panel(i, shape).from(done, shape.size, ROWS),
                    right.from(done, shape.size, COLUMNS), done ? more : sums);
            for (int64_t at = 0; done && at < ROWS * COLUMNS; at++) sums[at] += more[at];
            if (last) write(sums, p, i, j, columns);
        }
    }
}

}  // namespace

extern "C" {

// 0, or 1 where the operating system keeps the units that the code was compiled for.
int32_t lowbit_integer_matmul(const Product* p) {
    if (!allow_tiles()) return 1;
    const Shape shape{p->blocks, p->size};
    Side a{p->a, p->a_scales, p->m, p->a_row_step, p->a_block_step, ROWS, {}, {}, {}};
    Side b{p->b, p->b_scales, p->n, p->b_row_step, p->b_block_step, COLUMNS, {}, {}, {}};
    a.reserve(shape, false), b.reserve(shape, OFFSET_LEFT);
    const int64_t across = (b.panels() + ACROSS - 1) / ACROSS;
    const int64_t tasks = (a.panels() + DOWN - 1) / DOWN * across;
#pragma omp parallel num_threads(p->threads) if (p->threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < a.panels(); i++) pack_left(a, shape, i);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b.panels(); i++) pack_right(b, shape, i);
        set_tiles(shape);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t top = task / across * DOWN, left = task % across * ACROSS;
            for (int64_t j = left; j < std::min(left + ACROSS, b.panels()); j++)
                column_of_tiles(*p, a, top, std::min(top + DOWN, a.panels()), b, j);
        }
        clear_tiles();
    }
    return 0;
}

}  // extern "C"
