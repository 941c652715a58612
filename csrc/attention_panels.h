// A head's tokens in the order in which products read them. Compiled for each ISA.
#pragma once

#include "panel.h"
#include "vector.h"

namespace {

using glide_fast::PANEL;

constexpr int64_t BLOCK_KEYS = 256;  // whose scores are in memory at a time

// A token's `dim` values as a column of a panel [dim, PANEL].
inline void copy_column(const float* source, int64_t dim, float* target) {
    for (int64_t d = 0; d < dim; ++d) target[d * PANEL] = source[d];
}

inline void clear_column(int64_t dim, float* target) {
    for (int64_t d = 0; d < dim; ++d) target[d * PANEL] = 0.0f;
}

// A token's `dim` values as a row of panels [tokens, PANEL] that are `panel_stride` apart, zeros behind them
// up to `padded_dim`.
inline void copy_row(const float* source, int64_t dim, int64_t padded_dim, int64_t panel_stride,
                     float* target) {
    for (int64_t part = 0; part < padded_dim; part += LANES) {
        const int64_t lanes = dim - part < LANES ? dim - part : LANES;
        float* line = target + part / PANEL * panel_stride + part % PANEL;
        if (lanes == LANES)
            store(line, load(source + part));
        else
            store(line, lanes > 0 ? load_first(source + part, lanes) : Vector{});
    }
}

}  // namespace
