// GroupNorm, affine map and FiLM of one or two channels-last maps as one gain and offset a channel, for a
// convolution that applies them to its input. Called from glide_fast/ops/convolution_cpu.py, which checks.
#include <algorithm>
#include <tuple>

#include "isa.h"
#include "moments.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace glide_fast {
namespace {

constexpr int64_t PIXELS_PER_TASK = 512;

// The moments of every channel of a map [B, C, H, W], put together from ranges of its pixels. `stride` and
// `first` place a picture's channels in the result.
void add_map(const Tensor& x, int64_t stride, int64_t first, std::vector<Moments>& result) {
    const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    const int64_t ranges = divide_up(pixels, PIXELS_PER_TASK);
    std::vector<double> parts(2 * batch * ranges * channels);
    const float* pixels_of_all = data(x);
    for_each_task(batch * ranges, 8 * std::min(PIXELS_PER_TASK, pixels) * channels,
                  [&](int64_t begin, int64_t end) {
                      for (int64_t task = begin; task < end; ++task) {
                          const int64_t from = task % ranges * PIXELS_PER_TASK;
                          const int64_t count = std::min(PIXELS_PER_TASK, pixels - from);
                          double* part = parts.data() + 2 * task * channels;
                          current_isa().group_norm->channel_moments(
                              {pixels_of_all + (task / ranges * pixels + from) * channels, count, channels,
                               part, part + channels});
                      }
                  });
    for (int64_t task = 0; task < batch * ranges; ++task) {
        const double* part = parts.data() + 2 * task * channels;
        const int64_t count = std::min(PIXELS_PER_TASK, pixels - task % ranges * PIXELS_PER_TASK);
        Moments* target = result.data() + task / ranges * stride + first;
        for (int64_t channel = 0; channel < channels; ++channel)
            target[channel].add(static_cast<double>(count), part[channel], part[channels + channel]);
    }
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four group_norm_coefficients(Tensor x, OptionalTensor skip, Tensor weight, Tensor bias, OptionalTensor scale,
                             OptionalTensor shift, int64_t groups, double eps) {
    const int64_t batch = x.size(0), channels = x.size(1) + (skip ? skip->size(1) : 0);
    std::vector<Moments> moments(batch * channels);
    add_map(x, channels, 0, moments);
    if (skip) add_map(*skip, channels, x.size(1), moments);

    Tensor gain = empty({batch, channels}), offset = empty({batch, channels});
    Tensor mean = empty({batch, groups}), rstd = empty({batch, groups});
    float *gains = mutable_data(gain), *offsets = mutable_data(offset);
    float *means = mutable_data(mean), *inverses = mutable_data(rstd);
    const float *weights = data(weight), *biases = data(bias), *scales = data(scale), *shifts = data(shift);
    const int64_t scale_stride = scale ? scale->stride(0) : 0, shift_stride = shift ? shift->stride(0) : 0;
    const int64_t members = channels / groups;
    for (int64_t picture = 0; picture < batch; ++picture)
        for (int64_t group = 0; group < groups; ++group) {
            Moments all;
            for (int64_t c = group * members; c < (group + 1) * members; ++c) {
                const Moments& part = moments[picture * channels + c];
                all.add(part.count, part.mean, part.squares);
            }
            const double inverse = inverse_deviation(all, eps);
            means[picture * groups + group] = static_cast<float>(all.mean);
            inverses[picture * groups + group] = static_cast<float>(inverse);
            for (int64_t c = group * members; c < (group + 1) * members; ++c) {
                const double film = scale ? 1.0 + scales[picture * scale_stride + c] : 1.0;
                const double shifted = shift ? shifts[picture * shift_stride + c] : 0.0;
                const double factor = weights[c] * film * inverse;
                gains[picture * channels + c] = static_cast<float>(factor);
                offsets[picture * channels + c] =
                    static_cast<float>(biases[c] * film + shifted - all.mean * factor);
            }
        }
    return {gain, offset, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glide_fast, library) {
    library.def(
        "group_norm_coefficients(Tensor x, Tensor? skip, Tensor weight, Tensor bias, Tensor? scale, "
        "Tensor? shift, int groups, float eps) -> (Tensor gain, Tensor offset, Tensor mean, Tensor rstd)");
}

STABLE_TORCH_LIBRARY_IMPL(glide_fast, CPU, library) {
    library.impl("group_norm_coefficients", TORCH_BOX(&group_norm_coefficients));
}

}  // namespace glide_fast
