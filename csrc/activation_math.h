// GELU and QuickGELU with the slopes of both, to a few units in the last place. Compiled for each ISA.
#pragma once

#include "activation.h"
#include "vector.h"

namespace {

using glide_fast::Activation;

constexpr float QUICK_SLOPE = 1.702f;
constexpr float LOWEST_EXPONENT = -87.0f;  // below, e^x counts as zero

// The normal distribution at -t for t >= 0, and e^(-t^2/2).
struct NormalTail {
    Vector probability, density;
};

// The probability is e^(-t^2/2) P(q) / (1 + 1.2 t) with q = (t - 3.6) / (t + 3.6) in [-1, 1): a minimax
// polynomial of degree 9 (fitted for this file, error 8e-9). So that t^2 is not rounded before it becomes an
// exponent, t = high + low with few bits in `high`: t^2 = high^2 + low (t + high), and e^-low(t + high) by
// its series.
inline NormalTail normal_tail(Vector t) {
    constexpr float CENTRE = 3.6f, SLOPE = 1.2f, FARTHEST = 13.19f;
    constexpr uint32_t HIGH_BITS = 0xfffff000u;
    t = t < FARTHEST ? t : splat(FARTHEST);
    IntVector bits;
    __builtin_memcpy(&bits, &t, sizeof(bits));
    bits &= HIGH_BITS;
    Vector high;
    __builtin_memcpy(&high, &bits, sizeof(high));
    const Vector rest = (t - high) * (t + high) * 0.5f;
    const Vector series = 1.0f - rest * (1.0f - rest * (0.5f - rest * (1.0f / 6 - rest * (1.0f / 24))));
    Vector density = exponential(high * high * -0.5f) * series;
    density = t < FARTHEST ? density : Vector{};

    const Vector sum = t + CENTRE, line = 1.0f + SLOPE * t;
    const Vector inverse = 1.0f / (sum * line);
    const Vector q = (t - CENTRE) * line * inverse;
    Vector p = splat(2.047346206e-4f);
    p = p * q + 2.842135145e-4f;
    p = p * q - 1.762783621e-3f;
    p = p * q - 5.329845590e-4f;
    p = p * q + 1.507672668e-2f;
    p = p * q - 4.156122357e-2f;
    p = p * q + 5.631479248e-2f;
    p = p * q - 2.068190090e-2f;
    p = p * q - 8.045953512e-2f;
    p = p * q + 5.518658161e-1f;
    return {p * (sum * inverse) * density, density};
}

inline Vector magnitude(Vector x) {
    return x < 0.0f ? -x : x;
}

template <Activation KIND>
Vector activated(Vector x) {
    if (KIND == Activation::GELU) {
        const Vector tail = normal_tail(magnitude(x)).probability;
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    if (KIND == Activation::QUICK_GELU) {
        const Vector steep = x * QUICK_SLOPE;
        return steep < LOWEST_EXPONENT ? x * 0.0f : x / (1.0f + exponential(-steep));
    }
    return x;
}

// The derivative.
template <Activation KIND>
Vector slope_at(Vector x) {
    constexpr float INVERSE_ROOT_TWO_PI = 0.398942280f;
    if (KIND == Activation::GELU) {
        const NormalTail tail = normal_tail(magnitude(x));
        const Vector below = x < 0.0f ? tail.probability : 1.0f - tail.probability;
        return below + x * tail.density * INVERSE_ROOT_TWO_PI;
    }
    const Vector steep = x * QUICK_SLOPE, s = sigmoid(steep);
    return s * (1.0f + steep * (1.0f - s));
}

}  // namespace
