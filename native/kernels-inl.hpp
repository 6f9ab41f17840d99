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

#include "planes-inl.hpp"
#include "rows-inl.hpp"

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
    if (saved.in_place) {
        if (kind == Kind::none) return body(SlopeIs<Slope::one>{}, std::true_type{});
        return body(SlopeIs<Slope::sign>{}, std::true_type{});
    }
    if (kind == Kind::none) return body(SlopeIs<Slope::one>{}, std::false_type{});
    if (saved.bits) return body(SlopeIs<Slope::bits>{}, std::false_type{});
    if (kind == Kind::rectifier && !saved.residual.data) return body(SlopeIs<Slope::sign>{}, std::false_type{});
    body(SlopeIs<Slope::function>{}, std::false_type{});
}

void moments(const Shape& shape, View x, Statistics statistics, double eps, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        using T = decltype(value);
        const auto run = shape.layout == Layout::planes ? planes_moments<T> : rows_moments<T>;
        run(shape, x, statistics, eps, Running{}, pool);
    });
}

void normalize(const Shape& shape, View x, const Affine& affine, Statistics statistics, View residual, View y,
               uint16_t* bits, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_kind(affine.activation, [&](auto kind) {
            using T = decltype(value);
            constexpr Kind k = decltype(kind)::value;
            const bool planes = shape.layout == Layout::planes;
            const auto run = residual.data ? (planes ? planes_normalize<T, k, true> : rows_normalize<T, k, true>)
                                           : (planes ? planes_normalize<T, k, false> : rows_normalize<T, k, false>);
            run(shape, x, affine, statistics, residual, y, bits, pool);
        });
    });
}

void train_forward(const Shape& shape, View x, const Affine& affine, Statistics statistics, double eps, Running running,
                   View residual, View y, uint16_t* bits, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_kind(affine.activation, [&](auto kind) {
            using T = decltype(value);
            constexpr Kind k = decltype(kind)::value;
            const bool planes = shape.layout == Layout::planes;
            const auto run = residual.data
                                 ? (planes ? planes_train_forward<T, k, true> : rows_train_forward<T, k, true>)
                                 : (planes ? planes_train_forward<T, k, false> : rows_train_forward<T, k, false>);
            run(shape, x, affine, statistics, eps, running, residual, y, bits, pool);
        });
    });
}

void backward_reduce(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                     Sums sums, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope, auto recover) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            constexpr bool r = decltype(recover)::value;
            const auto run =
                shape.layout == Layout::planes ? planes_backward_reduce<T, s, r> : rows_backward_reduce<T, s, r>;
            run(shape, dy, saved, affine, statistics, sums, pool);
        });
    });
}

void backward_input(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                    Sums sums, double count, View dx, View dresidual, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope, auto recover) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            constexpr bool r = decltype(recover)::value;
            const bool planes = shape.layout == Layout::planes;
            const auto run =
                sums.dy ? (planes ? planes_backward_input<T, s, r, true> : rows_backward_input<T, s, r, true>)
                        : (planes ? planes_backward_input<T, s, r, false> : rows_backward_input<T, s, r, false>);
            run(shape, dy, saved, affine, statistics, sums, count, dx, dresidual, pool);
        });
    });
}

void train_backward(const Shape& shape, View dy, const Saved& saved, const Affine& affine, Statistics statistics,
                    Sums sums, View dx, View dresidual, const Pool& pool) {
    with_dtype(shape.dtype, [&](auto value) {
        with_slope(saved, affine.activation, [&](auto slope, auto recover) {
            using T = decltype(value);
            constexpr Slope s = decltype(slope)::value;
            constexpr bool r = decltype(recover)::value;
            const auto run =
                shape.layout == Layout::planes ? planes_train_backward<T, s, r> : rows_train_backward<T, s, r>;
            run(shape, dy, saved, affine, statistics, sums, dx, dresidual, pool);
        });
    });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {BATCHNORM_ISA_NAME, BATCHNORM_BYTES, moments,        normalize,
                         train_forward,      backward_reduce, backward_input, train_backward};

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
