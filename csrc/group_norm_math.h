// GroupNorm's arithmetic, independent of the memory layout. Compiled for each ISA.
#pragma once

#include "elements.h"
#include "group_norm.h"
#include "moments.h"
#include "vector.h"

namespace {

using glide_fast::GroupNormShape;
using glide_fast::GroupNormTasks;
using glide_fast::Resample;
using glide_fast::Scratch;

inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <typename Problem>
inline Affine affine_of(const Problem& problem, int64_t picture, int64_t channel) {
    const Affine plain{problem.weight[channel], problem.bias[channel]};
    if (problem.scale == nullptr) return plain;
    return with_film(plain, problem.scale[picture * problem.scale_stride + channel],
                     problem.shift[picture * problem.shift_stride + channel]);
}

template <bool SILU>
inline Vector activate(Vector z) {
    return SILU ? silu(z, exponential(-z)) : z;
}

// d activate(z) / dz times the gradient that arrives.
template <bool SILU>
inline Vector activate_backward(Vector grad, Vector z) {
    if (!SILU) return grad;
    const Vector s = sigmoid(z);
    return grad * (s * (1.0f + z * (1.0f - s)));
}

inline int64_t resample_factor(const GroupNormShape& shape) {
    return shape.resample == Resample::NONE ? 1 : 2 * shape.factor_depth * shape.factor_height;
}

inline int64_t output_pixels(const GroupNormShape& shape) {
    if (shape.resample == Resample::UP) return shape.pixels() * resample_factor(shape);
    if (shape.resample == Resample::NONE) return shape.pixels();
    return (shape.depth / shape.factor_depth) * (shape.height / shape.factor_height) * (shape.width / 2);
}

}  // namespace
