#include "nearest_kernel.h"

octavo::Kernel octavo::nearest_baseline(int v) { return kernel_for(v); }
