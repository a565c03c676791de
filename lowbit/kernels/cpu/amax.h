// The largest magnitudes of blocks, as bit patterns, which order like the magnitudes.
#pragma once

#include "scales.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

uint32_t* running(Scratch& s, float) { return s.amax.data(); }
uint16_t* running(Scratch& s, Bf16) { return s.narrow.data(); }

// Largest magnitude in each column.
template <class In>
void column_amax(const In* x, const Strip& t, Scratch& s) {
    auto* m = running(s, In());
    using Bits = std::decay_t<decltype(*m)>;
    for (int64_t c = 0; c < t.columns; c++) m[c] = magnitude(x[c]);
    int64_t r = 1;
    for (; r + 4 <= t.rows; r += 4) {
        const In *a = x + r * t.stride, *b = a + t.stride, *d = b + t.stride, *e = d + t.stride;
        for (int64_t c = 0; c < t.columns; c++) {
            Bits low = std::max<Bits>(magnitude(a[c]), magnitude(b[c]));
            Bits high = std::max<Bits>(magnitude(d[c]), magnitude(e[c]));
            m[c] = std::max<Bits>(m[c], std::max<Bits>(low, high));
        }
    }
    for (; r < t.rows; r++)
        for (int64_t c = 0; c < t.columns; c++)
            m[c] = std::max<Bits>(m[c], magnitude(x[r * t.stride + c]));
    for (int64_t c = 0; c < t.columns; c++) s.amax[c] = widen(m[c]);
}

// Largest magnitude in each run of `size` columns; N is the size where the compiler shall know it.
template <int N, class Value>
void run_amax(const Value* x, int64_t columns, int64_t size, uint32_t* amax) {
    using Bits = decltype(magnitude(*x));
    for (int64_t c = 0, b = 0; c < columns; c += size, b++) {
        Bits most = 0;
        const int64_t n = N ? N : std::min(size, columns - c);
        for (int64_t i = 0; i < n; i++) most = std::max<Bits>(most, magnitude(x[c + i]));
        amax[b] = widen(most);
    }
}

#if defined(__AVX512BW__) && !defined(__clang__)  // clang has no __builtin_shuffle
typedef uint16_t Shorts __attribute__((vector_size(64)));

// Largest magnitudes of 32 runs of N: of those of N / 2, neighbours are compared.
template <int N>
Shorts largest_of_runs(const Bf16* x) {
    if constexpr (N == 1) {
        Shorts values;
        std::memcpy(&values, x, sizeof values);
        return values & 0x7FFF;
    } else {
        const Shorts left = largest_of_runs<N / 2>(x), right = largest_of_runs<N / 2>(x + 16 * N);
        const Shorts even = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                             32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
        const Shorts a = __builtin_shuffle(left, right, even);
        const Shorts b = __builtin_shuffle(left, right, even + 1);
        return a > b ? a : b;
    }
}

template <int N>
void run_amax(const Bf16* x, int64_t columns, uint32_t* amax) {
    int64_t c = 0;
    for (; c + 32 * N <= columns; c += 32 * N) {
        const Shorts most = largest_of_runs<N>(x + c);
        for (int i = 0; i < 32; i++) amax[c / N + i] = widen(uint16_t(most[i]));
    }
    run_amax<N>(x + c, columns - c, int64_t(N), amax + c / N);
}
#elif defined(__AVX2__)
// The least of eight complements.
template <int N>
void run_amax(const Bf16* x, int64_t columns, uint32_t* amax) {
    static_assert(N % 16 == 0);
    const __m256i magnitudes = _mm256_set1_epi16(0x7FFF);
    for (int64_t c = 0; c < columns; c += N) {
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = 0; i < N; i += 16) {
            const auto* sixteen = reinterpret_cast<const __m256i*>(x + c + i);
            const __m256i found = _mm256_and_si256(_mm256_loadu_si256(sixteen), magnitudes);
            most = _mm256_max_epu16(most, found);
        }
        const __m128i high = _mm256_extracti128_si256(most, 1);
        const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(most), high);
        const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
        amax[c / N] = widen(uint16_t(~_mm_extract_epi16(least, 0)));
    }
}
#endif

template <int N, class Value>
void run_amax(const Value* x, int64_t columns, uint32_t* amax) {
    run_amax<N>(x, columns, int64_t(N), amax);
}

template <class Value>
void block_amax(const Value* x, int64_t columns, int64_t size, uint32_t* amax) {
    if (size == 32 && columns % 32 == 0) return run_amax<32>(x, columns, amax);
    if (size == 16 && columns % 16 == 0) return run_amax<16>(x, columns, amax);
    run_amax<0>(x, columns, size, amax);
}

// Largest magnitude of each block of the strip.
template <class In>
void largest(const Job& job, const Place& p, Scratch& s) {
    const Strip t(job, p);
    const In* x = static_cast<const In*>(job.x) + t.first;
    const int64_t size = job.block_columns;
    if (t.rows == 1) return block_amax(x, t.columns, size, s.amax.data());
    column_amax(x, t, s);
    for (int64_t b = 0; size > 1 && b < t.blocks; b++) {  // 2-D
        uint32_t most = 0;
        for (int64_t c = b * size; c < std::min((b + 1) * size, t.columns); c++)
            most = max_u(most, s.amax[c]);
        s.amax[b] = most;
    }
}

// Where the strip's first block lies among those of the tensor.
int64_t first_block(const Job& job, const Place& p) {
    const int64_t block_rows = (job.rows + job.block_rows - 1) / job.block_rows;
    const int64_t per_row = (job.columns + job.block_columns - 1) / job.block_columns;
    return (p.outer * block_rows + p.block_row) * per_row + p.begin / job.block_columns;
}

// `largest`, and keeps what it finds in job.amax. The largest finite magnitude.
template <class In>
uint32_t keep_largest(const Job& job, const Place& p, Scratch& s) {
    using Bits = decltype(magnitude(In()));
    const Strip t(job, p);
    largest<In>(job, p, s);
    uint32_t most = 0;
    for (int64_t b = 0; b < t.blocks; b++) most = max_u(most, s.amax[b]);
    if (Bits* kept = static_cast<Bits*>(job.amax)) {
        kept += first_block(job, p);
        for (int64_t b = 0; b < t.blocks; b++) kept[b] = Bits(s.amax[b] >> (32 - 8 * sizeof(Bits)));
    }
    if (most < INFINITE) return most;
    const In* x = static_cast<const In*>(job.x) + t.first;
    for (int64_t r = most = 0; r < t.rows; r++)
        for (int64_t c = 0; c < t.columns; c++) {
            const uint32_t m = widen(magnitude(x[r * t.stride + c]));
            most = max_u(most, m < INFINITE ? m : 0);
        }
    return most;
}

// What `keep_largest` has kept.
template <class In>
void kept_largest(const Job& job, const Place& p, Scratch& s) {
    using Bits = decltype(magnitude(In()));
    const Bits* kept = static_cast<const Bits*>(job.amax) + first_block(job, p);
    const int64_t blocks = Strip(job, p).blocks;
    for (int64_t b = 0; b < blocks; b++) s.amax[b] = widen(kept[b]);
}

}  // namespace
