// The Hadamard transform of blocks of numbers.
//
// Included by translation units with flags of their own, so everything lives in an unnamed namespace (see lanes.h).
#pragma once

#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// y = H y for 16 numbers.
inline void butterflies_of_16(float* y) {
#if defined(__AVX512F__)
    // Lane i becomes lane (i xor half) plus itself, or minus itself where bit `half` of i is set.
    const auto signs = [](int half) {
        const __mmask16 minus = half == 1 ? 0xAAAA : half == 2 ? 0xCCCC : half == 4 ? 0xF0F0 : 0xFF00;
        return _mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
    };
    __m512 x = _mm512_loadu_ps(y);
    x = _mm512_fmadd_ps(x, signs(1), _mm512_permute_ps(x, 0xB1));
    x = _mm512_fmadd_ps(x, signs(2), _mm512_permute_ps(x, 0x4E));
    x = _mm512_fmadd_ps(x, signs(4), _mm512_shuffle_f32x4(x, x, 0xB1));
    x = _mm512_fmadd_ps(x, signs(8), _mm512_shuffle_f32x4(x, x, 0x4E));
    _mm512_storeu_ps(y, x);
#else
    for (int half = 1; half < 16; half *= 2) {
        float swapped[16];
        for (int i = 0; i < 16; ++i) swapped[i] = y[i ^ half];
        for (int i = 0; i < 16; ++i) y[i] = swapped[i] + ((i & half) != 0 ? -y[i] : y[i]);
    }
#endif
}

// y = H y in place, without the factor; `block` is a power of two.
inline void butterflies(float* y, int64_t block) {
    int64_t half = 1;
    if (block >= 16) {
        for (int64_t i = 0; i < block; i += 16) butterflies_of_16(y + i);
        half = 16;
    }
    for (; half < block; half *= 2) {
        for (int64_t i = 0; i < block; i += 2 * half) {
            float *low = y + i, *high = low + half;
            for (int64_t k = 0; k < half; ++k) {
                const float sum = low[k] + high[k], difference = low[k] - high[k];
                low[k] = sum;
                high[k] = difference;
            }
        }
    }
}

// to = H diag(signs) x for n numbers in blocks.
inline void transform(const float* x, const float* signs, int64_t n, int64_t block, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * signs[i];
    for (int64_t i = 0; i < n; i += block) butterflies(to + i, block);
}

}  // namespace
