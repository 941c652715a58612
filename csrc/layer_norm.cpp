// Layer normalisation of float32 rows: shapes, memory and threads. The arithmetic is in the kernels of the
// chosen ISA. Called from glide_fast/ops/layer_norm_cpu.py, which checks.
#include "layer_norm.h"

#include "isa.h"
#include "panel.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t OPERATIONS_PER_ELEMENT = 24;  // most of it memory
constexpr int64_t ROWS_PER_TASK = 32;           // of the backward pass, whatever the number of threads

void normalise_rows(Tensor x, Tensor weight, Tensor bias, double eps, Tensor output, Tensor mean,
                    Tensor rstd) {
    LayerNormForward problem{};
    problem.channels = x.size(1);
    problem.x = data(x);
    problem.x_row = x.stride(0);
    problem.weight = data(weight);
    problem.bias = data(bias);
    problem.eps = eps;
    problem.output = mutable_data(output);
    problem.mean = mutable_data(mean);
    problem.rstd = mutable_data(rstd);
    for_each_task(x.size(0), OPERATIONS_PER_ELEMENT * problem.channels, [&](int64_t begin, int64_t end) {
        current_isa().layer_norm->forward(problem, begin, end);
    });
}

// The sums of all tasks, one after the other.
void add_up(const LayerNormBackward& problem, int64_t tasks, int64_t which, Tensor& result) {
    float* target = mutable_data(result);
    for (int64_t channel = 0; channel < problem.channels; ++channel) {
        double sum = 0;
        for (int64_t task = 0; task < tasks; ++task)
            sum += problem.sums[(2 * task + which) * problem.channels + channel];
        target[channel] = static_cast<float>(sum);
    }
}

void normalise_rows_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                             OptionalTensor grad_x, OptionalTensor grad_weight, OptionalTensor grad_bias) {
    LayerNormBackward problem{};
    problem.rows = x.size(0);
    problem.channels = x.size(1);
    problem.grad = data(grad);
    problem.grad_row = grad.stride(0);
    problem.x = data(x);
    problem.x_row = x.stride(0);
    problem.weight = data(weight);
    problem.mean = data(mean);
    problem.rstd = data(rstd);
    if (grad_x) problem.grad_x = mutable_data(*grad_x);
    problem.rows_per_task = ROWS_PER_TASK;
    const int64_t tasks = divide_up(problem.rows, ROWS_PER_TASK);
    if (grad_weight) problem.sums = scratch_memory<ScratchUse::BETWEEN>(2 * tasks * problem.channels);
    for_each_task(
        tasks, 2 * OPERATIONS_PER_ELEMENT * ROWS_PER_TASK * problem.channels,
        [&](int64_t begin, int64_t end) { current_isa().layer_norm->backward(problem, begin, end); });
    if (grad_weight) add_up(problem, tasks, 0, *grad_weight);
    if (grad_bias) add_up(problem, tasks, 1, *grad_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def(
        "normalise_rows(Tensor x, Tensor weight, Tensor bias, float eps, Tensor(a!) output, Tensor(b!) mean, "
        "Tensor(c!) rstd) -> ()");
    library.def(
        "normalise_rows_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
        "Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("normalise_rows", TORCH_BOX(&normalise_rows));
    library.impl("normalise_rows_backward", TORCH_BOX(&normalise_rows_backward));
}

}  // namespace glide_fast
