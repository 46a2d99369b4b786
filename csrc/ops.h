// The steps of a decoder beside its matrices, once per instruction set.
//
// Translation units with flags of their own include this: nothing here has external linkage but declarations (lanes.h).
#pragma once

#include <stdint.h>

#include "lookup.h"

namespace octavo {

enum Activation { kSilu = 0, kGeluTanh = 1 };

// One query head and its share of the cache, [positions][width] of IEEE half floats each.
struct Attention {
    const float* query;  // [width]
    const uint16_t *keys, *values;
    int64_t positions;
    int64_t width;
    float scale;
    float cap;      // scores become cap * tanh(score / cap), unless it is 0
    float* scores;  // [positions] of scratch
    float* out;     // [width]
};

struct Ops {
    // to = x / sqrt(mean(x^2) + epsilon) * weight; `to` may be x.
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float epsilon, float* to);
    // gate = activation(gate) * up
    void (*gated)(float* gate, const float* up, int64_t n, int activation);
    void (*attend)(const Attention& a);
    // to = H diag(signs) x for n numbers, in blocks of the Hadamard transform.
    void (*transform)(const float* x, const float* signs, int64_t n, int64_t block, float* to);
    // Rows of a tile as numbers to[rows][in], float32 or bfloat16; books [kTable][v], one per stage.
    void (*decode)(const LookUp& m, int64_t in, const float* const* books, int64_t tile, int64_t rows, bool bfloat16,
                   void* to);
    void (*to_half)(const float* x, int64_t n, uint16_t* to);
    // y[r] = <rows[r], x> for r in [first, last), rows [..][n]
    void (*dense_bfloat16)(const uint16_t* rows, int64_t n, const float* x, int64_t first, int64_t last, float* y);
    void (*dense_float32)(const float* rows, int64_t n, const float* x, int64_t first, int64_t last, float* y);
};

// For one of OCTAVO_ISA_*.
const Ops& ops_for(int isa);
const Ops& ops_baseline();
const Ops& ops_avx2();
const Ops& ops_avx512();

}  // namespace octavo
