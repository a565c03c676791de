// Small transposes inside the cache.
#pragma once

#include "quantize.h"

namespace {

#if defined(__GNUC__) && !defined(__clang__)  // clang has no __builtin_shuffle
#define LOWBIT_TRANSPOSE
// 32 x 32 values of 16 bits. Two neighbouring rows interleaved are rows of 32-bit pairs; interleaving
// row i of 16 such with row i + 8, four times, transposes them.
inline void transpose_32(const uint16_t* from, int64_t step, uint16_t* to, int64_t to_step) {
    typedef uint16_t Row __attribute__((vector_size(64)));
    typedef uint32_t Pairs __attribute__((vector_size(64)));
    const Row low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const Row high = low + 16;
    const Pairs low_pairs = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Pairs high_pairs = low_pairs + 8;
    const auto interleave = [&](const Pairs* x, Pairs* y) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + 8], low_pairs);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 8], high_pairs);
        }
    };
    for (int half = 0; half < 2; half++) {  // of the columns
        Pairs a[16], b[16];
        for (int i = 0; i < 16; i++) {
            Row even, odd;
            std::memcpy(&even, from + 2 * i * step, 64);
            std::memcpy(&odd, from + (2 * i + 1) * step, 64);
            a[i] = Pairs(half ? __builtin_shuffle(even, odd, high) : __builtin_shuffle(even, odd, low));
        }
        interleave(a, b), interleave(b, a), interleave(a, b), interleave(b, a);
        for (int i = 0; i < 16; i++) std::memcpy(to + (half * 16 + i) * to_step, &a[i], 64);
    }
}
#endif

#ifdef LOWBIT_TRANSPOSE
inline void transpose_32(const int8_t* from, int64_t step, int8_t* to, int64_t to_step) {
    uint16_t wide[32 * 32], turned[32 * 32];
    for (int r = 0; r < 32; r++)
        for (int c = 0; c < 32; c++) wide[r * 32 + c] = uint8_t(from[r * step + c]);
    transpose_32(wide, 32, turned, 32);
    for (int r = 0; r < 32; r++)
        for (int c = 0; c < 32; c++) to[r * to_step + c] = int8_t(turned[r * 32 + c]);
}

inline void transpose_32(const Bf16* from, int64_t step, Bf16* to, int64_t to_step) {
    transpose_32(&from->bits, step, &to->bits, to_step);
}

inline void transpose_32(const float* from, int64_t step, float* to, int64_t to_step) {
    for (int c = 0; c < 32; c++)
        for (int r = 0; r < 32; r++) to[c * to_step + r] = from[r * step + c];
}
#endif

template <class Value>
void transpose(const Value* from, int64_t rows, int64_t columns, Value* to, int64_t to_step) {
    int64_t done = 0;
#ifdef LOWBIT_TRANSPOSE
    if (rows == 32)
        for (; done + 32 <= columns; done += 32)
            transpose_32(from + done, columns, to + done * to_step, to_step);
#endif
    for (int64_t c = done; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) to[c * to_step + r] = from[r * columns + c];
}

}  // namespace
