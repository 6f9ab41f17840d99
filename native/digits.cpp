#include "digits.hpp"

namespace batchnorm {

namespace {

template <class A>
bool lost(int64_t channels, const A* new_mean, const A* new_variance, const A* mean, const A* variance, double momentum,
          double ratio) {
    const double kept = 1 - momentum, room = ratio * ratio * momentum;
    for (int64_t c = 0; c < channels; ++c) {
        const double m = new_mean[c] - kept * mean[c], v = new_variance[c] - kept * variance[c];
        if (m * m > room * v && m * m - m * m == 0 && v - v == 0) return true;
    }
    return false;
}

}  // namespace

bool digits_lost(DType dtype, int64_t channels, const void* new_mean, const void* new_variance, const void* mean,
                 const void* variance, double momentum, double ratio) {
    const auto run = [&](auto value) {
        using A = decltype(value);
        const auto of = [](const void* p) { return static_cast<const A*>(p); };
        return lost<A>(channels, of(new_mean), of(new_variance), of(mean), of(variance), momentum, ratio);
    };
    return dtype == DType::float64 ? run(double()) : run(float());
}

}  // namespace batchnorm
