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

void e8m0_scales(const Format& f, int64_t n, Scratch& s) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = s.amax[i];
        bool tiny = bits < 0x00800000u, nan = bits >= 0x7F800000u;
        uint32_t normal = tiny ? as_bits(as_float(bits) * 0x1p24f) : bits;
        int32_t e = int32_t(normal >> 23) - 126 - (tiny ? 24 : 0) - f.max_exponent;
        e += int32_t(normal & 0x7FFFFFu) > f.carry;
        e = e < -127 ? -127 : e > 127 ? 127 : e;
        uint32_t scale = e == -127 ? 1u << 22 : uint32_t(e + 127) << 23;
        uint32_t inverse = e == 127 ? 1u << 22 : uint32_t(127 - e) << 23;
        s.scale[i] = as_float(nan ? 0x7FC00000u : scale);
        s.factor[i] = as_float(nan ? 0x7FC00000u : inverse);
        const float bound = f.limit * s.factor[i];  // exact: values up to limit, codes up to this
        s.high[i] = bound < f.max ? bound : f.max;
        s.low[i] = -bound > f.min ? -bound : f.min;
    }
}

void wide_scales(const Format& f, float above, int64_t n, Scratch& s) {
    const Format e4m3{1, 3, -6, -448, 448, 0, 0, 0, 0, 0, 0};
    for (int64_t i = 0; i < n; i++) {
        float amax = as_float(s.amax[i] >= 0x7F800000u ? 0x7FC00000u : s.amax[i]);
        float scale = amax / f.max;
        if (f.scale == E4M3) {
            float ratio = at_most(at_least(scale / above, f.least), 448.0f);
            scale = round_element<true, NEAREST>(ratio, e4m3, 0);
        } else {
            if (f.scale == BF16_SCALE) scale = as_float(bf16_bits(scale) << 16);
            scale = scale == 0.0f ? 1.0f : scale;
        }
        s.scale[i] = scale;
        s.factor[i] = scale * above;
        s.high[i] = f.max, s.low[i] = f.min;
    }
}

// The inner loops for one combination of types and rules.
template <class In, class Out, bool FLOAT, int ROUNDING, bool E8M0_SCALE>
struct Kernel {
    static float code(In x, float factor, const Format& f, float low, float high, float noise) {
        float y = E8M0_SCALE ? load(x) * factor : load(x) / factor;
        return at_least(at_most(round_element<FLOAT, ROUNDING>(y, f, noise), high), low);
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
    if (f.scale == E8M0)
        e8m0_scales(f, blocks, s);
    else
        wide_scales(f, job.tensor_scale ? *job.tensor_scale : 1.0f, blocks, s);
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
    using K = Kernel<In, Out, FLOAT, ROUNDING, E8M0_SCALE>;
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
    if (two_d) spread(t.columns, size, E8M0_SCALE, s);
    for (int64_t r = 0; r < t.rows; r++) {
        const In* from = x + r * job.columns;
        Out* to = tiled ? reinterpret_cast<Out*>(s.tile.data()) + r * t.columns
                        : static_cast<Out*>(job.out) + t.first + r * job.columns;
        uint32_t state = 0, column = uint32_t(p.begin % job.segment);
        if (ROUNDING == STOCHASTIC)
            state = row_state(job.key,
                              uint64_t(job.first_row + (t.first + r * job.columns) / job.segment));
        if (size == 1 || two_d)
            K::columns(from, to, t.columns, f, applied, state, column, s);
        else if (size == 32 && t.columns % 32 == 0)
            K::template row_blocks<32>(from, to, t.columns, 32, f, applied, state, column, s);
        else if (size == 16 && t.columns % 16 == 0)
            K::template row_blocks<16>(from, to, t.columns, 16, f, applied, state, column, s);
        else
            K::template row_blocks<0>(from, to, t.columns, size, f, applied, state, column, s);
        if (exceeds) saturate(to, t.columns, f.limit);
    }
    if (job.transposed && job.out)
        transpose(reinterpret_cast<const Out*>(s.tile.data()), t.rows, t.columns,
                  static_cast<Out*>(job.out) + p.begin * job.rows + p.block_row * job.block_rows,
                  job.rows);
}

}  // namespace
