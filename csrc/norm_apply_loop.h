// A normalised map, affine, FiLM and SiLU: what the loops of the CPU and the threads of a GPU call.
#pragma once

#include "elements.h"
#include "norm_apply.h"

namespace {

using glide_fast::NormApplyProblem;

// What does not change within a channel of a picture.
struct NormChannel {
    float mean, factor, offset;
};

GLIDE_FAST_ELEMENT NormChannel norm_channel(const NormApplyProblem& problem, int64_t picture,
                                            int64_t channel) {
    const int64_t group = picture * problem.groups + channel / (problem.channels / problem.groups);
    const int64_t place = picture * problem.channels + channel;
    Affine affine{problem.weight[channel], problem.bias[channel]};
    if (problem.scale != nullptr) affine = with_film(affine, problem.scale[place], problem.shift[place]);
    return {problem.mean[group], problem.rstd[group] * affine.gain, affine.offset};
}

// The place of a pixel of a channel in x and y.
GLIDE_FAST_ELEMENT int64_t norm_place(const NormApplyProblem& problem, int64_t picture, int64_t channel,
                                      int64_t pixel) {
    return problem.channels_last ? (picture * problem.pixels + pixel) * problem.channels + channel
                                 : (picture * problem.channels + channel) * problem.pixels + pixel;
}

template <typename Element>
GLIDE_FAST_ELEMENT void norm_element(const NormApplyProblem& problem, const NormChannel& in, int64_t place) {
    const float x = static_cast<float>(static_cast<const Element*>(problem.x)[place]);
    float z = normalised(x, in.mean, in.factor, in.offset);
    if (problem.silu) z = silu(z, exponential(-z));
    static_cast<Element*>(problem.y)[place] = static_cast<Element>(z);
}

}  // namespace
