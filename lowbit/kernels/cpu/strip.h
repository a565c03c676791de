// A strip, one block row and some columns of a tensor, stays in the cache: largest magnitudes, then
// the scales of all its blocks, then the elements.
#pragma once

#include "amax.h"
#include "reciprocal.h"
#include "transpose.h"

#include <type_traits>

namespace {

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
    static float code(float x, float factor, const Format& f, float low, float high, float noise) {
        float y = E8M0_SCALE ? x * factor : x / factor;
        float rounded = round_element<FLOAT, ROUNDING>(y, f, noise);
        return CLIPS ? at_least(at_most(rounded, high), low) : rounded;
    }

    template <class Value>
    static void emit(float code, float scale, float above, Value* out) {
        store<E8M0_SCALE>(out, value_of(code, scale, above));
    }
    static void emit(float code, float, float, int8_t* out) {
        *out = int8_t(code != code ? 0.0f : code);
    }

    // Two neighbours of 16 bits stay in the 32 in which they were read: no vector is taken apart or put
    // together, which binds where vectors have 256 bits.
    static constexpr bool PAIRS = std::is_same_v<In, Bf16> && std::is_same_v<Out, Bf16> &&
                                  ROUNDING != STOCHASTIC && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

    template <class Value>
    static void pair(const In* x, Value value, Out* out) {
        uint32_t both;
        std::memcpy(&both, x, 4);
        const float first = value(as_float(both << 16)), second = value(as_float(both & ~0xFFFFu));
        const auto bits = [](float v) { return E8M0_SCALE ? as_bits(v) : rounded_to_bf16(v); };
        both = bits(first) >> 16 | (bits(second) & ~0xFFFFu);
        std::memcpy(static_cast<void*>(out), &both, 4);
    }

    static float value_of(float code, float scale, float above) {
        return E8M0_SCALE ? code * scale : code * scale * above;
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
            if constexpr (PAIRS && N > 0) {
#pragma omp simd
                for (int64_t i = 0; i < N / 2; i++)
                    pair(x + c + 2 * i, [&](float v) {
                        return value_of(code(v, factor, format, low, high, 0), scale, above);
                    }, out + c + 2 * i);
                continue;
            }
#pragma omp simd  // a block, not one value of many blocks
            for (int64_t i = 0; i < n; i++) {
                const float random = random_at(state, noise.column + uint32_t(c + i));
                emit(code(load(x[c + i]), factor, format, low, high, random), scale, above, out + c + i);
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
                const float found = code(load(x[i * stride + c]), factor[c], format, least, most, random);
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
    scales_of(f, job, p, t.blocks, s);
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
