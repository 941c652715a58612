// Small matrix products out of registers, the core of convolution and linear layers. Compiled for each ISA.
//
// A product is PANEL columns wide: B is a panel [depth, PANEL] in memory (or any matrix by its row stride).
// Rows of A are broadcast element by element, so A may lie in any strides. The accumulators are arrays that
// are unrolled completely; they stay in registers (look at the assembly after a change).
#pragma once

#include "panel.h"
#include "vector.h"

namespace {

using glide_fast::PANEL;

constexpr int64_t WIDTH = 2 * LANES;
// Partial sums over so many products are added up, so that the error of a sum grows with the number of
// partial sums and not with its length. Winograd's domain, whose way back enlarges errors, needs short ones.
constexpr int64_t LONG_SUMS = 128, SHORT_SUMS = 32;
#if VECTOR_BYTES == 64
constexpr int64_t MAX_ROWS = 12;  // of 32 registers 24 accumulate
#elif defined(__aarch64__)
constexpr int64_t MAX_ROWS = 10;  // of 32 registers 20: factors are in registers, too
#else
constexpr int64_t MAX_ROWS = 6;  // of 16 registers 12 accumulate
#endif
static_assert(PANEL % WIDTH == 0, "a panel is made of whole steps");

struct Matrix {
    const float* data;
    int64_t row, column;  // strides
};

// Does nothing beside a product's steps in depth.
struct NothingBeside {
    void operator()(int64_t) const {}
};

// C [ROWS, WIDTH] = A [ROWS, depth] B [depth, WIDTH], or added to what C holds; `beside` is called with each
// step in depth.
template <int64_t PARTIAL_DEPTH, int64_t ROWS, typename Beside = NothingBeside>
void product(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool add,
             Beside beside = {}) {
    for (int64_t begin = 0; begin < depth; begin += PARTIAL_DEPTH) {
        const int64_t end = begin + PARTIAL_DEPTH < depth ? begin + PARTIAL_DEPTH : depth;
        Vector left[ROWS] = {}, right[ROWS] = {};
        for (int64_t k = begin; k < end; ++k) {
            const Vector first = load(b + k * b_row), second = load(b + k * b_row + LANES);
            beside(k);
#pragma GCC unroll 16
            for (int64_t row = 0; row < ROWS; ++row) {
                const Vector value = splat(a.data[row * a.row + k * a.column]);
                left[row] += value * first;
                right[row] += value * second;
            }
        }
        const bool keep = add || begin > 0;
#pragma GCC unroll 16
        for (int64_t row = 0; row < ROWS; ++row) {
            float* target = c + row * c_row;
            store(target, keep ? load(target) + left[row] : left[row]);
            store(target + LANES, keep ? load(target + LANES) + right[row] : right[row]);
        }
    }
}

template <typename Beside>
using Product = void (*)(Matrix, const float*, int64_t, int64_t, float*, int64_t, bool, Beside);

// Products of 1 to ROWS rows, by their number.
template <typename Beside, int64_t PARTIAL_DEPTH, int64_t ROWS, int64_t... MORE>
struct Products : Products<Beside, PARTIAL_DEPTH, ROWS - 1, ROWS, MORE...> {};

template <typename Beside, int64_t PARTIAL_DEPTH, int64_t... ROWS>
struct Products<Beside, PARTIAL_DEPTH, 0, ROWS...> {
    static constexpr Product<Beside> BY_ROWS[] = {nullptr, product<PARTIAL_DEPTH, ROWS, Beside>...};
};

template <int64_t PARTIAL_DEPTH, typename Beside = NothingBeside>
using AllProducts = Products<Beside, PARTIAL_DEPTH, MAX_ROWS>;

// Begins to load a cache line of a row of B with each step in depth.
struct LoadAhead {
    const float* data;
    int64_t row;

    void operator()(int64_t k) const { __builtin_prefetch(data + k * row, 0, 2); }
};

// C [rows, PANEL] = A [rows, depth] B [depth, PANEL], or added to what C holds. Any number of rows: they are
// cut into steps as equal as possible, because a step of few rows uses few accumulators.
//
// The first steps begin to load `next`, the B of the product that follows, if it is given: where B is read
// once it comes from memory or a far cache; processors foresee it up to the next page where it is packed, and
// not at all in strides.
template <int64_t PARTIAL_DEPTH>
void multiply_panel(Matrix a, int64_t rows, const float* b, int64_t b_row, int64_t depth, float* c,
                    int64_t c_row, bool add, const float* next = nullptr) {
    using glide_fast::CACHE_LINE_FLOATS;
    int64_t steps = (rows + MAX_ROWS - 1) / MAX_ROWS, line = 0;
    for (int64_t row = 0; row < rows; --steps) {
        const int64_t count = (rows - row + steps - 1) / steps;
        const Matrix block = {a.data + row * a.row, a.row, a.column};
        for (int64_t column = 0; column < PANEL; column += WIDTH, line += CACHE_LINE_FLOATS) {
            float* target = c + row * c_row + column;
            if (next != nullptr && line < PANEL)
                AllProducts<PARTIAL_DEPTH, LoadAhead>::BY_ROWS[count](block, b + column, b_row, depth, target,
                                                                      c_row, add, {next + line, b_row});
            else
                AllProducts<PARTIAL_DEPTH>::BY_ROWS[count](block, b + column, b_row, depth, target, c_row,
                                                           add, {});
        }
        row += count;
    }
}

}  // namespace
