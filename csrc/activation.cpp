// Activations of dense float32 tensors: threads. The arithmetic is in the kernels of the chosen ISA. Called
// from glide_fast/ops/linear_cpu.py, which checks.
#include "activation.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 4096;
constexpr int64_t OPERATIONS_PER_ELEMENT = 64;

template <typename Work>
void for_each_range(int64_t size, const Work& work) {
    for_each_task((size + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK,
                  ELEMENTS_PER_TASK * OPERATIONS_PER_ELEMENT, [&](int64_t begin, int64_t end) {
                      const int64_t first = begin * ELEMENTS_PER_TASK;
                      work(first, std::min(end * ELEMENTS_PER_TASK, size) - first);
                  });
}

void activate(Tensor x, int64_t kind, Tensor result) {
    const float* source = data(x);
    float* target = mutable_data(result);
    for_each_range(x.numel(), [&](int64_t first, int64_t count) {
        current_isa().activation->forward(static_cast<Activation>(kind), source + first, target + first,
                                          count);
    });
}

void activate_backward(Tensor grad, Tensor x, int64_t kind, Tensor result) {
    const float *arriving = data(grad), *source = data(x);
    float* target = mutable_data(result);
    for_each_range(x.numel(), [&](int64_t first, int64_t count) {
        current_isa().activation->backward(static_cast<Activation>(kind), arriving + first, source + first,
                                           target + first, count);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def("activate(Tensor x, int kind, Tensor(a!) result) -> ()");
    library.def("activate_backward(Tensor grad, Tensor x, int kind, Tensor(a!) result) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("activate", TORCH_BOX(&activate));
    library.impl("activate_backward", TORCH_BOX(&activate_backward));
}

}  // namespace glide_fast
