// What the instruction-set-independent part of the beam search over additive codebooks hands to the kernels.
#pragma once

#include <cstdint>

#include "nearest.h"

namespace octavo {

constexpr int kMaxStages = 4;

// Books are padded to whole blocks of as many centroids, the lanes of the widest instruction set.
constexpr int64_t kBlock = 16;

// Points that are projected at a time.
constexpr int64_t kPoints = 8;

// A candidate of a middle stage is one number: the kept sum that it extends, and the centroid in the low bits.
constexpr int kCodeBits = 12;
constexpr int64_t kMaxAdditiveBook = int64_t{1} << kCodeBits;
constexpr int32_t kMaxBeam = int32_t{1} << 16;

// Points and centroids with larger elements count as not finite. Books are scaled to about 1 first, so this leaves
// the sums of products below free of overflow.
constexpr float kMaxElement = 1e30f;

struct AdditiveBook {
    int64_t k, padded;
    const float* blocks;             // [padded / kBlock][v][kBlock], transformed
    const float* norms;              // [padded] |b|^2; infinity for padding and for centroids that are not finite
    const float* pairs[kMaxStages];  // for every earlier stage s: [k_s][padded], 2 b_s . b
};

struct AdditiveSearch;

// What the search of one thread writes to.
struct AdditiveScratch {
    float* rows[kMaxStages];            // [kPoints][padded] A_t of some points
    float* minima;                      // [beam][kBlock] of the candidates of a middle stage,
    float* scores;                      // [room + the widest book + kBlock] those that come into question,
    int32_t* tags;                      // as many: and what they are made of
    float* totals[2];                   // [beam + kBlock] the kept sums, before and after a stage,
    int32_t* codes[2][kMaxStages - 1];  // as many: and their codes
    int64_t room;                       // candidates at the most when another kept sum is extended
};

struct AdditiveKernel {
    // to[i] = scale from[i] root, n row vectors.
    void (*transform)(const float* from, int64_t n, float scale, const float* root, float* to);
    // to[i][c] = base[c] + factor x[i] . b[c], n row vectors and all centroids of a book; base may be null for zeros.
    void (*project)(const float* x, int64_t n, float factor, const AdditiveBook& book, const float* base, float* to);
    void (*search)(const AdditiveSearch& search, const AdditiveScratch& scratch, int64_t first, int64_t last);
};

struct AdditiveSearch {
    AdditiveKernel kernel;
    const float* points;  // [n][v]
    const float* root;    // [v][v] or null
    float scale;          // of the points
    int v, stages;
    int64_t beam;
    const int32_t* counting;  // 0, 1, 2, ... as far as the widest book goes
    AdditiveBook books[kMaxStages];
    int64_t* out;  // [n][stages]
};

// The kernels for vectors of length v, 1..16.
AdditiveKernel additive_baseline(int v);
AdditiveKernel additive_avx2(int v);
AdditiveKernel additive_avx512(int v);

}  // namespace octavo
