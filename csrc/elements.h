// The arithmetic of single elements, the same for CPU and GPU: FiLM, the affine map, SiLU, a sampler's step.
//
// csrc/ runs these functions on the CPU, csrc/cuda on GPUs. Those of GroupNorm are templates, as the CPU has
// vectors of elements. Functions are anonymous and no standard header is used, for vector.h's reason.
#pragma once

#include <stdint.h>

#include "sampler_step.h"

#ifdef __CUDACC__
#define GLIDE_FAST_ELEMENT __host__ __device__ __forceinline__
#else
#define GLIDE_FAST_ELEMENT inline
#endif

namespace {

// The exponential of one number; vector.h has that of a vector.
GLIDE_FAST_ELEMENT float exponential(float x) {
#ifdef __CUDA_ARCH__
    return expf(x);
#else
    return __builtin_expf(x);
#endif
}

// z = ((x - mean) * rstd) * gain + offset, for one channel of one picture: affine map and FiLM in one.
struct Affine {
    float gain, offset;
};

GLIDE_FAST_ELEMENT Affine with_film(Affine plain, float scale, float shift) {
    const float film = 1.0f + scale;
    return {plain.gain * film, plain.offset * film + shift};
}

// `factor` is rstd * gain.
template <typename Value>
GLIDE_FAST_ELEMENT Value normalised(Value x, Value mean, Value factor, Value offset) {
    return (x - mean) * factor + offset;
}

template <typename Value>
GLIDE_FAST_ELEMENT Value silu(Value z, Value exponential_of_minus_z) {
    return z / (1.0f + exponential_of_minus_z);
}

using glide_fast::Deviation;
using glide_fast::Direction;
using glide_fast::StepCoefficients;
using glide_fast::StepRule;

struct Stepped {
    float next, x_start;
};

GLIDE_FAST_ELEMENT float guided(float conditional, float unconditional, float scale) {
    return unconditional + scale * (conditional - unconditional);
}

// The deviation of the noise; `value` is the output's channel for it.
GLIDE_FAST_ELEMENT float deviation_of(const StepCoefficients& at, Deviation kind, float value) {
    if (kind == Deviation::TABLE) return at.low;
    if (kind == Deviation::LEARNED_RANGE) {
        const float share = (value + 1.0f) * 0.5f;  // the v of Improved DDPM, equation 15
        value = share * at.high + (1.0f - share) * at.low;
    }
    return exponential(0.5f * value);
}

// x' without its noise, and the guess of x_0. A NaN stays one: it fails both comparisons of the clip.
GLIDE_FAST_ELEMENT Stepped step_without_noise(const StepCoefficients& at, const StepRule& rule, float x,
                                              float output) {
    float guess = at.guess_x * x + at.guess_output * output;
    if (rule.clip) {
        guess = guess < -1.0f ? -1.0f : guess;
        guess = guess > 1.0f ? 1.0f : guess;
    }
    if (rule.direction == Direction::OUTPUT) return {output, guess};
    const float direction =
        rule.direction == Direction::NOISE ? (at.noise_x * x - guess) / at.noise_start : x;
    return {at.mean_start * guess + at.mean_direction * direction, guess};
}

}  // namespace
