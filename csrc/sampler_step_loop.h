// A sampler's step over whole pictures: what the loops of the CPU and the threads of a GPU call.
#pragma once

#include "elements.h"

namespace {

using glide_fast::StepProblem;

// What does not change within a channel of a picture.
template <typename Output>
struct StepChannel {
    StepCoefficients at;
    const Output *conditional, *unconditional, *variance;
    float scale;
    bool noisy;
};

template <typename Output>
GLIDE_FAST_ELEMENT StepChannel<Output> step_channel(const StepProblem& problem, int64_t picture,
                                                    int64_t channel) {
    const int64_t t = problem.t[picture];
    StepChannel<Output> found;
    found.at = problem.table[t];
    found.noisy = problem.noise != nullptr && t != 0;
    found.conditional = static_cast<const Output*>(problem.output) + picture * problem.output_row +
                        channel * problem.output_channel;
    found.variance = found.conditional + problem.channels * problem.output_channel;
    found.unconditional = found.conditional + problem.batch * problem.output_row;
    found.scale = problem.guidance != nullptr ? *problem.guidance : 0.0f;
    return found;
}

// One pixel of a channel; `index` is its place in the pictures.
template <typename Output>
GLIDE_FAST_ELEMENT void step_element(const StepProblem& problem, const StepChannel<Output>& in, int64_t index,
                                     int64_t pixel) {
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
