// Matrix products of float32 tensors: shapes, blocks and threads. The arithmetic is in the kernels of the
// chosen ISA. Called from glide_fast/ops, which checks.
#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t BLOCK_FLOATS = 1 << 16;  // of a block of A's rows: a share of the second cache
constexpr int64_t CHUNK = 512;             // of the depth, at most
constexpr int64_t TASKS_PER_THREAD = 4;

// [depth, columns] with any strides -> [panels, depth, PANEL], in memory that is given.
void pack_into(const LinearSource& b, int64_t columns, float* packed) {
    for_each_task(divide_up(columns, PANEL), 4 * b.depth * PANEL, [&](int64_t begin, int64_t end) {
        current_isa().linear->pack(b, columns, b.depth, packed, begin, end);
    });
}

Tensor pack_linear(Tensor b) {
    Tensor packed = empty({divide_up(b.size(1), PANEL), b.size(0), PANEL});
    pack_into({data(b), b.stride(0), b.stride(1), b.size(0)}, b.size(1), mutable_data(packed));
    return packed;
}

LinearSource source_of(const Tensor& a) {
    return {data(a), a.stride(0), a.stride(1), a.size(1)};
}

void multiply(Tensor a, OptionalTensor second, Tensor b, int64_t columns, OptionalTensor bias, int64_t kind,
              OptionalTensor residual, Tensor output) {
    LinearProblem problem{};
    problem.rows = a.size(0);
    problem.columns = columns;
    problem.sources[0] = source_of(a);
    if (second) problem.sources[1] = source_of(*second);
    problem.panels = divide_up(columns, PANEL);
    if (b.dim() == 3) {  // packed
        problem.b = data(b);
        problem.b_row = PANEL;
        problem.b_panel = problem.depth() * PANEL;
    } else if (b.stride(1) == 1 && columns % PANEL == 0) {
        problem.b = data(b);
        problem.b_row = b.stride(0);
        problem.b_panel = PANEL;
    } else {
        float* packed = scratch_memory<ScratchUse::WEIGHTS>(problem.panels * problem.depth() * PANEL);
        pack_into({data(b), b.stride(0), b.stride(1), b.size(0)}, columns, packed);
        problem.b = packed;
        problem.b_row = PANEL;
        problem.b_panel = problem.depth() * PANEL;
    }
    problem.bias = data(bias);
    problem.activation = static_cast<Activation>(kind);
    problem.residual = data(residual);
    problem.output = mutable_data(output);

    const int64_t wanted = TASKS_PER_THREAD * static_cast<int64_t>(torch::stable::get_num_threads());
    problem.chunk = CHUNK;
    const int64_t depth = std::min(problem.chunk, std::max<int64_t>(problem.depth(), 1));
    const int64_t fitting = std::max<int64_t>(BLOCK_FLOATS / depth, 24);
    const int64_t blocks = std::max(divide_up(problem.rows, fitting), divide_up(wanted, problem.panels));
    problem.block_rows = std::max<int64_t>(divide_up(problem.rows, blocks), 1);
    const int64_t tasks = divide_up(problem.rows, problem.block_rows) * problem.panels;
    const LinearKernels& kernels = *current_isa().linear;
    for_each_task(tasks, 2 * problem.block_rows * problem.depth() * PANEL, [&](int64_t begin, int64_t end) {
        kernels.multiply(problem, begin, end, scratch_memory<ScratchUse::OWN>(kernels.scratch(problem)));
    });
}

// A hash of a sample of a weight's values, which changes when all of them do.
int64_t fingerprint(Tensor weight) {
    constexpr int64_t SAMPLES = 64;
    const int64_t size = weight.numel();
    const int64_t bytes = size * static_cast<int64_t>(weight.element_size());
    const auto* memory = static_cast<const unsigned char*>(weight.const_data_ptr());
    uint64_t hash = 14695981039346656037ull;  // FNV-1a
    for (int64_t sample = 0; sample < SAMPLES && bytes > 0; ++sample) {
        const int64_t first = size * sample / SAMPLES * static_cast<int64_t>(weight.element_size());
        for (int64_t byte = first; byte < first + static_cast<int64_t>(weight.element_size()); ++byte)
            hash = (hash ^ memory[byte]) * 1099511628211ull;
    }
    return static_cast<int64_t>(hash);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def("fingerprint(Tensor weight) -> int");
    library.def("pack_linear(Tensor b) -> Tensor");
    library.def(
        "multiply(Tensor a, Tensor? second, Tensor b, int columns, Tensor? bias, int kind, "
        "Tensor? residual, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("fingerprint", TORCH_BOX(&fingerprint));
    library.impl("pack_linear", TORCH_BOX(&pack_linear));
    library.impl("multiply", TORCH_BOX(&multiply));
}

}  // namespace glide_fast
