// For any machine: sixteen bytes a register, whatever the compiler takes for granted.
#define BATCHNORM_BYTES 16
#define BATCHNORM_ISA_NAME "baseline"
#define BATCHNORM_ISA baseline
#include "generic-inl.hpp"
#include "kernels-inl.hpp"
