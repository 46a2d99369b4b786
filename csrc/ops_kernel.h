// Included by translation units with flags of their own, so everything lives in an unnamed namespace (see lanes.h).
// Loops are written so that compilers turn them into vector instructions of the widest kind that the flags allow.
#pragma once

#include <math.h>

#include "attention_kernel.h"
#include "decode_kernel.h"
#include "hadamard.h"
#include "half.h"
#include "ops.h"

namespace {

inline float sum_of(const float (&lanes)[kWide]) {
    float total = 0.0f;
    for (int i = 0; i < kWide; ++i) total += lanes[i];
    return total;
}

inline void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* to) {
    float lanes[kWide] = {};
    int64_t i = 0;
    for (; i + kWide <= n; i += kWide)
        for (int j = 0; j < kWide; ++j) lanes[j] += x[i + j] * x[i + j];
    float sum = sum_of(lanes);
    for (; i < n; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(sum / static_cast<float>(n) + epsilon);
    for (i = 0; i < n; ++i) to[i] = x[i] * factor * weight[i];
}

inline float upper(float x, float limit) { return x < limit ? x : limit; }

inline void gated(float* gate, const float* up, int64_t n, int activation) {
    if (activation == octavo::kSilu) {
        for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + exponential(upper(-gate[i], 87.0f))) * up[i];
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const float x = gate[i], inner = 1.5957691216f * (x + 0.044715f * x * x * x);
            // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u))
            gate[i] = x / (1.0f + exponential(upper(-inner, 87.0f))) * up[i];
        }
    }
}

inline void all_to_half(const float* x, int64_t n, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX2__)
    const __m256 limit = _mm256_set1_ps(65504.0f), sign = _mm256_set1_ps(-0.0f), infinity = _mm256_set1_ps(INFINITY);
    for (; i + 8 <= n; i += 8) {
        // As to_half: what is beyond the largest half float is cut, infinity and NaN stay.
        const __m256 number = _mm256_loadu_ps(x + i), size = _mm256_andnot_ps(sign, number);
        const __m256 cut = _mm256_or_ps(_mm256_min_ps(limit, size), _mm256_and_ps(sign, number));
        const __m256 kept = _mm256_blendv_ps(cut, number, _mm256_cmp_ps(size, infinity, _CMP_EQ_OQ));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) to[i] = to_half(x[i]);
}

inline float to_bytes(const float* x, int64_t n, int8_t* to) {
    // Sizes as integers: NaN and infinity are the largest.
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t size;
        memcpy(&size, x + i, sizeof size);
        size &= 0x7FFFFFFF;
        most = most < size ? size : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7F800000;
    // Of smaller numbers nothing is left, for 127 / largest may be infinite.
    const float times = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        // The addition rounds to a whole number, which stands in the lowest bits then.
        const float shifted = x[i] * times + 12582912.0f;
        int32_t whole;
        memcpy(&whole, &shifted, sizeof whole);
        to[i] = static_cast<int8_t>(whole);
    }
    return finite ? largest / 127.0f : NAN;
}

inline float number(float x) { return x; }
inline float number(uint16_t x) { return from_bfloat16(x); }

template <class T>
void dense(const T* rows, int64_t n, const float* x, int64_t first, int64_t last, float* y) {
    const int64_t whole = n / kWide * kWide;
    for (int64_t r = first; r < last; ++r) {
        const T* row = rows + r * n;
        float lanes[kWide] = {};
        for (int64_t i = 0; i < whole; i += kWide)
            for (int j = 0; j < kWide; ++j) lanes[j] += number(row[i + j]) * x[i + j];
        float sum = sum_of(lanes);
        for (int64_t i = whole; i < n; ++i) sum += number(row[i]) * x[i];
        y[r] = sum;
    }
}

constexpr octavo::Ops kOps = {rms_norm,    gated,    attend,          transform,   decode,
                              all_to_half, to_bytes, dense<uint16_t>, dense<float>};

}  // namespace
