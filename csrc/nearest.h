// What the instruction-set-independent part of the nearest-centroid search hands to the kernels.
#pragma once

#include <cstdint>

namespace octavo {

constexpr int kMaxVector = 16;

// Up to this length the kernels sum (x - c)^2; above it they minimise |c|^2 / 2 - x.c, half the work. The short vectors
// are where books are so dense that the cancellation in the second form would show.
constexpr int kDirectVector = 2;

struct Search {
    const float* points;      // [n][v]
    const float* weights;     // [n][v] or null
    const float* book;        // [k][v], moved by -shift
    const float* half_norms;  // [k], null for the direct form
    int64_t k;
    int64_t* out;             // [n]
    float shift[kMaxVector];  // subtracted from every point
};

using Kernel = void (*)(const Search&, int64_t first, int64_t last);

// The kernel for vectors of length v, 1..16.
Kernel nearest_baseline(int v);
Kernel nearest_avx2(int v);
Kernel nearest_avx512(int v);

// The kernel of an instruction set, one of OCTAVO_ISA_* that this build and processor have.
Kernel nearest_kernel(int isa, int v);

// Floats of scratch that prepare() may use.
inline int64_t prepare_floats(int64_t k, int v) { return k * (v + 1); }

// Fills in half_norms and shift of a search with unweighted vectors longer than kDirectVector.
void prepare(Search& s, int v, float* scratch);

}  // namespace octavo
