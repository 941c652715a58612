// A sampler's step over whole pictures, for the CPU's loops and the GPU's threads.
#pragma once

#include "elements.h"

namespace {

// Pictures are [batch, channels, pixels] without gaps; the output has any strides of rows, channels, pixels.
template <typename Output>
struct StepProblem {
    StepRule rule;
    int64_t batch, channels, pixels, timesteps;
    const float *x, *noise, *guidance;  // no noise, or no guidance: null
    const Output* output;               // [batch or 2 batch, channels or 2 channels, pixels]
    int64_t output_row, output_channel, output_pixel;
    const StepCoefficients* table;  // [timesteps]
    const int64_t* t;               // [batch]
    float *next, *x_start;
};

// What does not change within a channel of a picture.
template <typename Output>
struct StepChannel {
    StepCoefficients at;
    const Output *conditional, *unconditional, *variance;
    float scale;
    bool noisy;
};

template <typename Output>
GLIDE_FAST_ELEMENT StepChannel<Output> step_channel(const StepProblem<Output>& problem, int64_t picture,
                                                    int64_t channel) {
    const int64_t t = problem.t[picture];
    StepChannel<Output> found;
    found.at = problem.table[t];
    found.noisy = problem.noise != nullptr && t != 0;
    found.conditional = problem.output + picture * problem.output_row + channel * problem.output_channel;
    found.variance = found.conditional + problem.channels * problem.output_channel;
    found.unconditional = found.conditional + problem.batch * problem.output_row;
    found.scale = problem.guidance != nullptr ? *problem.guidance : 0.0f;
    return found;
}

template <typename Output>
GLIDE_FAST_ELEMENT void step_element(const StepProblem<Output>& problem, const StepChannel<Output>& in,
                                     int64_t index, int64_t pixel) {
    const int64_t place = pixel * problem.output_pixel;
    float output = static_cast<float>(in.conditional[place]);
    if (problem.guidance != nullptr)
        output = guided(output, static_cast<float>(in.unconditional[place]), in.scale);
    Stepped stepped = step_without_noise(in.at, problem.rule, problem.x[index], output);
    if (in.noisy) {
        const Deviation kind = problem.rule.deviation;
        const float value = kind == Deviation::TABLE ? 0.0f : static_cast<float>(in.variance[place]);
        stepped.next = stepped.next + deviation_of(in.at, kind, value) * problem.noise[index];
    }
    problem.next[index] = stepped.next;
    problem.x_start[index] = stepped.x_start;
}

}  // namespace
