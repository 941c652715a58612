// Kernels around the element functions that the CPU runs too: a sampler's step, and what follows a norm.
//
// Without launches, so that the tests can run every thread of a grid one after the other on the CPU.
#pragma once

#include "../norm_apply_loop.h"
#include "../sampler_step_loop.h"

namespace {

constexpr int THREADS = 256;
constexpr int PIXELS_PER_THREAD = 4;
constexpr int CHANNELS_PER_BLOCK = 32;  // neighbours in memory where channels come last: a warp's accesses
constexpr int ROWS_PER_BLOCK = THREADS / CHANNELS_PER_BLOCK;

inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// How blocks are numbered: by picture, then by channel or column of channels, then by run of pixels.
struct Grid {
    int64_t runs, columns, blocks;
};

// A block a run of pixels of one channel.
inline Grid planar_grid(int64_t batch, int64_t channels, int64_t pixels) {
    const int64_t runs = divide_up(pixels, THREADS * PIXELS_PER_THREAD);
    return {runs, channels, batch * channels * runs};
}

// A block a run of pixels of CHANNELS_PER_BLOCK channels.
inline Grid channels_last_grid(const NormApplyProblem& problem) {
    const int64_t runs = divide_up(problem.pixels, ROWS_PER_BLOCK * PIXELS_PER_THREAD);
    const int64_t columns = divide_up(problem.channels, CHANNELS_PER_BLOCK);
    return {runs, columns, problem.batch * columns * runs};
}

template <typename Output>
__global__ void __launch_bounds__(THREADS) sampler_step_kernel(StepProblem problem, Grid grid) {
    const int64_t plane = blockIdx.x / grid.runs, run = blockIdx.x % grid.runs;
    const auto in = step_channel<Output>(problem, plane / grid.columns, plane % grid.columns);
    const int64_t first = run * THREADS * PIXELS_PER_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
        const int64_t pixel = first + i * THREADS;
        if (pixel < problem.pixels) step_element(problem, in, plane * problem.pixels + pixel, pixel);
    }
}

template <typename Element>
__global__ void __launch_bounds__(THREADS) norm_apply_planar(NormApplyProblem problem, Grid grid) {
    const int64_t plane = blockIdx.x / grid.runs, run = blockIdx.x % grid.runs;
    const NormChannel in = norm_channel(problem, plane / grid.columns, plane % grid.columns);
    const int64_t first = run * THREADS * PIXELS_PER_THREAD + threadIdx.x;
#pragma unroll
    for (int i = 0; i < PIXELS_PER_THREAD; ++i) {
        const int64_t pixel = first + i * THREADS;
        if (pixel < problem.pixels) norm_element<Element>(problem, in, plane * problem.pixels + pixel);
    }
}

// A thread keeps its channel and goes through pixels.
template <typename Element>
__global__ void __launch_bounds__(THREADS) norm_apply_channels_last(NormApplyProblem problem, Grid grid) {
    const int64_t run = blockIdx.x % grid.runs, column = blockIdx.x / grid.runs % grid.columns;
    const int64_t picture = blockIdx.x / (grid.runs * grid.columns);
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

}  // namespace
