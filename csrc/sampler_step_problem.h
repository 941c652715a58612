// The tensors of a call of sampler_step, in the dtypes and layouts that its loops read.
#pragma once

#include <tuple>

#include "sampler_step.h"
#include "tensors.h"

namespace glide_fast {

// Whether the dimensions after the second are one, with one stride.
inline bool is_flat(const Tensor& tensor) {
    for (int64_t dim = 2; dim + 1 < tensor.dim(); ++dim)
        if (tensor.stride(dim) != tensor.stride(dim + 1) * tensor.size(dim + 1)) return false;
    return true;
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : tensor;
}

struct StepTensors {
    Tensor x, output;
    OptionalTensor noise;
    Tensor table, t;
    OptionalTensor guidance;
    Tensor next, x_start;

    StepTensors(const Tensor& given, const Tensor& output, const OptionalTensor& noise, const Tensor& table,
                const Tensor& t, const OptionalTensor& guidance)
        : x(torch::stable::contiguous(given)),
          output(is_flat(output) ? output : torch::stable::contiguous(output)),
          noise(contiguous_or_none(noise)),
          table(torch::stable::contiguous(torch::stable::to(table, ScalarType::Float))),
          t(torch::stable::contiguous(torch::stable::to(t, ScalarType::Long))),
          guidance(guidance ? OptionalTensor(torch::stable::to(*guidance, ScalarType::Float)) : guidance),
          next(torch::stable::empty_like(x)),
          x_start(torch::stable::empty_like(x)) {}

    StepProblem problem(const StepRule& rule) {
        StepProblem problem{};
        problem.rule = rule;
        problem.batch = x.size(0);
        problem.channels = x.size(1);
        problem.pixels = 1;
        for (int64_t dim = 2; dim < x.dim(); ++dim) problem.pixels *= x.size(dim);
        problem.x = data(x);
        problem.noise = data(noise);
        problem.guidance = data(guidance);
        problem.output = output.const_data_ptr();
        problem.output_row = output.stride(0);
        problem.output_channel = output.stride(1);
        problem.output_pixel = x.dim() > 2 ? output.stride(x.dim() - 1) : 0;
        problem.table = static_cast<const StepCoefficients*>(table.const_data_ptr());
        problem.t = static_cast<const int64_t*>(t.const_data_ptr());
        problem.next = mutable_data(next);
        problem.x_start = mutable_data(x_start);
        return problem;
    }
};

inline std::tuple<Tensor, Tensor> step_by_reference(const Tensor& x, const Tensor& output,
                                                    const OptionalTensor& noise, const Tensor& table,
                                                    const Tensor& t, const OptionalTensor& guidance,
                                                    int64_t deviation, int64_t direction, bool clip) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const auto results = call_reference<2>(
        "glide_fast::sampler_step_reference",
        std::array<StableIValue, 9>{from(x), from(output), from(noise), from(table), from(t), from(guidance),
                                    from(deviation), from(direction), from(clip)});
    return {to<Tensor>(results[0]), to<Tensor>(results[1])};
}

}  // namespace glide_fast
