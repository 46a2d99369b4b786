#include "ops_kernel.h"

const octavo::Ops& octavo::ops_baseline() { return kOps; }
