// NEON of 64-bit ARM: sixteen bytes a register, with a fused multiply-add and half-precision conversion.
#include <arm_neon.h>

#define BATCHNORM_BYTES 16
#define BATCHNORM_ISA_NAME "neon"
#define BATCHNORM_ISA neon
#define BATCHNORM_HAS_FLOAT16
#define BATCHNORM_HAS_MOVEMASK
#include "generic-inl.hpp"

namespace batchnorm {
namespace BATCHNORM_ISA {

INLINE int movemask(const Bits32& mask) {
    const uint32x4_t weights = {1, 2, 4, 8};
    return int(vaddvq_u32(vandq_u32(reinterpret_cast<const uint32x4_t&>(mask), weights)));
}
INLINE int movemask(const Bits64& mask) {
    const uint64x2_t weights = {1, 2};
    return int(vaddvq_u64(vandq_u64(reinterpret_cast<const uint64x2_t&>(mask), weights)));
}

INLINE Floats from_float16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void to_float16(uint16_t* p, const Floats& v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

}  // namespace BATCHNORM_ISA
}  // namespace batchnorm

#include "kernels-inl.hpp"
