// Winograd's minimal filtering F(m x m, 3 x 3): the transforms, one dimension at a time. Compiled for each
// ISA.
//
// An m x m tile of the output is A^T [(G g G^T) * (B^T d B)] A, with d the (m+2) x (m+2) pixels under it and
// g the 3 x 3 weights (Lavin & Gray 2015, arXiv 1509.09308). The matrices follow from m+1 points and infinity
// (Cook & Toom). For m = 4 the usual points 0, +-1, +-2 lose 4 more bits than direct summation; 0, +-11/16,
// +-3/2 lose 2, together with the short partial sums of product.h, and are exact in float with all their
// products.
#pragma once

#include "vector.h"

namespace {

template <int64_t TILE>
struct Winograd;

template <>
struct Winograd<2> {  // points 0, 1, -1, infinity
    static constexpr int64_t TILE = 2, SIZE = 4;

    static void input(const Vector (&d)[SIZE], Vector (&result)[SIZE]) {
        result[0] = d[2] - d[0];
        result[1] = d[2] + d[1];
        result[2] = d[2] - d[1];
        result[3] = d[3] - d[1];
    }
    static void weight(const Vector (&g)[3], Vector (&result)[SIZE]) {
        const Vector even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
        result[0] = -g[0];
        result[1] = even + odd;
        result[2] = even - odd;
        result[3] = g[2];
    }
    static void output(const Vector (&m)[SIZE], Vector (&result)[TILE]) {
        result[0] = m[0] + (m[1] + m[2]);
        result[1] = (m[1] - m[2]) + m[3];
    }
    // The transposes of output and weight, for the gradient of the weights.
    static void gradient(const Vector (&y)[TILE], Vector (&result)[SIZE]) {
        result[0] = y[0];
        result[1] = y[0] + y[1];
        result[2] = y[0] - y[1];
        result[3] = y[1];
    }
    static void weight_gradient(const Vector (&u)[SIZE], Vector (&result)[3]) {
        const Vector even = 0.5f * (u[1] + u[2]);
        result[0] = even - u[0];
        result[1] = 0.5f * (u[1] - u[2]);
        result[2] = even + u[3];
    }
};

template <>
struct Winograd<4> {  // points 0, P, -P, Q, -Q, infinity
    static constexpr int64_t TILE = 4, SIZE = 6;
    static constexpr float P = 0.6875f, Q = 1.5f, PP = P * P, QQ = Q * Q;
    static constexpr float AT_P = 0.5f / (PP * (PP - QQ)), AT_Q = 0.5f / (QQ * (QQ - PP)),
                           AT_0 = 1 / (PP * QQ);

    static void input(const Vector (&d)[SIZE], Vector (&result)[SIZE]) {
        const Vector even_p = d[4] - QQ * d[2], odd_p = P * d[3] - (P * QQ) * d[1];
        const Vector even_q = d[4] - PP * d[2], odd_q = Q * d[3] - (Q * PP) * d[1];
        result[0] = (d[4] - (PP + QQ) * d[2]) + (PP * QQ) * d[0];
        result[1] = even_p + odd_p;
        result[2] = even_p - odd_p;
        result[3] = even_q + odd_q;
        result[4] = even_q - odd_q;
        result[5] = (d[5] - (PP + QQ) * d[3]) + (PP * QQ) * d[1];
    }
    static void weight(const Vector (&g)[3], Vector (&result)[SIZE]) {
        const Vector even_p = AT_P * (g[0] + PP * g[2]), odd_p = (AT_P * P) * g[1];
        const Vector even_q = AT_Q * (g[0] + QQ * g[2]), odd_q = (AT_Q * Q) * g[1];
        result[0] = AT_0 * g[0];
        result[1] = even_p + odd_p;
        result[2] = even_p - odd_p;
        result[3] = even_q + odd_q;
        result[4] = even_q - odd_q;
        result[5] = g[2];
    }
    static void output(const Vector (&m)[SIZE], Vector (&result)[TILE]) {
        const Vector even_p = m[1] + m[2], odd_p = m[1] - m[2];
        const Vector even_q = m[3] + m[4], odd_q = m[3] - m[4];
        result[0] = m[0] + (even_p + even_q);
        result[1] = P * odd_p + Q * odd_q;
        result[2] = PP * even_p + QQ * even_q;
        result[3] = ((P * PP) * odd_p + (Q * QQ) * odd_q) + m[5];
    }
    static void gradient(const Vector (&y)[TILE], Vector (&result)[SIZE]) {
        const Vector even_p = y[0] + PP * y[2], odd_p = P * y[1] + (P * PP) * y[3];
        const Vector even_q = y[0] + QQ * y[2], odd_q = Q * y[1] + (Q * QQ) * y[3];
        result[0] = y[0];
        result[1] = even_p + odd_p;
        result[2] = even_p - odd_p;
        result[3] = even_q + odd_q;
        result[4] = even_q - odd_q;
        result[5] = y[3];
    }
    static void weight_gradient(const Vector (&u)[SIZE], Vector (&result)[3]) {
        const Vector even_p = AT_P * (u[1] + u[2]), odd_p = (AT_P * P) * (u[1] - u[2]);
        const Vector even_q = AT_Q * (u[3] + u[4]), odd_q = (AT_Q * Q) * (u[3] - u[4]);
        result[0] = AT_0 * u[0] + (even_p + even_q);
        result[1] = odd_p + odd_q;
        result[2] = (PP * even_p + QQ * even_q) + u[5];
    }
};

}  // namespace
