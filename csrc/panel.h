// The layout that packed weights, keys and values share on every ISA. Functions have internal linkage: code
// that is compiled for different ISAs includes this.
#pragma once

#include <stdint.h>

namespace glide_fast {

constexpr int64_t PANEL = 32;  // columns of a packed panel, whose rows lie one behind the other
constexpr int64_t CACHE_LINE_FLOATS = 16;

static inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Stride of rows of `length` floats: whole cache lines, and an odd number of them, so that rows spread over
// the sets of a cache.
static inline int64_t spread_stride(int64_t length) {
    return (divide_up(length, CACHE_LINE_FLOATS) | 1) * CACHE_LINE_FLOATS;
}

}  // namespace glide_fast
