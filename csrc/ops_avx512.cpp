#include "ops_kernel.h"

const octavo::Ops& octavo::ops_avx512() { return kOps; }
