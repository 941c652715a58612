// Runs every thread of the grids of csrc/cuda/kernels.h one after the other, and compares with plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __global__
#define __launch_bounds__(threads)
struct Index {
    int64_t x;
};
static Index blockIdx, threadIdx;

#include "csrc/cuda/kernels.h"

namespace {

using glide_fast::Deviation;
using glide_fast::Direction;

float number(int64_t seed) {
    return std::sin(12.9898 * static_cast<double>(seed + 1)) * 2;
}

std::vector<float> numbers(int64_t count, int64_t seed) {
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = number(seed * 100003 + i);
    return values;
}

template <typename Kernel, typename Problem>
void start(Kernel kernel, const Problem& problem, const Grid& grid) {
    for (blockIdx.x = 0; blockIdx.x < grid.blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x) kernel(problem, grid);
}

void expect(bool holds, const char* what, int64_t place) {
    if (holds) return;
    std::printf("%s differs at %lld\n", what, static_cast<long long>(place));
    std::exit(1);
}

// By the equation, in double precision.
void check_norm(int64_t batch, int64_t channels, int64_t groups, int64_t pixels, bool channels_last,
                bool film) {
    const auto x = numbers(batch * channels * pixels, 1), mean = numbers(batch * groups, 2);
    const auto rstd = numbers(batch * groups, 3), weight = numbers(channels, 4), bias = numbers(channels, 5);
    const auto scale = numbers(batch * channels, 6), shift = numbers(batch * channels, 7);
    std::vector<float> y(x.size(), NAN);
    NormApplyProblem problem{};
    problem.batch = batch;
    problem.channels = channels;
    problem.groups = groups;
    problem.pixels = pixels;
    problem.channels_last = channels_last;
    problem.silu = true;
    problem.x = x.data();
    problem.y = y.data();
    problem.mean = mean.data();
    problem.rstd = rstd.data();
    problem.weight = weight.data();
    problem.bias = bias.data();
    problem.scale = film ? scale.data() : nullptr;
    problem.shift = film ? shift.data() : nullptr;
    if (channels_last)
        start(norm_apply_channels_last<float>, problem, channels_last_grid(problem));
    else
        start(norm_apply_planar<float>, problem, planar_grid(batch, channels, pixels));
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t place =
                    channels_last ? (b * pixels + p) * channels + c : (b * channels + c) * pixels + p;
                const int64_t group = b * groups + c * groups / channels, row = b * channels + c;
                double z = (x[place] - mean[group]) * static_cast<double>(rstd[group]) * weight[c] + bias[c];
                if (film) z = z * (1.0 + scale[row]) + shift[row];
                const double wanted = z / (1 + std::exp(-z));
                expect(std::fabs(y[place] - wanted) <= 1e-5 * (1 + std::fabs(wanted)), "norm_apply", place);
            }
}

// Against the loop that the CPU runs, which the tests of the op hold to the reference.
void check_step(int64_t batch, int64_t channels, int64_t pixels) {
    const auto x = numbers(batch * channels * pixels, 1), noise = numbers(batch * channels * pixels, 2);
    const auto output = numbers(4 * batch * channels * pixels, 3), table = numbers(3 * 8, 4);
    std::vector<int64_t> t(batch);
    for (int64_t b = 0; b < batch; ++b) t[b] = b % 3;
    const float guidance = 2.5f;
    std::vector<float> results[4];
    for (auto& each : results) each.assign(x.size(), NAN);
    StepProblem problem{};
    problem.rule = {Deviation::LEARNED_RANGE, Direction::X, true};
    problem.batch = batch;
    problem.channels = channels;
    problem.pixels = pixels;
    problem.x = x.data();
    problem.noise = noise.data();
    problem.guidance = &guidance;
    problem.output = output.data();
    problem.output_row = 2 * channels * pixels;
    problem.output_channel = 1;
    problem.output_pixel = 2 * channels;
    problem.table = reinterpret_cast<const StepCoefficients*>(table.data());
    problem.t = t.data();
    problem.next = results[0].data();
    problem.x_start = results[1].data();
    start(sampler_step_kernel<float>, problem, planar_grid(batch, channels, pixels));
    problem.next = results[2].data();
    problem.x_start = results[3].data();
    for (int64_t plane = 0; plane < batch * channels; ++plane) {
        const auto in = step_channel<float>(problem, plane / channels, plane % channels);
        for (int64_t pixel = 0; pixel < pixels; ++pixel)
            step_element(problem, in, plane * pixels + pixel, pixel);
    }
    for (size_t i = 0; i < x.size(); ++i)
        for (int which = 0; which < 2; ++which)
            expect(results[which][i] == results[which + 2][i], "sampler_step", static_cast<int64_t>(i));
}

}  // namespace

int main() {
    for (const int64_t pixels : {1, 33, 1024, 1025, 2500})
        for (const bool film : {false, true}) {
            for (const bool last : {false, true}) {
                check_norm(2, 6, 3, pixels, last, film);
                check_norm(1, 66, 2, pixels, last, film);
            }
            check_step(3, 3, pixels);
        }
    std::puts("equal");
    return 0;
}
