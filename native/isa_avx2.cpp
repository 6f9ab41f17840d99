// AVX2, FMA and F16C: 32 bytes a register.
#include <immintrin.h>

#define BATCHNORM_BYTES 32
#define BATCHNORM_ISA_NAME "avx2"
#define BATCHNORM_ISA avx2
#define BATCHNORM_HAS_FLOAT16
#define BATCHNORM_HAS_PARTIAL
#define BATCHNORM_HAS_MOVEMASK
#define BATCHNORM_HAS_STREAM
#include "generic-inl.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

INLINE int movemask(const Bits32& mask) { return _mm256_movemask_ps(reinterpret_cast<const __m256&>(mask)); }
INLINE int movemask(const Bits64& mask) { return _mm256_movemask_pd(reinterpret_cast<const __m256d&>(mask)); }

INLINE __m256i first_lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE __m256i first_double_lanes(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
INLINE Floats load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
INLINE Doubles load_first(const double* p, int n) { return _mm256_maskload_pd(p, first_double_lanes(n)); }
// In halves, for masked stores are slow on AMD's processors.
INLINE void store_first(float* p, const Floats& v, int n) {
    if (n <= 0) return;
    if (n >= 8) return _mm256_storeu_ps(p, v);
    __m128 rest = _mm256_castps256_ps128(v);
    if (n & 4) {
        _mm_storeu_ps(p, rest);
        rest = _mm256_extractf128_ps(v, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
        rest = _mm_movehl_ps(rest, rest);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
}
INLINE void store_first(double* p, const Doubles& v, int n) {
    if (n <= 0) return;
    if (n >= 4) return _mm256_storeu_pd(p, v);
    __m128d rest = _mm256_castpd256_pd128(v);
    if (n & 2) {
        _mm_storeu_pd(p, rest);
        rest = _mm256_extractf128_pd(v, 1);
        p += 2;
    }
    if (n & 1) _mm_store_sd(p, rest);
}

INLINE Floats from_float16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE void to_float16(uint16_t* p, const Floats& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void stream(float* p, const Floats& v) { _mm256_stream_ps(p, v); }
INLINE void stream(double* p, const Doubles& v) { _mm256_stream_pd(p, v); }
INLINE void fence() { _mm_sfence(); }

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm

#include "kernels-inl.hpp"
