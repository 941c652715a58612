// Layer normalisation for one ISA. A row is read again from the first cache where it is needed again.
#include "layer_norm.h"

#include "vector.h"

namespace {

using glide_fast::LayerNormBackward;
using glide_fast::LayerNormForward;

inline Vector first_lanes(Vector value, int64_t count) {
    float lanes[LANES];
    store(lanes, value);
    return load_first(lanes, count);
}

// A pair of sums over the channels; `term(c)` gives both summands of the vector at c, `last(c, count)` those
// of the incomplete vector at the end.
struct Pair {
    Vector first, second;
};

inline Pair operator+(Pair a, Pair b) {
    return {a.first + b.first, a.second + b.second};
}

template <typename Term>
Pair sum_over(int64_t channels, Term term) {
    Pair sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES)
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) sums[i] = sums[i] + term(c + i * LANES, LANES);
    for (; c + LANES <= channels; c += LANES) sums[0] = sums[0] + term(c, LANES);
    if (c < channels) {
        const Pair rest = term(c, channels - c);
        sums[1] =
            sums[1] + Pair{first_lanes(rest.first, channels - c), first_lanes(rest.second, channels - c)};
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename Function>
void for_vectors(int64_t channels, Function function) {
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) function(c, LANES);
    if (c < channels) function(c, channels - c);
}

inline Vector load_some(const float* source, int64_t lanes) {
    return lanes == LANES ? load(source) : load_first(source, lanes);
}

inline void store_some(float* target, Vector value, int64_t lanes) {
    if (lanes == LANES)
        store(target, value);
    else
        store_first(target, value, lanes);
}

// Deviations are taken from the mean rounded to float; what their own mean is then not zero by corrects both
// mean and variance, so that nothing cancels where the mean is large.
void forward(const LayerNormForward& problem, int64_t begin, int64_t end) {
    const int64_t channels = problem.channels;
    const double count = static_cast<double>(channels);
    for (int64_t row = begin; row < end; ++row) {
        const float* x = problem.x + row * problem.x_row;
        float* target = problem.output + row * channels;
        const Pair total = sum_over(
            channels, [=](int64_t c, int64_t lanes) { return Pair{load_some(x + c, lanes), Vector{}}; });
        const float centre = static_cast<float>(sum_of_lanes(total.first) / count);
        const Pair moments = sum_over(channels, [=](int64_t c, int64_t lanes) {
            const Vector deviation = load_some(x + c, lanes) - centre;
            return Pair{deviation, deviation * deviation};
        });
        const double shift = sum_of_lanes(moments.first) / count;
        const double variance = sum_of_lanes(moments.second) / count - shift * shift;
        const double inverse = 1.0 / __builtin_sqrt((variance > 0 ? variance : 0 * variance) + problem.eps);
        const float rest = static_cast<float>(shift), rstd = static_cast<float>(inverse);
        for_vectors(channels, [=](int64_t c, int64_t lanes) {
            const Vector normal = ((load_some(x + c, lanes) - centre) - rest) * rstd;
            const Vector gain = load_some(problem.weight + c, lanes);
            store_some(target + c, normal * gain + load_some(problem.bias + c, lanes), lanes);
        });
        problem.mean[row] = static_cast<float>(centre + shift);
        problem.rstd[row] = rstd;
    }
}

void backward_row(const LayerNormBackward& problem, int64_t row, float* sums) {
    const int64_t channels = problem.channels;
    const float *x = problem.x + row * problem.x_row, *grad = problem.grad + row * problem.grad_row;
    const float mean = problem.mean[row], rstd = problem.rstd[row];
    if (problem.grad_x != nullptr) {
        const Pair totals = sum_over(channels, [=](int64_t c, int64_t lanes) {
            const Vector inner = load_some(grad + c, lanes) * load_some(problem.weight + c, lanes);
            return Pair{inner, inner * ((load_some(x + c, lanes) - mean) * rstd)};
        });
        const double count = static_cast<double>(channels);
        const float inner_mean = static_cast<float>(sum_of_lanes(totals.first) / count);
        const float normal_mean = static_cast<float>(sum_of_lanes(totals.second) / count);
        float* target = problem.grad_x + row * channels;
        for_vectors(channels, [=](int64_t c, int64_t lanes) {
            const Vector inner = load_some(grad + c, lanes) * load_some(problem.weight + c, lanes);
            const Vector normal = (load_some(x + c, lanes) - mean) * rstd;
            store_some(target + c, (inner - inner_mean - normal * normal_mean) * rstd, lanes);
        });
    }
    if (sums != nullptr)
        for_vectors(channels, [=](int64_t c, int64_t lanes) {
            const Vector arriving = load_some(grad + c, lanes);
            const Vector normal = (load_some(x + c, lanes) - mean) * rstd;
            float *weight = sums + c, *bias = sums + channels + c;
            store_some(weight, load_some(weight, lanes) + arriving * normal, lanes);
            store_some(bias, load_some(bias, lanes) + arriving, lanes);
        });
}

void backward(const LayerNormBackward& problem, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
        float* sums = nullptr;
        if (problem.sums != nullptr) {
            sums = problem.sums + task * 2 * problem.channels;
            for_vectors(2 * problem.channels,
                        [=](int64_t c, int64_t lanes) { store_some(sums + c, Vector{}, lanes); });
        }
        const int64_t first = task * problem.rows_per_task, last = first + problem.rows_per_task;
        for (int64_t row = first; row < last && row < problem.rows; ++row) backward_row(problem, row, sums);
    }
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {forward, backward};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
