// Scaled dot products of two packed panels, on whichever unit the code is compiled for.
#pragma once

#include "quantize.h"

#include <algorithm>

#if defined(__AMX_INT8__) && defined(__linux__)
#define LOWBIT_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__AVX512VNNI__)
#define LOWBIT_VNNI
#include <immintrin.h>
#endif

namespace {

constexpr int64_t PANEL = 16;

struct Shape {
    int64_t blocks, size;
    int64_t panel() const { return blocks * size * PANEL; }
};

// acc [16 x 16] += the scaled int32 dot products of one block.
inline void add_scaled(const int32_t* dots, const float* a_scale, const float* b_scale, float* acc) {
    for (int64_t m = 0; m < PANEL; m++)
        for (int64_t n = 0; n < PANEL; n++)
            acc[m * PANEL + n] = __builtin_fmaf(float(dots[m * PANEL + n]) * b_scale[n], a_scale[m],
                                                acc[m * PANEL + n]);
}

#ifdef LOWBIT_AMX
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
    for (int i = 0; i < 4; i++) t.bytes[i] = 64, t.rows[i] = PANEL;  // dot products
    for (int i = 4; i < 6; i++) t.bytes[i] = uint16_t(chunk), t.rows[i] = PANEL;  // a
    for (int i = 6; i < 8; i++) t.bytes[i] = 64, t.rows[i] = uint8_t(chunk / 4);  // b
    _tile_loadconfig(&t);
}

void clear_tiles() { _tile_release(); }

#define LOWBIT_DOT(TILE, A, B)                                                 \
    _tile_zero(TILE);                                                          \
    for (int64_t k = 0; k < size; k += chunk) {                                \
        _tile_loadd(A, a + k, size);                                           \
        _tile_loadd(B, b + k * PANEL, 64);                                     \
        _tile_dpbssd(TILE, A, B);                                              \
    }                                                                          \
    a += size * PANEL, b += size * PANEL;
#define LOWBIT_STORE(TILE) _tile_stored(TILE, dots + TILE * PANEL * PANEL, 64);

void span_product(const Shape& shape, const int8_t* a, const float* a_scale, const int8_t* b,
                  const float* b_scale, float* out) {
    const int64_t size = shape.size, chunk = chunk_of(size);
    alignas(64) int32_t dots[4 * PANEL * PANEL];
    __m512 acc[PANEL];
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
            const __m512 scale = _mm512_loadu_ps(b_scale + block * PANEL);
            for (int m = 0; m < PANEL; m++) {
                const __m512i dot = _mm512_load_si512(dots + (i * PANEL + m) * PANEL);
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
                const __m512 factor = _mm512_set1_ps(a_scale[block * PANEL + m]);
                acc[m] = _mm512_fmadd_ps(value, factor, acc[m]);
            }
        }
    }
    for (int m = 0; m < PANEL; m++) _mm512_storeu_ps(out + m * PANEL, acc[m]);
}
#undef LOWBIT_DOT
#undef LOWBIT_STORE

#else
bool allow_tiles() { return true; }
void set_tiles(const Shape&) {}
void clear_tiles() {}

void span_product(const Shape& shape, const int8_t* a, const float* a_scale, const int8_t* b,
                  const float* b_scale, float* out) {
    std::fill_n(out, PANEL * PANEL, 0.0f);
    for (int64_t block = 0; block < shape.blocks; block++) {
        int32_t dots[PANEL * PANEL];
        for (int64_t m = 0; m < PANEL; m++) {
            const int8_t *row = a + m * shape.size, *column = b;
#ifdef LOWBIT_VNNI
            // the unit takes unsigned times signed: values + 128, the surplus taken off again
            const __m512i offset = _mm512_set1_epi8(int8_t(-128));
            __m512i dot = _mm512_setzero_si512(), surplus = _mm512_setzero_si512();
            for (int64_t k = 0; k < shape.size; k += 4, column += 4 * PANEL) {
                int32_t four;
                std::memcpy(&four, row + k, 4);
                const __m512i left = _mm512_set1_epi32(four);
                const __m512i right = _mm512_xor_si512(_mm512_loadu_si512(column), offset);
                dot = _mm512_dpbusd_epi32(dot, right, left);
                surplus = _mm512_dpbusd_epi32(surplus, offset, left);
            }
            _mm512_storeu_si512(dots + m * PANEL, _mm512_sub_epi32(dot, surplus));
#else
            for (int64_t n = 0; n < PANEL; n++) dots[m * PANEL + n] = 0;
            for (int64_t k = 0; k < shape.size; k += 4, column += 4 * PANEL)
                for (int64_t n = 0; n < PANEL; n++)
                    for (int64_t i = 0; i < 4; i++)
                        dots[m * PANEL + n] += int32_t(row[k + i]) * column[4 * n + i];
#endif
        }
        add_scaled(dots, a_scale + block * PANEL, b_scale + block * PANEL, out);
        a += shape.size * PANEL, b += shape.size * PANEL;
    }
}
#endif

}  // namespace
