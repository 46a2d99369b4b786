#include "lookup_kernel.h"

void octavo::accumulate_baseline(const LookUpSums* to, int count, const float* x, int64_t columns, int64_t first,
                                 int64_t last, uint8_t* scratch) {
    accumulate(to, count, x, columns, first, last, scratch);
}
