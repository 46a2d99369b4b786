#include "additive_kernel.h"

octavo::AdditiveKernel octavo::additive_avx2(int v) { return additive_kernel(v); }
