#include "gather_kernel.h"

octavo::GatherKernels octavo::gather_avx512(int v) { return gather_kernels(v); }
