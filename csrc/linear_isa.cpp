// Matrix products for one ISA.
#include "activation_math.h"
#include "group_norm_math.h"
#include "linear.h"
#include "product.h"

namespace {

using glide_fast::LinearProblem;
using glide_fast::LinearSource;

constexpr int64_t GROUP = 12;  // panels whose sums are kept while the depth is gone through

int64_t scratch(const LinearProblem& problem) {
    return GROUP * problem.block_rows * PANEL;
}

constexpr int64_t ROWS_AHEAD = 16;  // whose places in the output begin to be loaded: their stride is large

// A row's cache lines of output and residual.
inline void prefetch_row(const LinearProblem& problem, int64_t at) {
    for (int64_t line = 0; line < PANEL; line += glide_fast::CACHE_LINE_FLOATS) {
        __builtin_prefetch(problem.output + at + line, 1);
        if (problem.residual != nullptr) __builtin_prefetch(problem.residual + at + line);
    }
}

template <Activation KIND>
void finish_as(const LinearProblem& problem, const float* sums, int64_t first_row, int64_t rows,
               int64_t first) {
    Vector bias[PANEL / LANES] = {};
    const int64_t columns = smaller(PANEL, problem.columns - first);
    if (problem.bias != nullptr)
        for (int64_t lane = 0; lane < columns; lane += LANES)
            bias[lane / LANES] = load_first(problem.bias + first + lane, smaller(LANES, columns - lane));
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = (first_row + row) * problem.columns + first;
        if (row + ROWS_AHEAD < rows) prefetch_row(problem, at + ROWS_AHEAD * problem.columns);
        for (int64_t lane = 0; lane < columns; lane += LANES) {
            const int64_t lanes = smaller(LANES, columns - lane);
            Vector value = activated<KIND>(load(sums + row * PANEL + lane) + bias[lane / LANES]);
            if (lanes == LANES) {
                if (problem.residual != nullptr) value += load(problem.residual + at + lane);
                store(problem.output + at + lane, value);
            } else {
                if (problem.residual != nullptr) value += load_first(problem.residual + at + lane, lanes);
                store_first(problem.output + at + lane, value, lanes);
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

void prefetch_output(const LinearProblem& problem, int64_t first_row, int64_t rows, int64_t first) {
    for (int64_t row = 0; row < rows; ++row)
        prefetch_row(problem, (first_row + row) * problem.columns + first);
}

// Panels [panel, last) of a block of rows: through the depth in chunks, so that a chunk of these rows stays
// in the second cache for all of the panels.
void multiply_group(const LinearProblem& problem, int64_t first_row, int64_t rows, int64_t panel,
                    int64_t last, float* sums) {
    int64_t before = 0;
    for (const LinearSource& source : problem.sources) {
        const int64_t chunks = (source.depth + problem.chunk - 1) / problem.chunk;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t begin = source.depth * chunk / chunks, end = source.depth * (chunk + 1) / chunks;
            const bool finished = before + end == problem.depth();
            const float* data = source.data + first_row * source.row + begin * source.column;
            for (int64_t p = panel; p < last; ++p) {
                const float* b = problem.b + p * problem.b_panel + (before + begin) * problem.b_row;
                const float* next = b + problem.b_panel;
                if (p + 1 == last && !finished)
                    next = problem.b + panel * problem.b_panel + (before + end) * problem.b_row;
                else if (p + 1 == last)
                    next = problem.b + last % problem.panels * problem.b_panel;
                float* own = sums + (p - panel) * rows * PANEL;
                if (finished) prefetch_output(problem, first_row, smaller(rows, ROWS_AHEAD), p * PANEL);
                multiply_panel<LONG_SUMS>({data, source.row, source.column}, rows, b, problem.b_row,
                                          end - begin, own, PANEL, before + begin > 0, next);
                if (finished) finish(problem, own, first_row, rows, p * PANEL);
            }
        }
        before += source.depth;
    }
}

void multiply(const LinearProblem& problem, int64_t begin, int64_t end, float* sums) {
    for (int64_t task = begin; task < end;) {
        const int64_t block = task / problem.panels, panel = task % problem.panels;
        const int64_t count = smaller(GROUP, smaller(problem.panels - panel, end - task));
        const int64_t first = block * problem.block_rows;
        multiply_group(problem, first, smaller(problem.block_rows, problem.rows - first), panel,
                       panel + count, sums);
        task += count;
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
