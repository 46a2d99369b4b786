// The steps of a decoder beside its matrices, once per instruction set.
//
// Translation units with flags of their own include this: nothing here has external linkage but declarations (lanes.h).
#pragma once

#include <stdint.h>

#include "lookup.h"

namespace octavo {

enum Activation { kSilu = 0, kGeluTanh = 1 };

// All query heads of a token against a stretch of the cache.
struct Attention {
    const float* queries;  // [heads][width]
    int64_t heads, key_heads, width;
    // [positions][key_heads][width]: IEEE half floats, or bytes where there are factors.
    const void *keys, *values;
    const float *key_factors, *value_factors;  // [key_heads][factor_stride], of a position each; or NULL
    int64_t factor_stride;
    int64_t positions;
    float scale;
    float cap;      // scores become cap * tanh(score / cap), unless it is 0
    float* scores;  // [heads][positions] of scratch
    // With weights w = e^(score - largest): the largest score [heads], the sum of w [heads], that of w * value
    // [heads][width]. Of no position: -infinity, 0 and 0.
    float *largest, *totals, *out;
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
    // to = x / factor, rounded, for the factor that is returned: the largest |x| / 127, NaN if an x is NaN or infinite.
    float (*to_bytes)(const float* x, int64_t n, int8_t* to);
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
