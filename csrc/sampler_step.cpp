// The op glide_fast::sampler_step for CPU tensors. float32 pictures are served here, with outputs of any
// dtype; all else goes to the reference op.
//
// Compiled without contraction of a product and a sum, so that every rounding is that of PyTorch's operators.
#include <torch/headeronly/util/Exception.h>

#include "parallel.h"
#include "sampler_step_loop.h"
#include "sampler_step_problem.h"

namespace glide_fast {
namespace {

constexpr int64_t OPERATIONS = 32;  // an element, memory included

void check_timesteps(const StepProblem& problem, int64_t rows) {
    for (int64_t picture = 0; picture < problem.batch; ++picture)
        STD_TORCH_CHECK(problem.t[picture] >= 0 && problem.t[picture] < rows, "timestep ", problem.t[picture],
                        " is not in 0 .. ", rows - 1, ", the rows of the sampler's table");
}

std::tuple<Tensor, Tensor> sampler_step(Tensor x, Tensor output, OptionalTensor noise, Tensor table, Tensor t,
                                        OptionalTensor guidance, int64_t deviation, int64_t direction,
                                        bool clip) {
    if (x.scalar_type() != ScalarType::Float || table.scalar_type() != ScalarType::Float)
        return step_by_reference(x, output, noise, table, t, guidance, deviation, direction, clip);
    StepTensors tensors(x, torch::stable::to(output, ScalarType::Float), noise, table, t, guidance);
    const StepProblem problem =
        tensors.problem({static_cast<Deviation>(deviation), static_cast<Direction>(direction), clip});
    check_timesteps(problem, table.size(0));
    for_each_task(problem.batch * problem.channels, OPERATIONS * problem.pixels,
                  [&](int64_t begin, int64_t end) {
                      for (int64_t task = begin; task < end; ++task) {
                          const auto in =
                              step_channel<float>(problem, task / problem.channels, task % problem.channels);
                          for (int64_t pixel = 0; pixel < problem.pixels; ++pixel)
                              step_element(problem, in, task * problem.pixels + pixel, pixel);
                      }
                  });
    return {tensors.next, tensors.x_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("sampler_step", TORCH_BOX(&sampler_step));
}

}  // namespace glide_fast
