// Means and variances that are put together from parts, in double.
#pragma once

namespace {

// Mean and sum of squared deviations of a growing set, without cancellation (Chan, Golub & LeVeque 1983).
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void add(double other_count, double other_mean, double other_squares) {
        const double total = count + other_count;
        const double delta = other_mean - mean;
        mean += delta * (other_count / total);
        squares += other_squares + delta * delta * (count * other_count / total);
        count = total;
    }
};

inline double inverse_deviation(const Moments& moments, double eps) {
    return 1.0 / __builtin_sqrt(moments.squares / moments.count + eps);
}

}  // namespace
