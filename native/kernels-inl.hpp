// The kernels of one instruction set: the maths, and the choice of the loop that a call needs.
#include <algorithm>

namespace batchnorm {

namespace BATCHNORM_ISA {
namespace {

#include "simd-inl.hpp"
#include "activation-inl.hpp"
#include "elements-inl.hpp"

// Whether an output is better written around the caches: it would push out everything, itself included. Not in place,
// where its lines are in the cache already.
INLINE bool streams(const Shape& shape, const View& from, const View& to) {
    const int64_t width = shape.dtype == DType::float64 ? 8 : shape.dtype == DType::float32 ? 4 : 2;
    return from.data != to.data && shape.outer * shape.channels * shape.inner * width > stream_bytes;
}

// Of the backward pass that writes gradients.
INLINE BackwardMode gradient_mode(const Shape& shape, const Affine& affine, const Saved& saved, bool centered,
                                  const View& dy, const View& dx, const View& dresidual) {
    return {affine.activation, saved.in_place, centered, streams(shape, dy, dx), streams(shape, dy, dresidual)};
}

#include "planes-inl.hpp"
#include "samples-inl.hpp"
#include "table-inl.hpp"
#include "rows-inl.hpp"
#include "narrow-inl.hpp"

// -- from run time to compile time -----------------------------------------------------------------------------------

template <class Body>
void with_dtype(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::float32: return body(float{});
        case DType::float64: return body(double{});
        case DType::bfloat16: return body(bfloat16{});
        case DType::float16: return body(float16{});
    }
}

// One of three functions of the same signature.
template <class Function>
Function* of_layout(Layout layout, Function* planes, Function* rows, Function* narrow) {
    return layout == Layout::planes ? planes : layout == Layout::rows ? rows : narrow;
}

template <Kind k>
using KindIs = std::integral_constant<Kind, k>;
template <Slope s>
using SlopeIs = std::integral_constant<Slope, s>;

template <class Body>
void with_kind(Activation activation, Body&& body) {
    switch (kind_of(activation)) {
        case Kind::none: return body(KindIs<Kind::none>{});
        case Kind::rectifier: return body(KindIs<Kind::rectifier>{});
        case Kind::other: return body(KindIs<Kind::other>{});
    }
}

template <class Body>
void with_slope(const Saved& saved, Activation activation, Body&& body) {
    const Kind kind = kind_of(activation);
    if (kind == Kind::none) return body(SlopeIs<Slope::one>{});
    if (saved.bits) return body(SlopeIs<Slope::bits>{});
    if (kind == Kind::rectifier && !saved.residual.data) return body(SlopeIs<Slope::sign>{});
    body(SlopeIs<Slope::function>{});
}

void moments(const Shape& shape, View x, Statistics statistics, double eps, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        using T = decltype(value);
        const auto run = of_layout(shape.layout, planes_moments<T>, rows_moments<T>, narrow_moments<T>);
        run(shape, x, statistics, eps, Running{}, pool);
    });
}

void normalize(const Shape& shape, View x, const Affine& affine, Statistics statistics, View residual, View y,
               uint16_t* bits, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_kind(affine.activation, [&](auto kind) {
            using T = decltype(value);
            constexpr Kind k = decltype(kind)::value;
            const auto run = [&](auto add) {
                constexpr bool a = decltype(add)::value;
                of_layout(shape.layout, planes_normalize<T, k, a>, rows_normalize<T, k, a>, narrow_normalize<T, k, a>)(
                    shape, x, affine, statistics, residual, y, bits, pool);
            };
            residual.data ? run(std::true_type{}) : run(std::false_type{});
        });
    });
}

void train_forward(const Shape& shape, View x, const Affine& affine, Statistics statistics, double eps, Running running,
                   View residual, View y, uint16_t* bits, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_kind(affine.activation, [&](auto kind) {
            using T = decltype(value);
            constexpr Kind k = decltype(kind)::value;
            const auto run = [&](auto add) {
                constexpr bool a = decltype(add)::value;
                of_layout(shape.layout, planes_train_forward<T, k, a>, rows_train_forward<T, k, a>,
                          narrow_train_forward<T, k, a>)(shape, x, affine, statistics, eps, running, residual, y, bits,
                                                         pool);
            };
            residual.data ? run(std::true_type{}) : run(std::false_type{});
        });
    });
}

void backward_reduce(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                     Sums sums, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            const auto run = of_layout(shape.layout, planes_backward_reduce<T, s>, rows_backward_reduce<T, s>,
                                       narrow_backward_reduce<T, s>);
            run(shape, dy, saved, affine, statistics, sums, pool);
        });
    });
}

void backward_input(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                    Sums sums, double count, View dx, View dresidual, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            const auto run = of_layout(shape.layout, planes_backward_input<T, s>, rows_backward_input<T, s>,
                                       narrow_backward_input<T, s>);
            run(shape, dy, saved, affine, statistics, sums, count, dx, dresidual, pool);
        });
    });
}

void train_backward(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                    Sums sums, View dx, View dresidual, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            const auto run = of_layout(shape.layout, planes_train_backward<T, s>, rows_train_backward<T, s>,
                                       narrow_train_backward<T, s>);
            run(shape, dy, saved, affine, statistics, sums, dx, dresidual, pool);
        });
    });
}

void sample_moments(const SampleRows& x, double* mean, double* variance, const Pool& pool) {
    with_dtype(x.dtype, [&](auto value) { samples_moments<decltype(value)>(x, mean, variance, pool); });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {BATCHNORM_ISA_NAME, BATCHNORM_BYTES, moments,        normalize,     train_forward,
                         backward_reduce,    backward_input,  train_backward, sample_moments};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
