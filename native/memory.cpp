// What the kernels know of the machine's memory: the size of its caches, and its pages.
#include <algorithm>
#include <cmath>

#include "kernels.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace batchnorm {

namespace {

int64_t last_level_cache() {
    int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    bytes = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE));
#endif
    return bytes > 0 ? bytes : int64_t(32) << 20;
}

}  // namespace

int64_t stream_bytes = last_level_cache();

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Only whole pages inside the buffer: its neighbours are somebody else's.
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace batchnorm
