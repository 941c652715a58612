// The activations of transformers. Plain data only: code compiled for different ISAs shares it.
#pragma once

#include <stdint.h>

namespace glide_fast {

enum class Activation : int64_t { NONE, GELU, QUICK_GELU };  // as in glide_fast/ops/reference.py

struct ActivationKernels {
    void (*forward)(Activation, const float* x, float* result, int64_t count);
    void (*backward)(Activation, const float* grad, const float* x, float* result, int64_t count);
};

}  // namespace glide_fast
