#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace glide_fast {

namespace generic {
extern const GroupNormKernels group_norm_kernels;
extern const ConvolutionKernels convolution_kernels;
extern const LinearKernels linear_kernels;
extern const AttentionKernels attention_kernels;
extern const ActivationKernels activation_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace generic
#ifdef GLIDE_FAST_X86
namespace avx2 {
extern const GroupNormKernels group_norm_kernels;
extern const ConvolutionKernels convolution_kernels;
extern const LinearKernels linear_kernels;
extern const AttentionKernels attention_kernels;
extern const ActivationKernels activation_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace avx2
namespace avx512 {
extern const GroupNormKernels group_norm_kernels;
extern const ConvolutionKernels convolution_kernels;
extern const LinearKernels linear_kernels;
extern const AttentionKernels attention_kernels;
extern const ActivationKernels activation_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace avx512
#endif

namespace {

const Isa VARIANTS[] = {
    {"generic", [] { return true; }, &generic::group_norm_kernels, &generic::convolution_kernels,
     &generic::linear_kernels, &generic::attention_kernels, &generic::activation_kernels,
     &generic::layer_norm_kernels},
#ifdef GLIDE_FAST_X86
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     &avx2::group_norm_kernels, &avx2::convolution_kernels, &avx2::linear_kernels, &avx2::attention_kernels,
     &avx2::activation_kernels, &avx2::layer_norm_kernels},
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
     },
     &avx512::group_norm_kernels, &avx512::convolution_kernels, &avx512::linear_kernels,
     &avx512::attention_kernels, &avx512::activation_kernels, &avx512::layer_norm_kernels},
#endif
};

const Isa& best_isa() {
    const Isa* best = VARIANTS;
    for (const Isa& variant : VARIANTS)
        if (variant.supported()) best = &variant;
    return *best;
}

std::atomic<const Isa*> chosen{&best_isa()};

}  // namespace

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const Isa& variant : VARIANTS)
        if (variant.supported()) names.emplace_back(variant.name);
    return names;
}

const Isa& current_isa() {
    return *chosen.load(std::memory_order_relaxed);
}

void select_isa(const std::string& name) {
    std::string runnable;
    for (const Isa& variant : VARIANTS) {
        if (!variant.supported()) continue;
        if (name == variant.name) {
            chosen = &variant;
            return;
        }
        runnable += (runnable.empty() ? "" : ", ") + std::string(variant.name);
    }
    throw std::invalid_argument("instruction set '" + name +
                                "' is unknown or not supported by this CPU; use one of " + runnable);
}

}  // namespace glide_fast
