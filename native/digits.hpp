// Whether the statistics that another library's kernel has put into a step kept their digits.
#pragma once
#include "kernels.hpp"

namespace batchnorm {

// The running statistics before a step and after it, r ← (1 − momentum)·r + momentum·b, tell those of the batch. True if
// in one channel |mean| > ratio·√variance; where something is not finite nothing can be said, and it is false.
bool digits_lost(DType dtype, int64_t channels, const void* new_mean, const void* new_variance, const void* mean,
                 const void* variance, double momentum, double ratio);

}  // namespace batchnorm
