// What the op norm_apply hands to its loops, on the CPU or on a GPU. Plain data only.
#pragma once

#include <stdint.h>

namespace glide_fast {

// x and y are [batch, channels, pixels], or channels last [batch, pixels, channels], without gaps.
struct NormApplyProblem {
    int64_t batch, channels, groups, pixels;
    bool channels_last, silu;
    const void* x;
    void* y;
    const float *mean, *rstd;    // [batch, groups]
    const float *weight, *bias;  // [channels]
    const float *scale, *shift;  // [batch, channels], or both null
};

}  // namespace glide_fast
