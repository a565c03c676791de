// Two packed panels, whose scaled dot products one of the dots_*.h computes.
#pragma once

#include "quantize.h"

namespace {

struct Shape {
    int64_t blocks, size;
};

// Codes, block by block: of `a` each row's `size` values (plus 128 where a unit's OFFSET_LEFT says so,
// which `starts` takes off again); of `b` four values of each column at a time, as dot-product units
// read them. ROWS or COLUMNS scales and starts for each block.
struct Panel {
    const int8_t* codes;
    const float* scales;
    const int32_t* starts;  // of `b`: what the dot products of a column start from

    Panel from(int64_t block, int64_t size, int64_t width) const {
        return {codes + block * size * width, scales + block * width, starts + block * width};
    }
};

}  // namespace
