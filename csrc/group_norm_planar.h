// GroupNorm where each channel is one contiguous plane ([B, C, D, H, W]); a task is one group of one picture.
#pragma once

#include "group_norm_math.h"

namespace {
namespace planar {

// Elements that go into float accumulators before these go into doubles. Deviations from a mean are small and
// spread over several accumulators; plain sums get no more than 64 additions in a lane.
constexpr int64_t MOMENTS_CHUNK = 4096;
constexpr int64_t SUM_CHUNK = 64 * LANES;

inline Moments moments_of(const float* x, int64_t count) {
    Moments moments;
    for (int64_t begin = 0; begin < count; begin += MOMENTS_CHUNK) {
        const int64_t length = smaller(MOMENTS_CHUNK, count - begin);
        const int64_t whole = length / LANES * LANES, rest = length - whole;
        const float* run = x + begin;
        Vector sums[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= whole; i += 4 * LANES)
            for (int64_t k = 0; k < 4; ++k) sums[k] += load(run + i + k * LANES);
        for (; i < whole; i += LANES) sums[0] += load(run + i);
        if (rest) sums[1] += load_first(run + whole, rest);
        const double n = static_cast<double>(length);
        const float middle = static_cast<float>(sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / n);

        // Deviations from `middle`, which need not be the exact mean: what is left of it is corrected below.
        Vector residuals[2] = {}, squares[2] = {};
        i = 0;
        for (; i + 2 * LANES <= whole; i += 2 * LANES)
            for (int64_t k = 0; k < 2; ++k) {
                const Vector deviation = load(run + i + k * LANES) - middle;
                residuals[k] += deviation;
                squares[k] += deviation * deviation;
            }
        for (; i < whole; i += LANES) {
            const Vector deviation = load(run + i) - middle;
            residuals[0] += deviation;
            squares[0] += deviation * deviation;
        }
        double residual = sum_of_lanes(residuals[0] + residuals[1]);
        double square = sum_of_lanes(squares[0] + squares[1]);
        for (i = whole; i < length; ++i) {
            const float deviation = run[i] - middle;
            residual += deviation;
            square += deviation * deviation;
        }
        moments.add(n, middle + residual / n, square - residual * residual / n);
    }
    return moments;
}

// y = activate((x - mean) * factor + offset)
template <bool SILU>
void apply(const float* x, float* y, int64_t count, float mean, float factor, float offset) {
    const Vector shift = splat(mean), by = splat(factor), plus = splat(offset);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(y + i, activate<SILU>(normalised(load(x + i), shift, by, plus)));
    if (i < count) {
        const Vector last = load_first(x + i, count - i);
        store_first(y + i, activate<SILU>(normalised(last, shift, by, plus)), count - i);
    }
}

// Each row twice, each pixel of it twice.
inline void spread(const GroupNormShape& shape, const float* plane, float* output) {
    const int64_t width = shape.width, rows = shape.height * shape.factor_height;
    for (int64_t d = 0; d < shape.depth; ++d)
        for (int64_t h = 0; h < shape.height; ++h) {
            const float* source = plane + (d * shape.height + h) * width;
            float* first = output + (d * shape.factor_depth * rows + h * shape.factor_height) * 2 * width;
            for (int64_t w = 0; w < width; ++w) first[2 * w] = first[2 * w + 1] = source[w];
            for (int64_t copy = 1; copy < shape.factor_depth * shape.factor_height; ++copy) {
                const int64_t row = (copy / shape.factor_height) * rows + copy % shape.factor_height;
                __builtin_memcpy(first + row * 2 * width, first, sizeof(float) * 2 * width);
            }
        }
}

// factor * the sum of the pixels that fall on each pixel at half the size; the sizes are `plane`'s.
inline void gather(const GroupNormShape& shape, const float* plane, float* output, int64_t depth,
                   int64_t height, int64_t width, float factor) {
    const int64_t out_depth = depth / shape.factor_depth, out_height = height / shape.factor_height;
    for (int64_t d = 0; d < out_depth; ++d)
        for (int64_t h = 0; h < out_height; ++h) {
            float* target = output + (d * out_height + h) * (width / 2);
            for (int64_t part = 0; part < shape.factor_depth * shape.factor_height; ++part) {
                const int64_t slice = d * shape.factor_depth + part / shape.factor_height;
                const float* source =
                    plane + (slice * height + h * shape.factor_height + part % shape.factor_height) * width;
                if (part == 0)
                    for (int64_t w = 0; w < width / 2; ++w) target[w] = source[2 * w] + source[2 * w + 1];
                else
                    for (int64_t w = 0; w < width / 2; ++w) target[w] += source[2 * w] + source[2 * w + 1];
            }
            for (int64_t w = 0; w < width / 2; ++w) target[w] *= factor;
        }
}

// The adjoint of averaging: each pixel's share of the gradient of the pixel it went into, or zero.
inline void share(const GroupNormShape& shape, const float* grad, float* plane, float factor) {
    const int64_t out_depth = shape.depth / shape.factor_depth,
                  out_height = shape.height / shape.factor_height;
    const int64_t out_width = shape.width / 2;
    for (int64_t d = 0; d < shape.depth; ++d)
        for (int64_t h = 0; h < shape.height; ++h) {
            float* target = plane + (d * shape.height + h) * shape.width;
            const int64_t from_d = d / shape.factor_depth, from_h = h / shape.factor_height;
            for (int64_t w = 0; w < shape.width; ++w) target[w] = 0.0f;
            if (from_d >= out_depth || from_h >= out_height) continue;
            const float* source = grad + (from_d * out_height + from_h) * out_width;
            for (int64_t w = 0; w < out_width; ++w) target[2 * w] = target[2 * w + 1] = source[w] * factor;
        }
}

template <bool SILU>
void forward(const glide_fast::GroupNormForward& problem, int64_t begin, int64_t end, Scratch scratch) {
    const GroupNormShape& shape = problem.shape;
    const int64_t pixels = shape.pixels(), members = shape.channels_per_group();
    const int64_t factor = resample_factor(shape);
    const int64_t outputs = output_pixels(shape);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t picture = task / shape.groups, first = task % shape.groups * members;
        const float* x = problem.x + task * members * pixels;
        const Moments moments = moments_of(x, members * pixels);
        const float mean = static_cast<float>(moments.mean);
        const double rstd = inverse_deviation(moments, problem.eps);
        problem.mean[task] = mean;
        problem.rstd[task] = static_cast<float>(rstd);
        const float lost = static_cast<float>(moments.mean - mean);  // what rounding took from the mean
        for (int64_t member = 0; member < members; ++member) {
            const Affine affine = affine_of(problem, picture, first + member);
            const float by = static_cast<float>(affine.gain * rstd);
            const float* plane = x + member * pixels;
            float* output = problem.output + (task * members + member) * outputs;
            float* target = shape.resample == Resample::NONE ? output : scratch.floats;
            apply<SILU>(plane, target, pixels, mean, by, affine.offset - lost * by);
            if (shape.resample == Resample::UP) spread(shape, target, output);
            if (shape.resample == Resample::DOWN)
                gather(shape, target, output, shape.depth, shape.height, shape.width,
                       1.0f / static_cast<float>(factor));
        }
    }
}

// Writes the gradient before the affine map to grad_x; returns its sum and its product with the normalised x.
template <bool SILU>
void differentiate(const float* grad, const float* x, float* grad_x, int64_t count, float mean, float rstd,
                   Affine affine, double* sum, double* normal_sum) {
    const Vector shift = splat(mean), by = splat(rstd), gain = splat(affine.gain),
                 plus = splat(affine.offset);
    double total = 0, normal_total = 0;
    for (int64_t begin = 0; begin < count; begin += SUM_CHUNK) {
        const int64_t end = smaller(begin + SUM_CHUNK, count);
        Vector sums{}, normal_sums{};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            const Vector normal = (load(x + i) - shift) * by;
            const Vector inner = activate_backward<SILU>(load(grad + i), normal * gain + plus);
            store(grad_x + i, inner);
            sums += inner;
            normal_sums += inner * normal;
        }
        if (i < end) {  // lanes beyond the end have gradient zero, so they add nothing
            const Vector normal = (load_first(x + i, end - i) - shift) * by;
            const Vector inner = activate_backward<SILU>(load_first(grad + i, end - i), normal * gain + plus);
            store_first(grad_x + i, inner, end - i);
            sums += inner;
            normal_sums += inner * normal;
        }
        total += sum_of_lanes(sums);
        normal_total += sum_of_lanes(normal_sums);
    }
    *sum = total;
    *normal_sum = normal_total;
}

// grad_x = grad_x * factor - (x - mean) * slope - constant + summand, in place
inline void project(const float* x, const float* summand, float* grad_x, int64_t count, float mean,
                    float factor, float slope, float constant) {
    const Vector shift = splat(mean), by = splat(factor), along = splat(slope), minus = splat(constant);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(grad_x + i, load(grad_x + i) * by - (load(x + i) - shift) * along - minus);
    for (; i < count; ++i) grad_x[i] = grad_x[i] * factor - (x[i] - mean) * slope - constant;
    if (summand)
        for (i = 0; i < count; ++i) grad_x[i] += summand[i];
}

template <bool SILU>
void backward(const glide_fast::GroupNormBackward& problem, int64_t begin, int64_t end, Scratch scratch) {
    const GroupNormShape& shape = problem.shape;
    const int64_t pixels = shape.pixels(), members = shape.channels_per_group();
    const int64_t factor = resample_factor(shape);
    const int64_t wide_depth = shape.depth * shape.factor_depth,
                  wide_height = shape.height * shape.factor_height;
    const int64_t outputs = output_pixels(shape);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t picture = task / shape.groups, first = task % shape.groups * members;
        const float mean = problem.mean[task], rstd = problem.rstd[task];
        double group_sum = 0, group_normal_sum = 0;
        for (int64_t member = 0; member < members; ++member) {
            const int64_t row = task * members + member;  // of [B, C]
            const Affine affine = affine_of(problem, picture, first + member);
            const float* grad = problem.grad + row * outputs;
            if (shape.resample == Resample::UP)
                gather(shape, grad, scratch.floats, wide_depth, wide_height, 2 * shape.width, 1.0f);
            if (shape.resample == Resample::DOWN)
                share(shape, grad, scratch.floats, 1.0f / static_cast<float>(factor));
            if (shape.resample != Resample::NONE) grad = scratch.floats;
            differentiate<SILU>(grad, problem.x + row * pixels, problem.grad_x + row * pixels, pixels, mean,
                                rstd, affine, problem.grad_sum + row, problem.grad_normal_sum + row);
            group_sum += affine.gain * problem.grad_sum[row];
            group_normal_sum += affine.gain * problem.grad_normal_sum[row];
        }
        const double count = static_cast<double>(members * pixels);
        const float slope = static_cast<float>(group_normal_sum / count * rstd * rstd);
        const float constant = static_cast<float>(group_sum / count * rstd);
        for (int64_t member = 0; member < members; ++member) {
            const int64_t row = task * members + member;
            const float by = affine_of(problem, picture, first + member).gain * rstd;
            const float* summand = problem.summand ? problem.summand + row * pixels : nullptr;
            project(problem.x + row * pixels, summand, problem.grad_x + row * pixels, pixels, mean, by, slope,
                    constant);
        }
    }
}

}  // namespace planar
}  // namespace
