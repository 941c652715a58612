// Short names and conversions for tensors of torch's stable ABI, shared by the files that register ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
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

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

// Whether channels are neighbours in memory, without gaps, and the tensor is not also contiguous.
inline bool is_channels_last(const Tensor& x) {
    if (x.is_contiguous() || x.dim() < 4) return false;
    int64_t expected = 1;
    const int64_t dims = x.dim();
    for (int64_t i = 0; i < dims; ++i) {
        const int64_t dim = i == 0          ? 1
                            : i == dims - 1 ? 0
                                            : dims - i;  // channels, last ... first of space, batch
        if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
        expected *= x.size(dim);
    }
    return true;
}

// Calls an op of ours by its name; the results are the first values of what comes back.
template <size_t RESULTS, size_t ARGUMENTS>
std::array<StableIValue, ARGUMENTS> call_reference(const char* op,
                                                   std::array<StableIValue, ARGUMENTS> stack) {
    static_assert(RESULTS <= ARGUMENTS);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return stack;
}

}  // namespace glide_fast
