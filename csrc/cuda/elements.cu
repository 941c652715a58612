// The launches of csrc/cuda/kernels.h: grids, dtypes, streams.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"
#include "launch.h"

namespace {

template <typename Element>
void start_norm_apply(const NormApplyProblem& problem, cudaStream_t stream) {
    if (problem.channels_last) {
        const Grid grid = channels_last_grid(problem);
        norm_apply_channels_last<Element>
            <<<static_cast<unsigned>(grid.blocks), THREADS, 0, stream>>>(problem, grid);
        return;
    }
    const Grid grid = planar_grid(problem.batch, problem.channels, problem.pixels);
    norm_apply_planar<Element><<<static_cast<unsigned>(grid.blocks), THREADS, 0, stream>>>(problem, grid);
}

template <typename Output>
void start_sampler_step(const StepProblem& problem, cudaStream_t stream) {
    const Grid grid = planar_grid(problem.batch, problem.channels, problem.pixels);
    sampler_step_kernel<Output><<<static_cast<unsigned>(grid.blocks), THREADS, 0, stream>>>(problem, grid);
}

const char* last_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

namespace glide_fast {

const char* launch_sampler_step(const StepProblem& problem, Element output, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (problem.batch * problem.channels * problem.pixels == 0) return nullptr;
    if (output == Element::FLOAT) start_sampler_step<float>(problem, on);
    if (output == Element::HALF) start_sampler_step<__half>(problem, on);
    if (output == Element::BFLOAT16) start_sampler_step<__nv_bfloat16>(problem, on);
    return last_error();
}

const char* launch_norm_apply(const NormApplyProblem& problem, Element element, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (problem.batch * problem.channels * problem.pixels == 0) return nullptr;
    if (element == Element::FLOAT) start_norm_apply<float>(problem, on);
    if (element == Element::HALF) start_norm_apply<__half>(problem, on);
    if (element == Element::BFLOAT16) start_norm_apply<__nv_bfloat16>(problem, on);
    return last_error();
}

}  // namespace glide_fast
