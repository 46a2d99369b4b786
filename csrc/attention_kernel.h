// One query against the keys and values of the tokens before it. Included by translation units with flags of their own
// (see lanes.h).
#pragma once

#include <math.h>
#include <string.h>

#include "half.h"
#include "lanes.h"
#include "ops.h"

namespace {

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

// kLanes half floats as numbers.
inline Float load_half(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    float numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i] = from_half(from[i]);
    return load(numbers);
#endif
}

inline void store(float* to, Float x) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, x);
#elif defined(__AVX2__)
    _mm256_storeu_ps(to, x);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = x[i];
#endif
}

inline float sum_of(Float x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// scores[p] = <query, keys[p]> for n keys in a row; their sums do not wait for each other.
template <int N>
void multiply_keys(const float* query, const uint16_t* keys, int64_t width, float* scores) {
    const int64_t whole = width / kLanes * kLanes;
    Float sums[N];
    for (int k = 0; k < N; ++k) sums[k] = all(0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Float elements = load(query + i);
        for (int k = 0; k < N; ++k) sums[k] = mul_add(elements, load_half(keys + k * width + i), sums[k]);
    }
    for (int k = 0; k < N; ++k) {
        float score = sum_of(sums[k]);
        for (int64_t i = whole; i < width; ++i) score += from_half(keys[k * width + i]) * query[i];
        scores[k] = score;
    }
}

// out[..] = sum_p weights[p] values[p][..] for N * kLanes columns.
template <int N>
void add_values(const uint16_t* values, const float* weights, int64_t positions, int64_t width, float* out) {
    Float sums[N];
    for (int k = 0; k < N; ++k) sums[k] = all(0.0f);
    for (int64_t p = 0; p < positions; ++p) {
        const Float weight = all(weights[p]);
        for (int k = 0; k < N; ++k) sums[k] = mul_add(weight, load_half(values + p * width + k * kLanes), sums[k]);
    }
    for (int k = 0; k < N; ++k) store(out + k * kLanes, sums[k]);
}

inline void attend(const octavo::Attention& a) {
    int64_t p = 0;
    for (; p + 4 <= a.positions; p += 4) multiply_keys<4>(a.query, a.keys + p * a.width, a.width, a.scores + p);
    for (; p < a.positions; ++p) multiply_keys<1>(a.query, a.keys + p * a.width, a.width, a.scores + p);
    float largest = -INFINITY;
    for (p = 0; p < a.positions; ++p) {
        float score = a.scores[p] * a.scale;
        if (a.cap != 0.0f) score = a.cap * tanhf(score / a.cap);
        a.scores[p] = score;
        // NaN must not be lost: it is not below anything.
        largest = score <= largest ? largest : score;
    }
    for (p = 0; p < a.positions; ++p) a.scores[p] = exponential(a.scores[p] - largest);
    float total = 0.0f;
    for (p = 0; p < a.positions; ++p) total += a.scores[p];
    for (p = 0; p < a.positions; ++p) a.scores[p] /= total;
    int64_t i = 0;
    for (; i + 4 * kLanes <= a.width; i += 4 * kLanes)
        add_values<4>(a.values + i, a.scores, a.positions, a.width, a.out + i);
    for (; i + kLanes <= a.width; i += kLanes) add_values<1>(a.values + i, a.scores, a.positions, a.width, a.out + i);
    for (; i < a.width; ++i) {
        float sum = 0.0f;
        for (p = 0; p < a.positions; ++p) sum += a.scores[p] * from_half(a.values[p * a.width + i]);
        a.out[i] = sum;
    }
}

}  // namespace
