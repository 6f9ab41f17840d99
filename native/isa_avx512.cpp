// AVX-512 F, BW, DQ and VL: 64 bytes a register.
#include <immintrin.h>

#define BATCHNORM_BYTES 64
#define BATCHNORM_ISA_NAME "avx512"
#define BATCHNORM_ISA avx512
#define BATCHNORM_HAS_FLOAT16
#define BATCHNORM_HAS_PARTIAL
#define BATCHNORM_HAS_MOVEMASK
#define BATCHNORM_HAS_STREAM
#include "generic-inl.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

INLINE int movemask(const Bits32& mask) { return _mm512_movepi32_mask(reinterpret_cast<const __m512i&>(mask)); }
INLINE int movemask(const Bits64& mask) { return _mm512_movepi64_mask(reinterpret_cast<const __m512i&>(mask)); }

INLINE unsigned first_lanes(int n, int lanes) { return n <= 0 ? 0u : n >= lanes ? (1u << lanes) - 1 : (1u << n) - 1; }
INLINE Floats load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16(first_lanes(n, 16)), p); }
INLINE Doubles load_first(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8(first_lanes(n, 8)), p); }
INLINE void store_first(float* p, const Floats& v, int n) {
    _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n, 16)), v);
}
INLINE void store_first(double* p, const Doubles& v, int n) {
    _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n, 8)), v);
}

INLINE Floats from_float16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE void to_float16(uint16_t* p, const Floats& v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

INLINE void stream(float* p, const Floats& v) { _mm512_stream_ps(p, v); }
INLINE void stream(double* p, const Doubles& v) { _mm512_stream_pd(p, v); }
INLINE void fence() { _mm_sfence(); }

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm

#include "kernels-inl.hpp"
