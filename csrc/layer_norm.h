// What layer normalisation hands to its kernels. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include <stdint.h>

namespace glide_fast {

struct LayerNormForward {
    int64_t channels;
    const float* x;  // rows of channels
    int64_t x_row;   // stride of rows
    const float *weight, *bias;
    double eps;
    float* output;  // dense
    float *mean, *rstd;
};

struct LayerNormBackward {
    int64_t rows, channels;
    const float *grad, *x;  // rows of channels
    int64_t grad_row, x_row;
    const float *weight, *mean, *rstd;
    float* grad_x;  // dense; or null
    float* sums;    // of each task [2, channels]: the gradients of weight and bias by its rows; or null
    int64_t rows_per_task;
};

struct LayerNormKernels {
    void (*forward)(const LayerNormForward&, int64_t begin, int64_t end);    // rows
    void (*backward)(const LayerNormBackward&, int64_t begin, int64_t end);  // tasks
};

}  // namespace glide_fast
