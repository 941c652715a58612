// The op glide_fast::norm_apply for CPU tensors: what csrc/cuda computes on a GPU, by the same functions.
// bfloat16 and float16 by way of float32; float64 goes to the reference op.
#include <algorithm>

#include "norm_apply_loop.h"
#include "norm_apply_problem.h"
#include "parallel.h"

namespace glide_fast {
namespace {

constexpr int64_t OPERATIONS = 32;  // an element, memory included

Tensor norm_apply(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, OptionalTensor scale,
                  OptionalTensor shift, bool silu) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    const ScalarType type = x.scalar_type();
    if (type == ScalarType::Double) {
        const auto results =
            call_reference<1>("glide_fast::norm_apply_reference",
                              std::array<StableIValue, 8>{from(x), from(mean), from(rstd), from(weight),
                                                          from(bias), from(scale), from(shift), from(silu)});
        return to<Tensor>(results[0]);
    }
    NormApplyTensors tensors(torch::stable::to(x, ScalarType::Float), mean, rstd, weight, bias, scale, shift);
    NormApplyProblem problem = tensors.problem(silu);
    for_each_task(problem.batch * problem.channels, OPERATIONS * problem.pixels,
                  [&](int64_t begin, int64_t end) {
                      for (int64_t task = begin; task < end; ++task) {
                          const int64_t picture = task / problem.channels, channel = task % problem.channels;
                          const NormChannel in = norm_channel(problem, picture, channel);
                          for (int64_t pixel = 0; pixel < problem.pixels; ++pixel)
                              norm_element<float>(problem, in, norm_place(problem, picture, channel, pixel));
                      }
                  });
    return torch::stable::to(tensors.y, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("norm_apply", TORCH_BOX(&norm_apply));
}

}  // namespace glide_fast
