// Matrix products for one ISA.
#include "activation_math.h"
#include "group_norm_math.h"
#include "linear.h"
#include "product.h"

namespace {

using glide_fast::LinearProblem;
using glide_fast::LinearSource;

int64_t scratch(const LinearProblem& problem) {
    return problem.block_rows * PANEL;
}

template <Activation KIND>
void finish_as(const LinearProblem& problem, const float* sums, int64_t first_row, int64_t rows,
               int64_t first) {
    for (int64_t lane = 0; lane < PANEL && first + lane < problem.columns; lane += LANES) {
        const int64_t lanes = smaller(LANES, problem.columns - first - lane);
        Vector bias{};
        if (problem.bias != nullptr) bias = load_first(problem.bias + first + lane, lanes);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t at = (first_row + row) * problem.columns + first + lane;
            Vector value = activated<KIND>(load(sums + row * PANEL + lane) + bias);
            if (lanes == LANES) {
                if (problem.residual != nullptr) value += load(problem.residual + at);
                store(problem.output + at, value);
            } else {
                if (problem.residual != nullptr) value += load_first(problem.residual + at, lanes);
                store_first(problem.output + at, value, lanes);
            }
        }
    }
}

void finish(const LinearProblem& problem, const float* sums, int64_t first_row, int64_t rows, int64_t first) {
    auto finish_this = finish_as<Activation::NONE>;
    if (problem.activation == Activation::GELU) finish_this = finish_as<Activation::GELU>;
    if (problem.activation == Activation::QUICK_GELU) finish_this = finish_as<Activation::QUICK_GELU>;
    finish_this(problem, sums, first_row, rows, first);
}

void multiply(const LinearProblem& problem, int64_t begin, int64_t end, float* sums) {
    for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / problem.panels, panel = task % problem.panels;
        const int64_t first = block * problem.block_rows;
        const int64_t rows = smaller(problem.block_rows, problem.rows - first);
        const float* b = problem.b + panel * problem.b_panel;
        bool add = false;
        for (const LinearSource& source : problem.sources) {
            if (source.depth == 0) continue;
            multiply_panel<LONG_SUMS>({source.data + first * source.row, source.row, source.column}, rows, b,
                                      problem.b_row, source.depth, sums, PANEL, add);
            b += source.depth * problem.b_row;
            add = true;
        }
        finish(problem, sums, first, rows, panel * PANEL);
    }
}

// Blocks of LANES x LANES through registers would be faster; packing is rare enough for scalar stores of
// whole lines.
void pack(const LinearSource& b, int64_t columns, int64_t rows, float* packed, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        float* target = packed + panel * rows * PANEL;
        const int64_t count = smaller(PANEL, columns - panel * PANEL);
        const float* source = b.data + panel * PANEL * b.column;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < PANEL; ++column)
                target[row * PANEL + column] =
                    column < count ? source[row * b.row + column * b.column] : 0.0f;
    }
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {scratch, multiply, pack};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
