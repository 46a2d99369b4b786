#include "ops_kernel.h"

const octavo::Ops& octavo::ops_avx2() { return kOps; }
