// Kernels around the element functions that the CPU runs too: a sampler's step, and what follows a norm.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../norm_apply_loop.h"
#include "../sampler_step_loop.h"
#include "launch.h"

namespace {

constexpr int THREADS = 256;
constexpr int PIXELS_PER_THREAD = 4;
constexpr int CHANNELS_PER_BLOCK = 32;  // neighbours in memory where channels come last: a warp's accesses
constexpr int ROWS_PER_BLOCK = THREADS / CHANNELS_PER_BLOCK;

int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// A block takes a run of pixels of one channel of one picture, so that its coefficients are read once.
template <typename Output>
__global__ void __launch_bounds__(THREADS) sampler_step_kernel(StepProblem problem, int64_t runs) {
    const int64_t plane = blockIdx.x / runs, run = blockIdx.x % runs;
    const auto in = step_channel<Output>(problem, plane / problem.channels, plane % problem.channels);
    const int64_t first = run * THREADS * PIXELS_PER_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
        const int64_t pixel = first + i * THREADS;
        if (pixel < problem.pixels) step_element(problem, in, plane * problem.pixels + pixel, pixel);
    }
}

// Planar maps, by planes as above.
template <typename Element>
__global__ void __launch_bounds__(THREADS) norm_apply_planar(NormApplyProblem problem, int64_t runs) {
    const int64_t plane = blockIdx.x / runs, run = blockIdx.x % runs;
    const NormChannel in = norm_channel(problem, plane / problem.channels, plane % problem.channels);
    const int64_t first = run * THREADS * PIXELS_PER_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
        const int64_t pixel = first + i * THREADS;
        if (pixel < problem.pixels) norm_element<Element>(problem, in, plane * problem.pixels + pixel);
    }
}

// Channels last: a thread keeps its channel and goes through pixels.
template <typename Element>
__global__ void __launch_bounds__(THREADS)
    norm_apply_channels_last(NormApplyProblem problem, int64_t runs, int64_t columns) {
    const int64_t run = blockIdx.x % runs, column = blockIdx.x / runs % columns;
    const int64_t picture = blockIdx.x / (runs * columns);
    const int64_t channel = column * CHANNELS_PER_BLOCK + threadIdx.x % CHANNELS_PER_BLOCK;
    if (channel >= problem.channels) return;
    const NormChannel in = norm_channel(problem, picture, channel);
    const int64_t first = run * ROWS_PER_BLOCK * PIXELS_PER_THREAD + threadIdx.x / CHANNELS_PER_BLOCK;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
        const int64_t pixel = first + i * ROWS_PER_BLOCK;
        if (pixel < problem.pixels)
            norm_element<Element>(problem, in, norm_place(problem, picture, channel, pixel));
    }
}

template <typename Element>
void start_norm_apply(const NormApplyProblem& problem, cudaStream_t stream) {
    if (problem.channels_last) {
        const int64_t runs = divide_up(problem.pixels, ROWS_PER_BLOCK * PIXELS_PER_THREAD);
        const int64_t columns = divide_up(problem.channels, CHANNELS_PER_BLOCK);
        norm_apply_channels_last<Element>
            <<<static_cast<unsigned>(problem.batch * runs * columns), THREADS, 0, stream>>>(problem, runs,
                                                                                            columns);
        return;
    }
    const int64_t runs = divide_up(problem.pixels, THREADS * PIXELS_PER_THREAD);
    norm_apply_planar<Element>
        <<<static_cast<unsigned>(problem.batch * problem.channels * runs), THREADS, 0, stream>>>(problem,
                                                                                                 runs);
}

template <typename Output>
void start_sampler_step(const StepProblem& problem, cudaStream_t stream) {
    const int64_t runs = divide_up(problem.pixels, THREADS * PIXELS_PER_THREAD);
    sampler_step_kernel<Output>
        <<<static_cast<unsigned>(problem.batch * problem.channels * runs), THREADS, 0, stream>>>(problem,
                                                                                                 runs);
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
