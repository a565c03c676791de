// A strip, one block row and some columns of a tensor, stays in the first cache: largest magnitudes,
// then the scales of all its blocks, then the elements.
#pragma once

#include "quantize.h"
#include "transpose.h"

#include <algorithm>
#include <vector>

namespace {

struct Scratch {
    std::vector<uint32_t> amax;
    std::vector<float> factor, scale;  // what elements are multiplied with or divided by; the scale
    std::vector<float> low, high;  // bounds of codes
    bool clips = true;  // whether a code may lie beyond them
    std::vector<uint16_t> narrow;
    std::vector<float> tile;  // values before they are transposed

    explicit Scratch(int64_t width, int64_t tile_rows)
        : amax(width), factor(width), scale(width), low(width), high(width), narrow(width),
          tile(width * tile_rows) {}
};

// One block row and the columns from `begin` to `end` of it.
struct Place {
    int64_t outer, block_row, begin, end;
};

struct Strip {
    int64_t rows, columns, blocks;  // covered
    int64_t stride, first;  // where its first value lies

    Strip(const Job& job, const Place& p) {
        const int64_t row = p.block_row * job.block_rows;
        rows = std::min(job.block_rows, job.rows - row), columns = p.end - p.begin;
        blocks = (columns + job.block_columns - 1) / job.block_columns;
        stride = job.columns, first = (p.outer * job.rows + row) * job.columns + p.begin;
    }
};

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

template <class Value>
void block_amax(const Value* x, int64_t columns, int64_t size, uint32_t* amax) {
    if (size == 32 && columns % 32 == 0) return run_amax<32>(x, columns, size, amax);
    if (size == 16 && columns % 16 == 0) return run_amax<16>(x, columns, size, amax);
    run_amax<0>(x, columns, size, amax);
}

// scale.py's e8m0_scale: adding what the mantissa may not reach carries into the exponent.
void e8m0_scales(const Format& f, int64_t n, Scratch& s) {
    const int32_t reach = std::min(f.carry, 0x7FFFFF), offset = f.max_exponent - 1;
    const uint32_t tiny = f.max_exponent == 1 ? (1u << 22) + uint32_t(reach / 2) : 0;
    const float limit = f.limit, min = f.min, max = f.max;
    const uint32_t* __restrict amax = s.amax.data();
    float *__restrict scale = s.scale.data(), *__restrict factor = s.factor.data();
    float *__restrict low = s.low.data(), *__restrict high = s.high.data();
    int32_t clips = 0;
#pragma omp simd reduction(| : clips)
    for (int64_t i = 0; i < n; i++) {
        int32_t byte = int32_t((amax[i] + uint32_t(0x7FFFFF - reach)) >> 23) - offset;
        byte = byte < 0 ? 0 : byte > 254 ? 254 : byte;
        byte = amax[i] > tiny ? byte : 0;
        const bool nan = amax[i] >= 0x7F800000u;
        const uint32_t least = 1u << 22;  // 2^-127
        const uint32_t up = max_u(uint32_t(byte) << 23, least);
        const uint32_t down = max_u(uint32_t(254 - byte) << 23, least);
        scale[i] = as_float(nan ? 0x7FC00000u : up);
        factor[i] = as_float(nan ? 0x7FC00000u : down);
        const float bound = limit * factor[i];  // exact: values up to limit, codes up to this
        high[i] = bound < max ? bound : max;
        low[i] = -bound > min ? -bound : min;
        clips |= int32_t(bound < max) | int32_t(as_float(amax[i]) * factor[i] > max);
    }
    s.clips = clips;
}

template <int SCALE>
void wide_scales(const Format& f, float above, int64_t n, Scratch& s) {
    const Format e4m3{1, 3, -6, -448, 448, 0, 0, 0, 0, 0, 0};
    const float min = f.min, max = f.max, least = f.least;
    const uint32_t* __restrict amax = s.amax.data();
    float *__restrict out = s.scale.data(), *__restrict factor = s.factor.data();
    float *__restrict low = s.low.data(), *__restrict high = s.high.data();
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float scale = as_float(amax[i] >= 0x7F800000u ? 0x7FC00000u : amax[i]) / max;
        if (SCALE == E4M3) {
            scale = at_most(at_least(scale / above, least), 448.0f);
            scale = round_element<true, NEAREST>(scale, e4m3, 0);
        } else {
            if (SCALE == BF16_SCALE) scale = as_float(bf16_bits(scale) << 16);
            scale = scale == 0.0f ? 1.0f : scale;
        }
        out[i] = scale;
        factor[i] = scale * above;
        high[i] = max, low[i] = min;
    }
    s.clips = true;
}

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
    static void row_blocks(const In* __restrict x, Out* __restrict out, int64_t columns,
                           int64_t size, const Format format, float above, uint32_t state,
                           uint32_t column, const Scratch& s) {
        for (int64_t c = 0, b = 0; c < columns; c += size, b++) {
            const float factor = s.factor[b], scale = s.scale[b], low = s.low[b], high = s.high[b];
            const int64_t n = N ? N : std::min(size, columns - c);
#pragma omp simd  // a block, not one value of many blocks
            for (int64_t i = 0; i < n; i++) {
                float noise = ROUNDING == STOCHASTIC ? uniform(state, column + uint32_t(c + i)) : 0;
                emit(code(x[c + i], factor, format, low, high, noise), scale, above, out + c + i);
            }
        }
    }

    static void columns(const In* __restrict x, Out* __restrict out, int64_t n, const Format format,
                        float above, uint32_t state, uint32_t column, const Scratch& s) {
        const float *__restrict factor = s.factor.data(), *__restrict scale = s.scale.data();
        const float *__restrict low = s.low.data(), *__restrict high = s.high.data();
        for (int64_t c = 0; c < n; c++) {
            float noise = ROUNDING == STOCHASTIC ? uniform(state, column + uint32_t(c)) : 0;
            const float least = E8M0_SCALE ? low[c] : format.min;
            const float most = E8M0_SCALE ? high[c] : format.max;
            emit(code(x[c], factor[c], format, least, most, noise), scale[c], above, out + c);
        }
    }

    // `per_column`: the scratch space holds an entry a column, not a block.
    static void row(const In* from, Out* to, int64_t n, int64_t size, bool per_column,
                    const Format& f, float above, uint32_t state, uint32_t column,
                    const Scratch& s) {
        if (per_column)
            columns(from, to, n, f, above, state, column, s);
        else if (size == 32 && n % 32 == 0)
            row_blocks<32>(from, to, n, 32, f, above, state, column, s);
        else if (size == 16 && n % 16 == 0)
            row_blocks<16>(from, to, n, 16, f, above, state, column, s);
        else
            row_blocks<0>(from, to, n, size, f, above, state, column, s);
    }
};

uint32_t row_state(uint32_t key, uint64_t row) {
    return mix(mix(uint32_t(row) ^ key) ^ (uint32_t(row >> 32) * GOLDEN));
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

void scales_of(const Format& f, const Job& job, int64_t blocks, Scratch& s) {
    const float above = job.tensor_scale ? *job.tensor_scale : 1.0f;
    switch (f.scale) {
        case E8M0: return e8m0_scales(f, blocks, s);
        case E4M3: return wide_scales<E4M3>(f, above, blocks, s);
        case BF16_SCALE: return wide_scales<BF16_SCALE>(f, above, blocks, s);
        default: return wide_scales<FP32_SCALE>(f, above, blocks, s);
    }
}

// From one entry a block to one a column; wide scales have the element's own bounds everywhere.
void spread(int64_t columns, int64_t size, bool bounds, Scratch& s) {
    const int64_t blocks = (columns + size - 1) / size;
    for (auto* values : {&s.factor, &s.scale, &s.low, &s.high}) {
        if (!bounds && values == &s.low) break;
        for (int64_t b = blocks - 1; b >= 0; b--)
            std::fill_n(values->data() + b * size, std::min(size, columns - b * size), (*values)[b]);
    }
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

using StripFunction = void (*)(const Format&, const Job&, const Place&, Scratch&);

// The values of a strip whose largest magnitudes are known.
template <class In, class Out, bool FLOAT, int ROUNDING, bool E8M0_SCALE>
void strip(const Format& f, const Job& job, const Place& p, Scratch& s) {
    const int64_t size = job.block_columns;
    const Strip t(job, p);
    const In* x = static_cast<const In*>(job.x) + t.first;
    scales_of(f, job, t.blocks, s);
    if (job.scales) {
        const int64_t block_rows = (job.rows + job.block_rows - 1) / job.block_rows;
        const int64_t per_row = (job.columns + size - 1) / size;
        std::copy_n(s.scale.data(), t.blocks,
                    job.scales + (p.outer * block_rows + p.block_row) * per_row + p.begin / size);
    }
    const float applied = job.apply_tensor_scale ? *job.tensor_scale : 1.0f;
    const bool two_d = t.rows > 1 && size > 1, tiled = job.transposed || !job.out;
    const bool exceeds = may_exceed(f, t.blocks, s);
    const auto emit_row = s.clips ? Kernel<In, Out, FLOAT, ROUNDING, E8M0_SCALE, true>::row
                                  : Kernel<In, Out, FLOAT, ROUNDING, E8M0_SCALE, !E8M0_SCALE>::row;
    if (two_d) spread(t.columns, size, E8M0_SCALE, s);
    for (int64_t r = 0; r < t.rows; r++) {
        const In* from = x + r * job.columns;
        Out* to = tiled ? reinterpret_cast<Out*>(s.tile.data()) + r * t.columns
                        : static_cast<Out*>(job.out) + t.first + r * job.columns;
        uint32_t state = 0, column = uint32_t(p.begin % job.segment);
        if (ROUNDING == STOCHASTIC)
            state = row_state(job.key,
                              uint64_t(job.first_row + (t.first + r * job.columns) / job.segment));
        emit_row(from, to, t.columns, size, size == 1 || two_d, f, applied, state, column, s);
        if (exceeds) saturate(to, t.columns, f.limit);
    }
    if (job.transposed && job.out)
        transpose(reinterpret_cast<const Out*>(s.tile.data()), t.rows, t.columns,
                  static_cast<Out*>(job.out) + p.begin * job.rows + p.block_row * job.block_rows,
                  job.rows);
}

}  // namespace
