// Activations element by element, for one ISA.
#include "activation_math.h"

namespace {

template <typename Function>
void map(float* result, int64_t count, Function function) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(result + i, function(i, LANES));
    if (i < count) store_first(result + i, function(i, count - i), count - i);
}

template <Activation KIND>
void forward_as(const float* x, float* result, int64_t count) {
    map(result, count, [=](int64_t i, int64_t lanes) {
        return activated<KIND>(lanes == LANES ? load(x + i) : load_first(x + i, lanes));
    });
}

template <Activation KIND>
void backward_as(const float* grad, const float* x, float* result, int64_t count) {
    map(result, count, [=](int64_t i, int64_t lanes) {
        if (lanes == LANES) return load(grad + i) * slope_at<KIND>(load(x + i));
        return load_first(grad + i, lanes) * slope_at<KIND>(load_first(x + i, lanes));
    });
}

void forward(Activation kind, const float* x, float* result, int64_t count) {
    (kind == Activation::GELU ? forward_as<Activation::GELU> : forward_as<Activation::QUICK_GELU>)(x, result,
                                                                                                   count);
}

void backward(Activation kind, const float* grad, const float* x, float* result, int64_t count) {
    (kind == Activation::GELU ? backward_as<Activation::GELU>
                              : backward_as<Activation::QUICK_GELU>)(grad, x, result, count);
}

}  // namespace

namespace glide_fast {
namespace GLIDE_FAST_ISA {

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {forward, backward};

}  // namespace GLIDE_FAST_ISA
}  // namespace glide_fast
