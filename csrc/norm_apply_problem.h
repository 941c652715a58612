// The tensors of a call of norm_apply, in the dtypes and layouts that its loops read.
#pragma once

#include "norm_apply.h"
#include "tensors.h"

namespace glide_fast {

inline Tensor dense_float(const Tensor& tensor) {
    return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

struct NormApplyTensors {
    Tensor x, mean, rstd, weight, bias;
    OptionalTensor scale, shift;
    bool channels_last;
    Tensor y;

    NormApplyTensors(const Tensor& given, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                     const Tensor& bias, const OptionalTensor& scale, const OptionalTensor& shift)
        : x(given),
          mean(dense_float(mean)),
          rstd(dense_float(rstd)),
          weight(dense_float(weight)),
          bias(dense_float(bias)),
          scale(scale ? OptionalTensor(dense_float(*scale)) : scale),
          shift(shift ? OptionalTensor(dense_float(*shift)) : shift),
          channels_last(is_channels_last(given)),
          y(x) {
        if (!channels_last) x = torch::stable::contiguous(x);
        y = torch::stable::empty_like(x);
    }

    NormApplyProblem problem(bool silu) {
        NormApplyProblem problem{};
        problem.batch = x.size(0);
        problem.channels = x.size(1);
        problem.groups = mean.size(1);
        problem.pixels = 1;
        for (int64_t dim = 2; dim < x.dim(); ++dim) problem.pixels *= x.size(dim);
        problem.channels_last = channels_last;
        problem.silu = silu;
        problem.x = x.const_data_ptr();
        problem.y = y.mutable_data_ptr();
        problem.mean = data(mean);
        problem.rstd = data(rstd);
        problem.weight = data(weight);
        problem.bias = data(bias);
        problem.scale = data(scale);
        problem.shift = data(shift);
        return problem;
    }
};

}  // namespace glide_fast
