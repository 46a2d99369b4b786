#include "nearest_kernel.h"

octavo::Kernel octavo::nearest_avx512(int v) { return kernel_for(v); }
