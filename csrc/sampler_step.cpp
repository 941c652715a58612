// The op glide_fast::sampler_step for CPU tensors. float32 pictures are served here, with outputs of any
// dtype; all else goes to the reference op.
//
// Compiled without contraction of a product and a sum, so that every rounding is that of PyTorch's operators.
#include "sampler_step.h"

#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "parallel.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t OPERATIONS = 32;  // an element, memory included

// Whether the dimensions after the second are one, with one stride.
bool is_flat(const Tensor& tensor) {
    for (int64_t dim = 2; dim + 1 < tensor.dim(); ++dim)
        if (tensor.stride(dim) != tensor.stride(dim + 1) * tensor.size(dim + 1)) return false;
    return true;
}

StepProblem<float> problem_of(const Tensor& x, const Tensor& output, const Tensor& t) {
    StepProblem<float> problem{};
    problem.batch = x.size(0);
    problem.channels = x.size(1);
    problem.pixels = 1;
    for (int64_t dim = 2; dim < x.dim(); ++dim) problem.pixels *= x.size(dim);
    problem.x = data(x);
    problem.output = data(output);
    problem.output_row = output.stride(0);
    problem.output_channel = output.stride(1);
    problem.output_pixel = x.dim() > 2 ? output.stride(x.dim() - 1) : 0;
    problem.t = static_cast<const int64_t*>(t.const_data_ptr());
    return problem;
}

void run(const StepProblem<float>& problem) {
    for_each_task(
        problem.batch * problem.channels, OPERATIONS * problem.pixels, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const auto channel = step_channel(problem, task / problem.channels, task % problem.channels);
                for (int64_t pixel = 0; pixel < problem.pixels; ++pixel)
                    step_element(problem, channel, task * problem.pixels + pixel, pixel);
            }
        });
}

std::tuple<Tensor, Tensor> sampler_step(Tensor x, Tensor output, OptionalTensor noise, Tensor table, Tensor t,
                                        OptionalTensor guidance, int64_t deviation, int64_t direction,
                                        bool clip) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    if (x.scalar_type() != ScalarType::Float || table.scalar_type() != ScalarType::Float) {
        const auto results = call_reference<2>(
            "glide_fast::sampler_step_reference",
            std::array<StableIValue, 9>{from(x), from(output), from(noise), from(table), from(t),
                                        from(guidance), from(deviation), from(direction), from(clip)});
        return {to<Tensor>(results[0]), to<Tensor>(results[1])};
    }
    x = torch::stable::contiguous(x);
    table = torch::stable::contiguous(table);
    t = torch::stable::contiguous(torch::stable::to(t, ScalarType::Long));
    output = torch::stable::to(output, ScalarType::Float);
    if (!is_flat(output)) output = torch::stable::contiguous(output);
    if (noise) noise = torch::stable::contiguous(*noise);
    if (guidance) guidance = torch::stable::to(*guidance, ScalarType::Float);

    StepProblem<float> problem = problem_of(x, output, t);
    problem.rule = {static_cast<Deviation>(deviation), static_cast<Direction>(direction), clip};
    problem.noise = data(noise);
    problem.guidance = data(guidance);
    problem.table = static_cast<const StepCoefficients*>(table.const_data_ptr());
    for (int64_t picture = 0; picture < problem.batch; ++picture)
        STD_TORCH_CHECK(problem.t[picture] >= 0 && problem.t[picture] < table.size(0), "timestep ",
                        problem.t[picture], " is not in 0 .. ", table.size(0) - 1,
                        ", the rows of the sampler's table");
    Tensor next = empty(sizes_of(x)), x_start = empty(sizes_of(x));
    problem.next = mutable_data(next);
    problem.x_start = mutable_data(x_start);
    run(problem);
    return {next, x_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("sampler_step", TORCH_BOX(&sampler_step));
}

}  // namespace glide_fast
