#include "additive_kernel.h"

octavo::AdditiveKernel octavo::additive_baseline(int v) { return additive_kernel(v); }
