// What is said of each channel before its values are looked at.
#include <cmath>

#include "kernels.hpp"

namespace batchnorm {

namespace {

// x̂ = (y − β)/γ, so the rounding of y, half an eps of |y| ≤ |γ·x̂| + |β|, becomes half an eps of |x̂| + |β/γ| in x̂. Up to
// |β| = 8·|γ| that is the noise of a value 8 standard deviations from the mean, and nothing to fear.
constexpr double largest_ratio = 8;

template <class A>
int64_t mark(int64_t channels, const A* weight, const A* bias, double smallest, uint8_t* marks) {
    int64_t count = 0;
    for (int64_t c = 0; c < channels; ++c) {
        const double w = weight ? std::fabs(double(weight[c])) : 1.0, b = bias ? std::fabs(double(bias[c])) : 0.0;
        const bool safe = std::isfinite(w) && w >= smallest && b <= largest_ratio * w;  // NaN is not safe
        marks[c] = safe ? 0 : 1;
        count += marks[c];
    }
    return count;
}

template <class A>
void take(int64_t channels, const A* mean, const A* variance, double eps, const Statistics& statistics) {
    for (int64_t c = 0; c < channels; ++c) {
        statistics.mean[c] = double(mean[c]);
        statistics.rstd[c] = 1 / std::sqrt(double(variance[c]) + eps);
    }
}

template <class A>
bool take_those(int64_t channels, const A* new_mean, const A* new_variance, A* mean, A* variance) {
    bool all = true;
    for (int64_t c = 0; c < channels; ++c) {
        if (std::isfinite(new_mean[c]) && std::isfinite(new_variance[c])) {
            mean[c] = new_mean[c];
            variance[c] = new_variance[c];
        } else {
            all = false;
        }
    }
    return all;
}

}  // namespace

bool take_finite(DType dtype, int64_t channels, const void* new_mean, const void* new_variance, void* mean,
                 void* variance) {
    const auto take = [&](auto zero) {
        using A = decltype(zero);
        return take_those(channels, static_cast<const A*>(new_mean), static_cast<const A*>(new_variance),
                          static_cast<A*>(mean), static_cast<A*>(variance));
    };
    return dtype == DType::float64 ? take(0.0) : take(0.0f);
}

void take_stored(const Shape& shape, const void* mean, const void* variance, double eps, const Statistics& statistics) {
    if (shape.dtype == DType::float64)
        return take(shape.channels, static_cast<const double*>(mean), static_cast<const double*>(variance), eps,
                    statistics);
    take(shape.channels, static_cast<const float*>(mean), static_cast<const float*>(variance), eps, statistics);
}

int64_t mark_unrecoverable(const Shape& shape, const Affine& affine, uint8_t* marks) {
    // far above the smallest normal number, so that y itself is not rounded off
    if (shape.dtype == DType::float64)
        return mark(shape.channels, static_cast<const double*>(affine.weight), static_cast<const double*>(affine.bias),
                    1e-200, marks);
    const double smallest = shape.dtype == DType::float16 ? 1e-2 : 1e-20;
    return mark(shape.channels, static_cast<const float*>(affine.weight), static_cast<const float*>(affine.bias),
                smallest, marks);
}

}  // namespace batchnorm
