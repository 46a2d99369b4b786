#include "gather_kernel.h"

octavo::GatherKernels octavo::gather_baseline(int v) { return gather_kernels(v); }
