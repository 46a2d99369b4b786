#include "additive_kernel.h"

octavo::AdditiveKernel octavo::additive_avx512(int v) { return additive_kernel(v); }
