// Which compilation of the kernels this machine runs.
#include <atomic>

#ifdef BATCHNORM_X86
#include <cpuid.h>
#endif

#include "kernels.hpp"

namespace batchnorm {

namespace baseline {
extern const Kernels kernels;
}
#ifdef BATCHNORM_X86
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef BATCHNORM_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef BATCHNORM_ARM
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef BATCHNORM_X86
// __builtin_cpu_supports knows "f16c" in GCC and in later versions of clang only.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found = {&baseline::kernels};
#ifdef BATCHNORM_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (avx2) found.push_back(&avx2::kernels);
#endif
#ifdef BATCHNORM_AVX512
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&avx512::kernels);
#endif
#ifdef BATCHNORM_ARM
    found.push_back(&neon::kernels);
#endif
    return found;
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

std::atomic<const Kernels*>& active() {
    static std::atomic<const Kernels*> kernels{available().back()};
    return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

bool use_isa(const std::string& name) {
    for (const Kernels* kernels : available())
        if (name == kernels->name) {
            active().store(kernels);
            return true;
        }
    return false;
}

}  // namespace batchnorm
