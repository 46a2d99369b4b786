// Included by translation units with flags of their own, so everything lives in an unnamed namespace (see lanes.h).
// Loops are written so that compilers turn them into vector instructions of the widest kind that the flags allow.
#pragma once

#include <math.h>
#include <string.h>

#include "decode_kernel.h"
#include "hadamard.h"
#include "half.h"
#include "ops.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int kWide = 16;  // partial sums, which the order of additions in vector instructions needs

inline float sum_of(const float (&lanes)[kWide]) {
    float total = 0.0f;
    for (int i = 0; i < kWide; ++i) total += lanes[i];
    return total;
}

// Sixteen half floats as numbers.
inline void load_half(const uint16_t* from, float (&to)[kWide]) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    for (int i = 0; i < kWide; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
    for (int i = 0; i < kWide; ++i) to[i] = from_half(from[i]);
#endif
}

// e^x to 2e-7, for x up to 88; far below -87 it stays at e^-87.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    float rest = x - whole * 0.693359375f;
    rest -= whole * -2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const int32_t exponent = static_cast<int32_t>(whole) * (1 << 23);
    int32_t bits;
    memcpy(&bits, &power, sizeof bits);
    bits += exponent;
    memcpy(&power, &bits, sizeof power);
    return power;
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

inline void attend(const octavo::Attention& a) {
    const int64_t whole = a.width / kWide * kWide;
    float largest = -INFINITY;
    for (int64_t p = 0; p < a.positions; ++p) {
        const uint16_t* key = a.keys + p * a.width;
        float lanes[kWide] = {}, numbers[kWide];
        for (int64_t i = 0; i < whole; i += kWide) {
            load_half(key + i, numbers);
            for (int j = 0; j < kWide; ++j) lanes[j] += numbers[j] * a.query[i + j];
        }
        float score = sum_of(lanes);
        for (int64_t i = whole; i < a.width; ++i) score += from_half(key[i]) * a.query[i];
        score *= a.scale;
        if (a.cap != 0.0f) score = a.cap * tanhf(score / a.cap);
        a.scores[p] = score;
        // NaN must not be lost: it is not below anything.
        largest = score <= largest ? largest : score;
    }
    for (int64_t p = 0; p < a.positions; ++p) a.scores[p] = exponential(a.scores[p] - largest);
    float total = 0.0f;
    for (int64_t p = 0; p < a.positions; ++p) total += a.scores[p];
    for (int64_t i = 0; i < a.width; ++i) a.out[i] = 0.0f;
    for (int64_t p = 0; p < a.positions; ++p) {
        const uint16_t* value = a.values + p * a.width;
        const float weight = a.scores[p] / total;
        float numbers[kWide];
        for (int64_t i = 0; i < whole; i += kWide) {
            load_half(value + i, numbers);
            for (int j = 0; j < kWide; ++j) a.out[i + j] += weight * numbers[j];
        }
        for (int64_t i = whole; i < a.width; ++i) a.out[i] += weight * from_half(value[i]);
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
