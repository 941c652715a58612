// Short names and conversions for tensors of torch's stable ABI, shared by the files that register ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace glide_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const float* data(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* data(const OptionalTensor& tensor) {
    return tensor ? data(*tensor) : nullptr;
}

inline float* mutable_data(Tensor& tensor) {
    return static_cast<float*>(tensor.mutable_data_ptr());
}

inline Tensor empty(std::vector<int64_t> sizes, MemoryFormat format = MemoryFormat::Contiguous,
                    ScalarType type = ScalarType::Float) {
    return torch::stable::empty(sizes, type, std::nullopt, std::nullopt, std::nullopt, format);
}

}  // namespace glide_fast
