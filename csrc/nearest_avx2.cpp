#include "nearest_kernel.h"

octavo::Kernel octavo::nearest_avx2(int v) { return kernel_for(v); }
