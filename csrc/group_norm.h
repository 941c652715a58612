// What the GroupNorm op hands to its kernels. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include <stdint.h>

namespace glide_fast {

enum class Resample : int64_t { NONE = 0, UP = 1, DOWN = 2 };

// x is [B, C, D, H, W] in memory (planar) or [B, D, H, W, C] (channels last); absent dimensions are 1.
struct GroupNormShape {
    int64_t batch, channels, groups;
    int64_t depth, height, width;
    int64_t factor_depth, factor_height;  // 2 where resampling acts on that dimension, else 1; width's is 2
    bool channels_last;
    bool silu;
    Resample resample;

    int64_t pixels() const { return depth * height * width; }
    int64_t channels_per_group() const { return channels / groups; }
};

struct GroupNormForward {
    GroupNormShape shape;
    const float *x, *weight, *bias;
    const float *scale, *shift;  // [B, C] with these row strides, or both null
    int64_t scale_stride, shift_stride;
    double eps;
    float *output, *mean, *rstd;
};

struct GroupNormBackward {
    GroupNormShape shape;
    const float *grad, *x, *weight, *bias;
    const float *scale, *shift;
    int64_t scale_stride, shift_stride;
    const float *mean, *rstd;
    const float* summand;  // added to grad_x, laid out like it; or null
    float* grad_x;
    // Sums over the pixels, [B, C]: of the gradient before the affine map, and of it times the normalised x.
    // The gradients of weight, bias, scale and shift are made of them.
    double *grad_sum, *grad_normal_sum;
};

// Work is cut into tasks that share nothing, so results do not depend on the number of threads.
struct GroupNormTasks {
    int64_t tasks;            // tasks of one call
    int64_t groups_per_task;  // 1, or in channels-last memory as many as make whole vectors
    int64_t scratch_floats;   // memory that each thread must bring
    int64_t scratch_doubles;
};

struct Scratch {
    float* floats;
    double* doubles;
};

// Channels-last pixels: mean and sum of squared deviations of each channel.
struct ChannelMoments {
    const float* x;  // [pixels, channels]
    int64_t pixels, channels;
    double *mean, *squares;  // [channels]
};

// One table for each ISA; `begin` and `end` select tasks.
struct GroupNormKernels {
    void (*forward)(const GroupNormForward&, const GroupNormTasks&, int64_t begin, int64_t end, Scratch);
    void (*backward)(const GroupNormBackward&, const GroupNormTasks&, int64_t begin, int64_t end, Scratch);
    void (*channel_moments)(const ChannelMoments&);
};

}  // namespace glide_fast
