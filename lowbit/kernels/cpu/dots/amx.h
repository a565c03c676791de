// Scaled dot products on Intel's matrix unit: 16 x 16 sums at a time in a tile.
#pragma once

#include "panels.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t ROWS = 16, COLUMNS = 16;
using Code = int8_t;
constexpr bool OFFSET_LEFT = false;
constexpr int64_t GROUP = 4;
constexpr bool GROUPS_LEFT = false;
using Panel = PanelOf<Code>;

struct Tiles {  // the layout that LDTILECFG reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

bool allow_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM

int64_t chunk_of(int64_t size) { return size % 64 == 0 ? 64 : size % 32 == 0 ? 32 : 16; }

void set_tiles(const Shape& shape) {
    const int64_t chunk = chunk_of(shape.size);
    Tiles t;
    for (int i = 0; i < 4; i++) t.bytes[i] = 64, t.rows[i] = ROWS;  // dot products
    for (int i = 4; i < 6; i++) t.bytes[i] = uint16_t(chunk), t.rows[i] = ROWS;  // a
    for (int i = 6; i < 8; i++) t.bytes[i] = 64, t.rows[i] = uint8_t(chunk / 4);  // b
    _tile_loadconfig(&t);
}

void clear_tiles() { _tile_release(); }

#define LOWBIT_DOT(TILE, A, B)                                                 \
    _tile_zero(TILE);                                                          \
    for (int64_t k = 0; k < size; k += chunk) {                                \
        _tile_loadd(A, a + k, size);                                           \
        _tile_loadd(B, b + k * COLUMNS, 64);                                     \
        _tile_dpbssd(TILE, A, B);                                              \
    }                                                                          \
    a += size * ROWS, b += size * COLUMNS;
#define LOWBIT_STORE(TILE) _tile_stored(TILE, dots + TILE * ROWS * COLUMNS, 64);

void span_product(const Shape& shape, const Panel& left, const Panel& right, float* out) {
    const int8_t *a = left.codes, *b = right.codes;
    const int64_t size = shape.size, chunk = chunk_of(size);
    alignas(64) int32_t dots[4 * ROWS * COLUMNS];
    __m512 acc[ROWS];
    for (auto& row : acc) row = _mm512_setzero_ps();
    for (int64_t block = 0; block < shape.blocks;) {
        const int64_t count = shape.blocks - block >= 4 ? 4 : 1;
        LOWBIT_DOT(0, 4, 6)
        if (count == 4) {
            LOWBIT_DOT(1, 5, 7)
            LOWBIT_DOT(2, 4, 6)
            LOWBIT_DOT(3, 5, 7)
            LOWBIT_STORE(1)
            LOWBIT_STORE(2)
            LOWBIT_STORE(3)
        }
        LOWBIT_STORE(0)
        for (int64_t i = 0; i < count; i++, block++) {
            const __m512 scale = _mm512_loadu_ps(right.scales + block * COLUMNS);
            for (int m = 0; m < ROWS; m++) {
                const __m512i dot = _mm512_load_si512(dots + (i * ROWS + m) * COLUMNS);
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
                const __m512 factor = _mm512_set1_ps(left.scales[block * ROWS + m]);
                acc[m] = _mm512_fmadd_ps(value, factor, acc[m]);
            }
        }
    }
    for (int m = 0; m < ROWS; m++) _mm512_storeu_ps(out + m * COLUMNS, acc[m]);
}
#undef LOWBIT_DOT
#undef LOWBIT_STORE

}  // namespace
