// The scales of all blocks of a strip, from their largest magnitudes.
#pragma once

#include "lines.h"
#include "quantize.h"

#include <algorithm>

namespace {

// Of a strip; an entry a block.
struct Scratch {
    Lines<uint32_t> amax;
    Lines<float> factor, scale;  // what elements are multiplied with or divided by; the scale
    Lines<float> low, high;  // bounds of codes under E8M0 scales
    bool clips = true;  // whether a code may lie beyond its bounds
    Lines<float> inverse;  // 1 / factor, see reciprocal.h
    Lines<uint16_t> narrow;
    Lines<float> tile;  // values before they are transposed

    explicit Scratch(int64_t width, int64_t tile_rows)
        : amax(width), factor(width), scale(width), low(width), high(width), inverse(width),
          narrow(width), tile(width * tile_rows) {}
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

// Where the values of a strip lie and where they go; `size` columns share an entry of Scratch.
template <class In, class Out>
struct Rows {
    const In* x;
    Out* out;
    int64_t stride, out_stride;
    int64_t count, columns, size;
    bool out_is_large;  // no cache will hold it
};

constexpr int TOGETHER = 4;  // rows read side by side: entries are loaded once, and memory is quicker

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
        const bool nan = amax[i] >= INFINITE;
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

// UP: stochastic rounding that any remainder sends up. EACH: `above` has one for each block.
template <int SCALE, bool UP, bool EACH>
void wide_scales(const Format& f, const float* above, int64_t n, Scratch& s) {
    Format grid{};
    grid.mantissa_bits = f.scale_mantissa_bits, grid.min_exponent = f.scale_min_exponent;
    const float max = f.max, least = f.least, most = f.scale_max, one = *above;
    const uint32_t* __restrict amax = s.amax.data();
    float *__restrict out = s.scale.data(), *__restrict factor = s.factor.data();
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float outer = EACH ? above[i] : one;
        float scale = as_float(amax[i] >= INFINITE ? 0x7FC00000u : amax[i]) / max;
        if (SCALE == MINIFLOAT) {
            scale = at_most(at_least(scale / outer, least), most);
            scale = round_element<true, UP ? STOCHASTIC : NEAREST>(scale, grid, 0);
        } else {
            if (SCALE == BF16_SCALE) {
                const uint32_t bits = UP ? as_bits(scale) + 0xFFFFu : rounded_to_bf16(scale);
                scale = at_most(as_float(bits & 0xFFFF0000u), most);
            }
            scale = scale == 0.0f ? 1.0f : scale;
        }
        out[i] = scale;
        factor[i] = scale * outer;
    }
    s.clips = true;
}

// What stands above the scales of a strip: of blocks along rows, those of a row share one.
const float* above_of(const Job& job, const Place& p) {
    static const float none = 1.0f;
    if (!job.tensor_scale) return &none;
    if (job.scale_lines == OF_ROWS) return job.tensor_scale + p.outer * job.rows + p.block_row;
    if (job.scale_lines == OF_COLUMNS) return job.tensor_scale + p.outer * job.columns + p.begin;
    return job.tensor_scale;
}

template <int SCALE, bool EACH>
void wide_scales(const Format& f, const float* above, int64_t n, Scratch& s) {
    return f.up ? wide_scales<SCALE, true, EACH>(f, above, n, s)
                : wide_scales<SCALE, false, EACH>(f, above, n, s);
}

void scales_of(const Format& f, const Job& job, const Place& p, int64_t blocks, Scratch& s) {
    const float* above = above_of(job, p);
    switch (f.scale) {
        case E8M0: return e8m0_scales(f, blocks, s);
        case MINIFLOAT:
            return job.scale_lines == OF_COLUMNS ? wide_scales<MINIFLOAT, true>(f, above, blocks, s)
                                              : wide_scales<MINIFLOAT, false>(f, above, blocks, s);
        case BF16_SCALE: return wide_scales<BF16_SCALE, false>(f, above, blocks, s);
        default: return wide_scales<FP32_SCALE, false>(f, above, blocks, s);
    }
}

}  // namespace
