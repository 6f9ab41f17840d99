// What an instruction set has to offer, in portable C++ on the compilers' vector types; a file that has instructions of its
// own for one of these says so with BATCHNORM_HAS_… before it includes this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

#ifdef BATCHNORM_SANITIZED
#define INLINE inline  // inlined as elsewhere, instrumented code would be too much to compile
#else
#define INLINE inline __attribute__((always_inline))
#endif
#define NOINLINE __attribute__((noinline))
#ifdef __clang__
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

namespace batchnorm {
namespace BATCHNORM_ISA {

typedef float Floats __attribute__((vector_size(BATCHNORM_BYTES)));
typedef double Doubles __attribute__((vector_size(BATCHNORM_BYTES)));
typedef int32_t Bits32 __attribute__((vector_size(BATCHNORM_BYTES)));
typedef int64_t Bits64 __attribute__((vector_size(BATCHNORM_BYTES)));

// Lane j of a mask is all ones or all zeros; bit j of the result is its sign.
#ifndef BATCHNORM_HAS_MOVEMASK
INLINE int movemask(const Bits32& mask) {
    int bits = 0;
    for (int j = 0; j < BATCHNORM_BYTES / 4; ++j) bits |= (mask[j] & 1) << j;
    return bits;
}
INLINE int movemask(const Bits64& mask) {
    int bits = 0;
    for (int j = 0; j < BATCHNORM_BYTES / 8; ++j) bits |= int(mask[j] & 1) << j;
    return bits;
}
#endif

// The first n lanes, none for n ≤ 0, all for n ≥ their number; memory beyond them is not touched, lanes beyond them are 0.
#ifndef BATCHNORM_HAS_PARTIAL
template <class Register, class A>
NOINLINE Register load_first_lanes(const A* p, int n) {
    Register r = {};
    for (int j = 0; j < int(sizeof(Register) / sizeof(A)) && j < n; ++j) r[j] = p[j];
    return r;
}
INLINE Floats load_first(const float* p, int n) { return load_first_lanes<Floats>(p, n); }
INLINE Doubles load_first(const double* p, int n) { return load_first_lanes<Doubles>(p, n); }
NOINLINE inline void store_first(float* p, const Floats& v, int n) {
    for (int j = 0; j < BATCHNORM_BYTES / 4 && j < n; ++j) p[j] = v[j];
}
NOINLINE inline void store_first(double* p, const Doubles& v, int n) {
    for (int j = 0; j < BATCHNORM_BYTES / 8 && j < n; ++j) p[j] = v[j];
}
#endif

#ifndef BATCHNORM_HAS_FLOAT16
INLINE float one_from_float16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | (fraction << 13);  // infinity, NaN
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {  // zero, or fraction · 2^-24
        const float value = float(fraction) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t one_to_float16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds beyond 65504
    if (bits < 0x38800000) {                       // subnormal: units of 2^-24, to nearest, ties to even
        float value;
        std::memcpy(&value, &bits, 4);
        return sign | uint16_t(std::nearbyint(value * 16777216.0f));
    }
    bits += 0xfff + ((bits >> 13) & 1);  // to nearest, ties to even
    return sign | uint16_t((bits >> 13) - (112 << 10));
}
NOINLINE inline Floats from_float16(const uint16_t* p) {
    Floats r;
    for (int j = 0; j < BATCHNORM_BYTES / 4; ++j) r[j] = one_from_float16(p[j]);
    return r;
}
NOINLINE inline void to_float16(uint16_t* p, const Floats& v) {
    for (int j = 0; j < BATCHNORM_BYTES / 4; ++j) p[j] = one_to_float16(v[j]);
}
#endif

// Stores that go around the caches, to addresses aligned to a register.
#ifndef BATCHNORM_HAS_STREAM
INLINE void stream(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
INLINE void stream(double* p, const Doubles& v) { std::memcpy(p, &v, sizeof v); }
INLINE void fence() {}
#endif

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm
