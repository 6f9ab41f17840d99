// What the kernels know of the machine's memory: the size of its caches, and its pages.
#include <cstdio>

#include "kernels.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {

namespace {

// The size of the last cache of the first processor. Linux tells it per cache; what sysconf says may be the sum of several.
int64_t last_level_cache() {
    int64_t bytes = 0;
#if defined(__linux__)
    for (const char* index : {"3", "2"}) {
        char path[64];
        std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%s/size", index);
        std::FILE* file = std::fopen(path, "r");
        if (!file) continue;
        long long kibibytes = 0;
        if (std::fscanf(file, "%lldK", &kibibytes) == 1) bytes = kibibytes * 1024;
        std::fclose(file);
        if (bytes > 0) break;
    }
#endif
    return bytes > 0 ? bytes : int64_t(32) << 20;
}

}  // namespace

int64_t stream_bytes = last_level_cache() / 4;

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
