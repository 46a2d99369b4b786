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

constexpr int kWide = 16;  // partial sums, which the order of additions in vector instructions needs

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
    for (int64_t i = 0; i < n; ++i) to[i] = to_half(x[i]);
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

constexpr octavo::Ops kOps = {rms_norm, gated, attend, transform, decode, all_to_half, dense<uint16_t>, dense<float>};

}  // namespace
