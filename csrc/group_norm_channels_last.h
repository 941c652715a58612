// GroupNorm where a pixel's channels are neighbours ([B, D, H, W, C]); a task is a block of groups.
//
// Loops run over rows of pixels, then over vectors of channels, then over the row's pixels: a channel's
// coefficients stay in registers for a row, and the block's part of a row (some 10 KiB) in the first cache.
#pragma once

#include "group_norm_math.h"

namespace {
namespace channels_last {

constexpr int64_t STATISTICS_PIXELS = 128;  // pixels between two merges of moments
constexpr int64_t ROW_PIXELS = 64;          // length of a row where nothing depends on the picture's own rows

struct Block {
    int64_t picture, first_group, groups, first_channel, channels;
};

inline Block block_of(const GroupNormShape& shape, const GroupNormTasks& tasks, int64_t task) {
    const int64_t blocks = (shape.groups + tasks.groups_per_task - 1) / tasks.groups_per_task;
    Block block;
    block.picture = task / blocks;
    block.first_group = task % blocks * tasks.groups_per_task;
    block.groups = smaller(tasks.groups_per_task, shape.groups - block.first_group);
    block.first_channel = block.first_group * shape.channels_per_group();
    block.channels = block.groups * shape.channels_per_group();
    return block;
}

// A channel's coefficients, an array each, so that a vector of channels is loaded from each.
struct Coefficients {
    float *mean, *rstd, *gain, *offset;

    Coefficients(float* memory, int64_t channels)
        : mean(memory), rstd(memory + channels), gain(memory + 2 * channels), offset(memory + 3 * channels) {}
};

struct Rows {
    int64_t count, length, pixels;

    explicit Rows(const GroupNormShape& shape) : pixels(shape.pixels()) {
        length = shape.resample == Resample::NONE ? ROW_PIXELS : shape.width;
        count = (pixels + length - 1) / length;
    }
    int64_t begin(int64_t row) const { return row * length; }
    int64_t size(int64_t row) const { return smaller(length, pixels - row * length); }
};

template <bool WHOLE>
void add_moments(const float* x, int64_t pixels, int64_t stride, int64_t lanes, double before, double* mean,
                 double* squares) {
    Vector sums[4] = {};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
        for (int64_t k = 0; k < 4; ++k) sums[k] += load_lanes<WHOLE>(x + (p + k) * stride, lanes);
    for (; p < pixels; ++p) sums[0] += load_lanes<WHOLE>(x + p * stride, lanes);
    const Vector middle = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(pixels);

    // Deviations from `middle`, which need not be the exact mean: what is left of it is corrected below.
    Vector residuals[2] = {}, deviations[2] = {};
    const auto deviate = [&](int64_t pixel, int64_t k) {
        const Vector deviation = load_lanes<WHOLE>(x + pixel * stride, lanes) - middle;
        residuals[k] += deviation;
        deviations[k] += deviation * deviation;
    };
    for (p = 0; p + 2 <= pixels; p += 2) {
        deviate(p, 0);
        deviate(p + 1, 1);
    }
    if (p < pixels) deviate(p, 0);
    const Vector residual = residuals[0] + residuals[1], square = deviations[0] + deviations[1];
    const double count = static_cast<double>(pixels);
    for (int64_t lane = 0; lane < lanes; ++lane) {
        Moments moments{before, mean[lane], squares[lane]};
        const double rest = residual[lane];
        moments.add(count, middle[lane] + rest / count, square[lane] - rest * rest / count);
        mean[lane] = moments.mean;
        squares[lane] = moments.squares;
    }
}

// Mean and sum of squared deviations of each channel of the block, over all pixels.
inline void moments_of(const float* x, int64_t pixels, int64_t stride, int64_t channels, double* mean,
                       double* squares) {
    for (int64_t channel = 0; channel < channels; ++channel) mean[channel] = squares[channel] = 0;
    for (int64_t begin = 0; begin < pixels; begin += STATISTICS_PIXELS) {
        const int64_t count = smaller(STATISTICS_PIXELS, pixels - begin);
        const double before = static_cast<double>(begin);
        for (int64_t c = 0; c < channels; c += LANES) {
            const float* source = x + begin * stride + c;
            if (c + LANES <= channels)
                add_moments<true>(source, count, stride, LANES, before, mean + c, squares + c);
            else
                add_moments<false>(source, count, stride, channels - c, before, mean + c, squares + c);
        }
    }
}

// Normalises and activates a row for one vector of channels, and writes it at the output's size.
template <bool SILU, bool WHOLE>
void forward_row(const GroupNormShape& shape, const float* x, float* output, int64_t row, int64_t pixels,
                 int64_t lanes, const Coefficients& at, int64_t c) {
    const int64_t stride = shape.channels;
    const Vector mean = load_lanes<WHOLE>(at.mean + c, lanes), factor = load_lanes<WHOLE>(at.gain + c, lanes);
    const Vector offset = load_lanes<WHOLE>(at.offset + c, lanes);
    const auto value = [&](int64_t pixel) {
        return activate<SILU>(
            normalised(load_lanes<WHOLE>(x + pixel * stride + c, lanes), mean, factor, offset));
    };
    if (shape.resample == Resample::NONE) {
        for (int64_t p = row * ROW_PIXELS; p < row * ROW_PIXELS + pixels; ++p)
            store_lanes<WHOLE>(output + p * stride + c, value(p), lanes);
        return;
    }
    const int64_t d = row / shape.height, h = row % shape.height;
    const int64_t parts = shape.factor_depth * shape.factor_height;
    if (shape.resample == Resample::UP) {
        for (int64_t w = 0; w < pixels; ++w) {
            const Vector y = value(row * pixels + w);
            for (int64_t part = 0; part < parts; ++part) {
                const int64_t slice = d * shape.factor_depth + part / shape.factor_height;
                const int64_t line = h * shape.factor_height + part % shape.factor_height;
                const int64_t target =
                    (slice * shape.height * shape.factor_height + line) * 2 * pixels + 2 * w;
                store_lanes<WHOLE>(output + target * stride + c, y, lanes);
                store_lanes<WHOLE>(output + (target + 1) * stride + c, y, lanes);
            }
        }
        return;
    }
    // DOWN: the first source row of each output row does the work for all of them.
    const int64_t out_depth = shape.depth / shape.factor_depth,
                  out_height = shape.height / shape.factor_height;
    if (d % shape.factor_depth || h % shape.factor_height || d / shape.factor_depth >= out_depth ||
        h / shape.factor_height >= out_height)
        return;
    const int64_t target = (d / shape.factor_depth * out_height + h / shape.factor_height) * (pixels / 2);
    const float share = 1.0f / static_cast<float>(2 * parts);
    for (int64_t w = 0; w < pixels / 2; ++w) {
        Vector sum{};
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t slice = d + part / shape.factor_height, line = h + part % shape.factor_height;
            const int64_t source = (slice * shape.height + line) * pixels + 2 * w;
            sum += value(source) + value(source + 1);
        }
        store_lanes<WHOLE>(output + (target + w) * stride + c, sum * share, lanes);
    }
}

template <bool SILU>
void forward(const glide_fast::GroupNormForward& problem, const GroupNormTasks& tasks, int64_t begin,
             int64_t end, Scratch scratch) {
    const GroupNormShape& shape = problem.shape;
    const int64_t pixels = shape.pixels(), members = shape.channels_per_group();
    const Rows rows(shape);
    for (int64_t task = begin; task < end; ++task) {
        const Block block = block_of(shape, tasks, task);
        const float* x = problem.x + block.picture * pixels * shape.channels + block.first_channel;
        float* output =
            problem.output + block.picture * output_pixels(shape) * shape.channels + block.first_channel;
        double *means = scratch.doubles, *squares = scratch.doubles + block.channels;
        moments_of(x, pixels, shape.channels, block.channels, means, squares);

        const Coefficients at(scratch.floats, block.channels);
        for (int64_t group = 0; group < block.groups; ++group) {
            Moments moments;
            for (int64_t c = group * members; c < (group + 1) * members; ++c)
                moments.add(static_cast<double>(pixels), means[c], squares[c]);
            const float mean = static_cast<float>(moments.mean);
            const double rstd = inverse_deviation(moments, problem.eps);
            const float lost = static_cast<float>(moments.mean - mean);  // what rounding took from the mean
            problem.mean[block.picture * shape.groups + block.first_group + group] = mean;
            problem.rstd[block.picture * shape.groups + block.first_group + group] = static_cast<float>(rstd);
            for (int64_t c = group * members; c < (group + 1) * members; ++c) {
                const Affine affine = affine_of(problem, block.picture, block.first_channel + c);
                at.mean[c] = mean;
                at.gain[c] = static_cast<float>(affine.gain * rstd);
                at.offset[c] = affine.offset - lost * at.gain[c];
            }
        }
        for (int64_t row = 0; row < rows.count; ++row)
            for (int64_t c = 0; c < block.channels; c += LANES) {
                if (c + LANES <= block.channels)
                    forward_row<SILU, true>(shape, x, output, row, rows.size(row), LANES, at, c);
                else
                    forward_row<SILU, false>(shape, x, output, row, rows.size(row), block.channels - c, at,
                                             c);
            }
    }
}

// The gradient at one source pixel: the sum over its copies (UP), its share of a mean (DOWN), or itself.
template <bool WHOLE>
inline Vector gradient_at(const GroupNormShape& shape, const float* grad, int64_t row, int64_t w,
                          int64_t lanes) {
    const int64_t stride = shape.channels;
    if (shape.resample == Resample::NONE)
        return load_lanes<WHOLE>(grad + (row * ROW_PIXELS + w) * stride, lanes);
    const int64_t d = row / shape.height, h = row % shape.height;
    const int64_t parts = shape.factor_depth * shape.factor_height;
    if (shape.resample == Resample::UP) {
        Vector sum{};
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t slice = d * shape.factor_depth + part / shape.factor_height;
            const int64_t line = h * shape.factor_height + part % shape.factor_height;
            const int64_t source =
                (slice * shape.height * shape.factor_height + line) * 2 * shape.width + 2 * w;
            sum += load_lanes<WHOLE>(grad + source * stride, lanes) +
                   load_lanes<WHOLE>(grad + (source + 1) * stride, lanes);
        }
        return sum;
    }
    const int64_t out_depth = shape.depth / shape.factor_depth,
                  out_height = shape.height / shape.factor_height;
    const int64_t slice = d / shape.factor_depth, line = h / shape.factor_height;
    if (slice >= out_depth || line >= out_height || w / 2 >= shape.width / 2) return Vector{};
    const int64_t source = (slice * out_height + line) * (shape.width / 2) + w / 2;
    return load_lanes<WHOLE>(grad + source * stride, lanes) * (1.0f / static_cast<float>(2 * parts));
}

// Writes the gradient before the affine map to grad_x; adds its sum and its product with the normalised x.
template <bool SILU, bool WHOLE>
void differentiate_row(const GroupNormShape& shape, const float* grad, const float* x, float* grad_x,
                       int64_t row, const Rows& rows, int64_t lanes, const Coefficients& at, int64_t c,
                       double* sum, double* normal_sum) {
    const int64_t stride = shape.channels, first = rows.begin(row);
    const Vector mean = load_lanes<WHOLE>(at.mean + c, lanes), rstd = load_lanes<WHOLE>(at.rstd + c, lanes);
    const Vector gain = load_lanes<WHOLE>(at.gain + c, lanes),
                 offset = load_lanes<WHOLE>(at.offset + c, lanes);
    Vector sums{}, normal_sums{};
    for (int64_t w = 0; w < rows.size(row); ++w) {
        const Vector normal = (load_lanes<WHOLE>(x + (first + w) * stride + c, lanes) - mean) * rstd;
        const Vector arriving = gradient_at<WHOLE>(shape, grad + c, row, w, lanes);
        const Vector inner = activate_backward<SILU>(arriving, normal * gain + offset);
        store_lanes<WHOLE>(grad_x + (first + w) * stride + c, inner, lanes);
        sums += inner;
        normal_sums += inner * normal;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
        sum[c + lane] += sums[lane];
        normal_sum[c + lane] += normal_sums[lane];
    }
}

// grad_x = grad_x * factor - (x - mean) * slope - constant + summand, in place.
// `at` holds factor as gain, slope as rstd and constant as offset.
template <bool WHOLE>
void project_row(const float* x, const float* summand, float* grad_x, int64_t pixels, int64_t stride,
                 int64_t lanes, const Coefficients& at, int64_t c) {
    const Vector mean = load_lanes<WHOLE>(at.mean + c, lanes), factor = load_lanes<WHOLE>(at.gain + c, lanes);
    const Vector slope = load_lanes<WHOLE>(at.rstd + c, lanes),
                 constant = load_lanes<WHOLE>(at.offset + c, lanes);
    for (int64_t p = 0; p < pixels; ++p) {
        const Vector deviation = load_lanes<WHOLE>(x + p * stride + c, lanes) - mean;
        Vector inner = load_lanes<WHOLE>(grad_x + p * stride + c, lanes);
        inner = inner * factor - deviation * slope - constant;
        if (summand) inner = inner + load_lanes<WHOLE>(summand + p * stride + c, lanes);
        store_lanes<WHOLE>(grad_x + p * stride + c, inner, lanes);
    }
}

template <bool SILU>
void backward(const glide_fast::GroupNormBackward& problem, const GroupNormTasks& tasks, int64_t begin,
              int64_t end, Scratch scratch) {
    const GroupNormShape& shape = problem.shape;
    const int64_t pixels = shape.pixels(), members = shape.channels_per_group();
    const Rows rows(shape);
    for (int64_t task = begin; task < end; ++task) {
        const Block block = block_of(shape, tasks, task);
        const int64_t at_block = block.picture * pixels * shape.channels + block.first_channel;
        const float* x = problem.x + at_block;
        const float* summand = problem.summand ? problem.summand + at_block : nullptr;
        float* grad_x = problem.grad_x + at_block;
        const float* grad =
            problem.grad + block.picture * output_pixels(shape) * shape.channels + block.first_channel;
        double* sum = problem.grad_sum + block.picture * shape.channels + block.first_channel;
        double* normal_sum = problem.grad_normal_sum + block.picture * shape.channels + block.first_channel;
        const Coefficients at(scratch.floats, block.channels);
        for (int64_t c = 0; c < block.channels; ++c) {
            const int64_t group = block.picture * shape.groups + block.first_group + c / members;
            const Affine affine = affine_of(problem, block.picture, block.first_channel + c);
            at.mean[c] = problem.mean[group];
            at.rstd[c] = problem.rstd[group];
            at.gain[c] = affine.gain;
            at.offset[c] = affine.offset;
            sum[c] = normal_sum[c] = 0;
        }
        for (int64_t row = 0; row < rows.count; ++row)
            for (int64_t c = 0; c < block.channels; c += LANES) {
                const int64_t lanes = smaller(LANES, block.channels - c);
                if (lanes == LANES)
                    differentiate_row<SILU, true>(shape, grad, x, grad_x, row, rows, LANES, at, c, sum,
                                                  normal_sum);
                else
                    differentiate_row<SILU, false>(shape, grad, x, grad_x, row, rows, lanes, at, c, sum,
                                                   normal_sum);
            }

        const double count = static_cast<double>(members * pixels);
        for (int64_t group = 0; group < block.groups; ++group) {
            double group_sum = 0, group_normal_sum = 0;
            for (int64_t c = group * members; c < (group + 1) * members; ++c) {
                group_sum += at.gain[c] * sum[c];
                group_normal_sum += at.gain[c] * normal_sum[c];
            }
            for (int64_t c = group * members; c < (group + 1) * members; ++c) {
                const float rstd = at.rstd[c];
                at.gain[c] *= rstd;
                at.rstd[c] = static_cast<float>(group_normal_sum / count * rstd * rstd);
                at.offset[c] = static_cast<float>(group_sum / count * rstd);
            }
        }
        for (int64_t first = 0; first < pixels; first += ROW_PIXELS) {
            const int64_t length = smaller(ROW_PIXELS, pixels - first), start = first * shape.channels;
            const float* added = summand ? summand + start : nullptr;
            for (int64_t c = 0; c < block.channels; c += LANES) {
                const int64_t lanes = smaller(LANES, block.channels - c);
                if (lanes == LANES)
                    project_row<true>(x + start, added, grad_x + start, length, shape.channels, LANES, at, c);
                else
                    project_row<false>(x + start, added, grad_x + start, length, shape.channels, lanes, at,
                                       c);
            }
        }
    }
}

}  // namespace channels_last
}  // namespace
