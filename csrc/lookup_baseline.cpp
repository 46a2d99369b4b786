#include "lookup_kernel.h"

void octavo::accumulate_baseline(const LookUp& m, const float* x, int64_t columns, int64_t first, int64_t last,
                                 uint8_t* scratch, float* sums) {
    accumulate(m, x, columns, first, last, scratch, sums);
}
