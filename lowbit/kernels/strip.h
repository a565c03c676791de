// A strip, one block row and some columns of a tensor, stays in the cache: largest magnitudes, then
// the scales of all its blocks, then the elements.
#pragma once

#include "reciprocal.h"
#include "transpose.h"

namespace {

uint32_t* running(Scratch& s, float) { return s.amax.data(); }
uint16_t* running(Scratch& s, Bf16) { return s.narrow.data(); }

// Largest magnitude in each column, as bit patterns, which order like the magnitudes.
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

// The keys of a strip's random numbers.
struct Noise {
    const Job& job;
    int64_t first;  // where its first value lies
    uint32_t column;

    uint32_t row(int64_t r) const {
        const uint64_t row = uint64_t(job.first_row + (first + r * job.columns) / job.segment);
        return mix(mix(uint32_t(row) ^ job.key) ^ (uint32_t(row >> 32) * GOLDEN));
    }
};

// The inner loops for one combination of types and rules.
template <class In, class Out, bool FLOAT, int ROUNDING, bool E8M0_SCALE, bool CLIPS>
struct Kernel {
    static float code(In x, float factor, const Format& f, float low, float high, float noise) {
        float y = E8M0_SCALE ? load(x) * factor : load(x) / factor;
        float rounded = round_element<FLOAT, ROUNDING>(y, f, noise);
        return CLIPS ? at_least(at_most(rounded, high), low) : rounded;
    }

    template <class Value>
    static void emit(float code, float scale, float above, Value* out) {
        store<E8M0_SCALE>(out, E8M0_SCALE ? code * scale : code * scale * above);
    }
    static void emit(float code, float, float, int8_t* out) {
        *out = int8_t(code != code ? 0.0f : code);
    }

    template <int N>
    static void row_blocks(const Rows<In, Out>& rows, int64_t r, const Format format, float above,
                           const Noise& noise, const Scratch& s) {
        const In* __restrict x = rows.x + r * rows.stride;
        Out* __restrict out = rows.out + r * rows.out_stride;
        const uint32_t state = ROUNDING == STOCHASTIC ? noise.row(r) : 0;
        for (int64_t c = 0, b = 0; c < rows.columns; c += rows.size, b++) {
            const float factor = s.factor[b], scale = s.scale[b];
            const float low = E8M0_SCALE ? s.low[b] : format.min;
            const float high = E8M0_SCALE ? s.high[b] : format.max;
            const int64_t n = N ? N : std::min(rows.size, rows.columns - c);
#pragma omp simd  // a block, not one value of many blocks
            for (int64_t i = 0; i < n; i++) {
                const float random = random_at(state, noise.column + uint32_t(c + i));
                emit(code(x[c + i], factor, format, low, high, random), scale, above, out + c + i);
            }
        }
    }

    template <int COUNT>
    static void columns(const Rows<In, Out>& rows, int64_t r, const Format format, float above,
                        const Noise& noise, const Scratch& s) {
        const In* __restrict x = rows.x + r * rows.stride;
        Out* __restrict out = rows.out + r * rows.out_stride;
        const float *__restrict factor = s.factor.data(), *__restrict scale = s.scale.data();
        const float *__restrict low = s.low.data(), *__restrict high = s.high.data();
        const int64_t stride = rows.stride, out_stride = rows.out_stride;
        uint32_t state[COUNT] = {};
        for (int i = 0; ROUNDING == STOCHASTIC && i < COUNT; i++) state[i] = noise.row(r + i);
#pragma omp simd
        for (int64_t c = 0; c < rows.columns; c++) {
            const float least = E8M0_SCALE ? low[c] : format.min;
            const float most = E8M0_SCALE ? high[c] : format.max;
            for (int i = 0; i < COUNT; i++) {
                const float random = random_at(state[i], noise.column + uint32_t(c));
                const float found = code(x[i * stride + c], factor[c], format, least, most, random);
                emit(found, scale[c], above, out + i * out_stride + c);
            }
        }
    }

    static float random_at(uint32_t state, uint32_t column) {
        return ROUNDING == STOCHASTIC ? uniform(state, column) : 0;
    }

    static void run(const Rows<In, Out>& rows, const Format& f, float above, const Noise& noise,
                    const Scratch& s) {
        const int64_t size = rows.size, n = rows.columns;
        const auto row = size == 1                   ? columns<1>
                         : size == 32 && n % 32 == 0 ? row_blocks<32>
                         : size == 16 && n % 16 == 0 ? row_blocks<16>
                                                     : row_blocks<0>;
        int64_t r = 0;
        for (; size == 1 && r + TOGETHER <= rows.count; r += TOGETHER)
            columns<TOGETHER>(rows, r, f, above, noise, s);
        for (; r < rows.count; r++) row(rows, r, f, above, noise, s);
    }
};

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

// Whether values may lie beyond the limit: rounding doubles one at most. E8M0's bounds of codes saturate.
bool may_exceed(const Format& f, int64_t blocks, const Scratch& s) {
    uint32_t most = 0;
    for (int64_t b = 0; b < blocks; b++) most = max_u(most, s.amax[b]);
    return f.scale != E8M0 && most > as_bits(f.limit / 2);
}

template <class Value>
void saturate(Value* values, int64_t n, float limit) {
    for (int64_t i = 0; i < n; i++)
        store<true>(values + i, at_least(at_most(load(values[i]), limit), -limit));
}
void saturate(int8_t*, int64_t, float) {}  // codes

constexpr int64_t LARGE = 1 << 24;  // values: more than caches hold of a result

using StripFunction = void (*)(const Format&, const Job&, const Place&, Scratch&);

// The values of a strip whose largest magnitudes are known.
template <class In, class Out, bool FLOAT, int ROUNDING, bool E8M0_SCALE>
void strip(const Format& f, const Job& job, const Place& p, Scratch& s) {
    const int64_t size = job.block_columns;
    const Strip t(job, p);
    const In* x = static_cast<const In*>(job.x) + t.first;
    scales_of(f, job, t.blocks, s);
    if (job.scales) std::copy_n(s.scale.data(), t.blocks, job.scales + first_block(job, p));
    const float above = job.apply_tensor_scale ? *job.tensor_scale : 1.0f;
    const bool tiled = job.transposed || !job.out;
    Out* out = tiled ? reinterpret_cast<Out*>(s.tile.data()) : static_cast<Out*>(job.out) + t.first;
    const bool large = !tiled && job.outer * job.rows * job.columns > LARGE;
    const int64_t out_stride = tiled ? t.columns : job.columns;
    const Rows<In, Out> rows{x, out, t.stride, out_stride, t.rows, t.columns, size, large};
    constexpr bool divides = !E8M0_SCALE && ROUNDING == NEAREST;
    if (!divides || !multiply<FLOAT>(rows, f, above, s)) {
        const auto run = s.clips ? Kernel<In, Out, FLOAT, ROUNDING, E8M0_SCALE, true>::run
                                 : Kernel<In, Out, FLOAT, ROUNDING, E8M0_SCALE, !E8M0_SCALE>::run;
        run(rows, f, above, Noise{job, t.first, uint32_t(p.begin % job.segment)}, s);
    }
    if (may_exceed(f, t.blocks, s))
        for (int64_t r = 0; r < t.rows; r++) saturate(out + r * rows.out_stride, t.columns, f.limit);
    if (job.transposed && job.out)
        transpose(reinterpret_cast<const Out*>(s.tile.data()), t.rows, t.columns,
                  static_cast<Out*>(job.out) + p.begin * job.rows + p.block_row * job.block_rows,
                  job.rows);
}

}  // namespace
