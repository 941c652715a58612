// What the op sampler_step hands to its loops, on the CPU or on a GPU. Plain data only.
#pragma once

#include <stdint.h>

namespace glide_fast {

enum class Deviation : int64_t { TABLE, LEARNED, LEARNED_RANGE };
enum class Direction : int64_t { X, NOISE, OUTPUT };

struct StepRule {
    Deviation deviation;
    Direction direction;
    bool clip;
};

// One row of the table of glide_fast/ops/sampler_step.py, in the order of its columns.
struct StepCoefficients {
    float guess_x, guess_output, mean_start, mean_direction, noise_x, noise_start, low, high;
};

// Pictures are [batch, channels, pixels] without gaps; the output has any strides of rows, channels, pixels.
struct StepProblem {
    StepRule rule;
    int64_t batch, channels, pixels;
    const float *x, *noise, *guidance;  // no noise, or no guidance: null
    const void* output;                 // [batch or 2 batch, channels or 2 channels, pixels]
    int64_t output_row, output_channel, output_pixel;
    const StepCoefficients* table;
    const int64_t* t;  // [batch]
    float *next, *x_start;
};

}  // namespace glide_fast
