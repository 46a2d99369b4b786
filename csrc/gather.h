// Vectors whose centroids are added up where they lie, for codebooks of any size.
//
// Translation units with flags of their own include this: nothing here has external linkage but declarations (lanes.h).
#pragma once

#include <stdint.h>

namespace octavo {

constexpr int kMaxGatherStages = 4;

struct GatherStage {
    const float* book;          // [entries][v], or NULL
    const uint16_t* half_book;  // the same in half floats, for larger books; then `book` is NULL
    const int8_t* byte_book;    // the same in steps of byte_step, for the largest; then both are NULL
    float byte_step;
    const uint8_t* narrow;  // [vector rows][vectors], or NULL
    const uint16_t* wide;   // the same for codes above 8 bits; then `narrow` is NULL
};

struct Gather {
    int v, stages;
    GatherStage stage[kMaxGatherStages];
    const uint16_t* signs;    // [vector rows][vectors]: bits of negative elements, or NULL
    const float* sign_table;  // [256][8]: 1 and -1 by eight bits
    int64_t vectors;          // of a vector row
};

// sums[r][j] += sum_i x[i] centroid(r, i)[j] for vector rows [first, last): one number of x per vector.
using GatherColumns = void (*)(const Gather& g, const float* x, int64_t first, int64_t last, float* sums);
// y[r] += sum_i <x[i], centroid(r, i)> for rows [first, last): v numbers of x per vector.
using GatherRows = void (*)(const Gather& g, const float* x, int64_t first, int64_t last, float* y);

struct GatherKernels {
    GatherColumns columns;
    GatherRows rows;
};

// By the length of the vectors; NULL where there is no kernel for it.
GatherKernels gather_baseline(int v);
GatherKernels gather_avx2(int v);
GatherKernels gather_avx512(int v);

}  // namespace octavo
