// Two packed panels, whose scaled dot products a header of this folder computes.
#pragma once

#include "../quantize.h"

namespace {

struct Shape {
    int64_t blocks, size;
};

// Codes, block by block: of `a` each row's `size` values (plus 128 where a unit's OFFSET_LEFT says so,
// which `starts` takes off again); of `b`, and of `a` under GROUPS_LEFT, GROUP values of each column at a
// time, which a unit multiplies and adds up at once. ROWS or COLUMNS scales and starts for each block.
template <class Code>
struct PanelOf {
    const Code* codes;
    const float* scales;
    const int32_t* starts;  // of `b`: what the dot products of a column start from

    PanelOf from(int64_t block, int64_t size, int64_t width) const {
        return {codes + block * size * width, scales + block * width, starts + block * width};
    }
};

}  // namespace
