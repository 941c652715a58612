// The GroupNorm kernels for one ISA. setup.py compiles this file once for each, with that ISA's flags and
// GLIDE_FAST_ISA naming the table (generic, avx2, avx512).
#include "group_norm_channels_last.h"
#include "group_norm_planar.h"

namespace {

using glide_fast::GroupNormBackward;
using glide_fast::GroupNormForward;

void forward(const GroupNormForward& problem, const GroupNormTasks& tasks, int64_t begin, int64_t end,
             Scratch scratch) {
    if (problem.shape.channels_last)
        (problem.shape.silu ? channels_last::forward<true>
                            : channels_last::forward<false>)(problem, tasks, begin, end, scratch);
    else
        (problem.shape.silu ? planar::forward<true> : planar::forward<false>)(problem, begin, end, scratch);
}

void backward(const GroupNormBackward& problem, const GroupNormTasks& tasks, int64_t begin, int64_t end,
              Scratch scratch) {
    if (problem.shape.channels_last)
        (problem.shape.silu ? channels_last::backward<true>
                            : channels_last::backward<false>)(problem, tasks, begin, end, scratch);
    else
        (problem.shape.silu ? planar::backward<true> : planar::backward<false>)(problem, begin, end, scratch);
}

void channel_moments(const glide_fast::ChannelMoments& problem) {
    channels_last::moments_of(problem.x, problem.pixels, problem.channels, problem.channels, problem.mean,
                              problem.squares);
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const GroupNormKernels group_norm_kernels;
const GroupNormKernels group_norm_kernels = {forward, backward, channel_moments};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
