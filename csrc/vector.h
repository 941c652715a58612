// A small float vector over the vector extensions of GCC and Clang: written once, compiled for each ISA.
//
// VECTOR_BYTES comes from the build (16, 32 or 64). Everything here is in an anonymous namespace, and no
// standard header is used: an inline function with external linkage that was compiled for AVX-512 could
// otherwise be the copy that the linker keeps for the generic code.
#pragma once

#include <stdint.h>

namespace {

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t IntVector __attribute__((vector_size(VECTOR_BYTES)));

constexpr int64_t LANES = VECTOR_BYTES / sizeof(float);

inline Vector splat(float value) {
    return value - Vector{};
}

inline Vector load(const float* source) {
    Vector result;
    __builtin_memcpy(&result, source, sizeof(result));
    return result;
}

inline void store(float* target, Vector value) {
    __builtin_memcpy(target, &value, sizeof(value));
}

// The first `count` lanes; the others are zero.
inline Vector load_first(const float* source, int64_t count) {
    Vector result{};
    __builtin_memcpy(&result, source, static_cast<unsigned long>(count) * sizeof(float));
    return result;
}

inline void store_first(float* target, Vector value, int64_t count) {
    __builtin_memcpy(target, &value, static_cast<unsigned long>(count) * sizeof(float));
}

// Whole or partial by a compile-time choice, so that inner loops have no branch.
template <bool WHOLE>
inline Vector load_lanes(const float* source, int64_t count) {
    return WHOLE ? load(source) : load_first(source, count);
}

template <bool WHOLE>
inline void store_lanes(float* target, Vector value, int64_t count) {
    if (WHOLE)
        store(target, value);
    else
        store_first(target, value, count);
}

inline double sum_of_lanes(Vector value) {
    double sums[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] = value[lane];
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

// e^x within 2 ulp for |x| <= 87; beyond, the value at the limit (so that nothing overflows or becomes
// denormal). x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a minimax polynomial (fitted for this file, error
// 8e-9); 2^n by its exponent bits.
inline Vector exponential(Vector x) {
    constexpr float LIMIT = 87.0f;
    constexpr float LOG2_E = 1.44269504f;
    constexpr float LN2_HIGH = 0.693359375f;  // few bits, so that n * LN2_HIGH is exact
    constexpr float LN2_LOW = -2.12194440e-4f;
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    constexpr uint32_t MANTISSA_BITS = 23;

    x = x < LIMIT ? x : splat(LIMIT);
    x = x > -LIMIT ? x : splat(-LIMIT);
    const Vector shifted = x * LOG2_E + ROUND;
    const Vector n = shifted - ROUND;
    const Vector r = (x - n * LN2_HIGH) - n * LN2_LOW;
    Vector tail = splat(1.39262504e-3f);
    tail = tail * r + 8.36323295e-3f;
    tail = tail * r + 4.16665524e-2f;
    tail = tail * r + 1.66665763e-1f;
    tail = tail * r + 0.5f;
    const Vector value = (tail * r) * r + r + 1.0f;
    IntVector bits, power;
    __builtin_memcpy(&power, &shifted, sizeof(power));
    __builtin_memcpy(&bits, &value, sizeof(bits));
    bits += power << MANTISSA_BITS;  // ROUND's own bits leave at the top
    Vector result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
}

inline Vector sigmoid(Vector x) {
    return 1.0f / (1.0f + exponential(-x));
}

}  // namespace
