// Queries against a stretch of the cache of keys and values. Included by translation units with flags of their own (see
// lanes.h).
//
// All heads of a token stand side by side, so that a thread reads a stretch of memory from its beginning to its end:
// first all keys, then all values. Every key and value is read once, for all query heads that share it.
#pragma once

#include <math.h>
#include <string.h>

#include "half.h"
#include "lanes.h"
#include "ops.h"

namespace {

// Keys whose products are made at a time, and values that are added before sums are put down.
constexpr int kKeys = 4, kValues = 8;
// Query heads that share a key and are multiplied at a time: kKeys sums of each stay in registers.
constexpr int kQueries = kRegisters / 8;
// How far ahead of their use keys and values are asked for, as codes are (lookup_vbmi.cpp).
constexpr int64_t kAhead = 16384;
constexpr int64_t kLine = 64;
// Numbers at a time in loops that compilers turn into vector instructions.
constexpr int kWide = 16;

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
    // The whole number stands in the lowest bits of the shifted one; of NaN these are zeros.
    uint32_t bits, exponent;
    memcpy(&bits, &power, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    memcpy(&power, &bits, sizeof power);
    return power;
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

inline float number_of(uint16_t cached) { return from_half(cached); }
inline float number_of(int8_t cached) { return cached; }

// kLanes half floats or bytes as numbers.
inline Float load_cached(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    float numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i] = from_half(from[i]);
    return load(numbers);
#endif
}
inline Float load_cached(const int8_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    float numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i] = from[i];
    return load(numbers);
#endif
}

// Asks for `bytes` from `from` on; nothing happens where there is no memory.
inline void ask_for(const void* from, int64_t bytes) {
    const char* at = static_cast<const char*>(from);
    for (int64_t i = 0; i < bytes; i += kLine) {
#if defined(__AVX2__)
        _mm_prefetch(at + i, _MM_HINT_T1);
#elif defined(__GNUC__)
        __builtin_prefetch(at + i, 0, 2);
#endif
    }
}

// to[i] = the sum of sums[i].
inline void add_up(const Float (&sums)[kKeys], float* to) {
#if defined(__AVX2__)
    __m256 halves[kKeys];
    for (int i = 0; i < kKeys; ++i) {
#if defined(__AVX512F__)
        const __m512d whole = _mm512_castps_pd(sums[i]);
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256(sums[i]), _mm256_castpd_ps(_mm512_extractf64x4_pd(whole, 1)));
#else
        halves[i] = sums[i];
#endif
    }
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(halves[0], halves[1]), _mm256_hadd_ps(halves[2], halves[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
#else
    for (int i = 0; i < kKeys; ++i) {
        float sum = sums[i][0];
        for (int lane = 1; lane < kLanes; ++lane) sum += sums[i][lane];
        to[i] = sum;
    }
#endif
}

// scores[q * stride + k] = <queries[q], keys[k]> for K keys that lie `row` apart.
template <int Q, int K, class T>
void multiply_keys(const float* queries, const T* keys, int64_t row, int64_t width, float* scores, int64_t stride) {
    const int64_t whole = width / kLanes * kLanes;
    Float sums[Q][kKeys];
    for (int q = 0; q < Q; ++q)
        for (int k = 0; k < kKeys; ++k) sums[q][k] = all(0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) {
        Float elements[K];
        for (int k = 0; k < K; ++k) elements[k] = load_cached(keys + k * row + i);
        for (int q = 0; q < Q; ++q) {
            const Float query = load(queries + q * width + i);
            for (int k = 0; k < K; ++k) sums[q][k] = mul_add(query, elements[k], sums[q][k]);
        }
    }
    for (int q = 0; q < Q; ++q) {
        float found[kKeys];
        add_up(sums[q], found);
        for (int k = 0; k < K; ++k) {
            for (int64_t i = whole; i < width; ++i) found[k] += queries[q * width + i] * number_of(keys[k * row + i]);
            scores[q * stride + k] = found[k];
        }
    }
}

// out[q * width + ..] += sum_p weights[q * stride + p] values[p * row + ..] for N * kLanes columns.
template <int Q, int N, class T>
void add_columns(const T* values, int64_t row, int64_t count, const float* weights, int64_t stride, int64_t width,
                 float* out) {
    Float sums[Q][N];
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) sums[q][n] = load(out + q * width + n * kLanes);
    for (int64_t p = 0; p < count; ++p) {
        Float elements[N];
        for (int n = 0; n < N; ++n) elements[n] = load_cached(values + p * row + n * kLanes);
        for (int q = 0; q < Q; ++q) {
            const Float weight = all(weights[q * stride + p]);
            for (int n = 0; n < N; ++n) sums[q][n] = mul_add(weight, elements[n], sums[q][n]);
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int n = 0; n < N; ++n) store(out + q * width + n * kLanes, sums[q][n]);
}

// The same for all columns.
template <int Q, class T>
void add_values(const T* values, int64_t row, int64_t count, const float* weights, int64_t stride, int64_t width,
                float* out) {
    constexpr int kMost = Q == 1 ? 8 : 4;
    int64_t i = 0;
    for (; i + kMost * kLanes <= width; i += kMost * kLanes)
        add_columns<Q, kMost>(values + i, row, count, weights, stride, width, out + i);
    for (; i + kLanes <= width; i += kLanes) add_columns<Q, 1>(values + i, row, count, weights, stride, width, out + i);
    for (; i < width; ++i)
        for (int q = 0; q < Q; ++q)
            for (int64_t p = 0; p < count; ++p)
                out[q * width + i] += weights[q * stride + p] * number_of(values[p * row + i]);
}

// By the number of query heads at a time.
template <class T>
struct Kernels {
    using Keys = void (*)(const float*, const T*, int64_t, int64_t, float*, int64_t);
    using Values = void (*)(const T*, int64_t, int64_t, const float*, int64_t, int64_t, float*);
    static constexpr Keys kFourKeys[] = {nullptr, multiply_keys<1, kKeys, T>, multiply_keys<2, kKeys, T>,
                                         multiply_keys<3, kKeys, T>, multiply_keys<4, kKeys, T>};
    static constexpr Keys kOneKey[] = {nullptr, multiply_keys<1, 1, T>, multiply_keys<2, 1, T>, multiply_keys<3, 1, T>,
                                       multiply_keys<4, 1, T>};
    static constexpr Values kValues[] = {nullptr, add_values<1, T>, add_values<2, T>, add_values<3, T>,
                                         add_values<4, T>};
};

// Scores become weights e^(score - largest), times the factors of the values; returns the sum of the former.
inline float weigh(const octavo::Attention& a, int64_t head, float* scores, float* largest) {
    const int64_t n = a.positions, whole = n / kWide * kWide, first = head / (a.heads / a.key_heads) * a.factor_stride;
    float lanes[kWide];
    for (int64_t p = 0; p < n; ++p) scores[p] *= a.scale;
    if (a.key_factors != nullptr)
        for (int64_t p = 0; p < n; ++p) scores[p] *= a.key_factors[first + p];
    if (a.cap != 0.0f)
        for (int64_t p = 0; p < n; ++p) scores[p] = a.cap * tanhf(scores[p] / a.cap);
    // NaN is larger than nothing, and its weight is NaN again.
    for (float& lane : lanes) lane = -INFINITY;
    for (int64_t p = 0; p < whole; p += kWide)
        for (int j = 0; j < kWide; ++j) lanes[j] = lanes[j] < scores[p + j] ? scores[p + j] : lanes[j];
    float most = -INFINITY;
    for (const float lane : lanes) most = most < lane ? lane : most;
    for (int64_t p = whole; p < n; ++p) most = most < scores[p] ? scores[p] : most;
    for (int64_t p = 0; p < n; ++p) scores[p] = exponential(scores[p] - most);
    for (float& lane : lanes) lane = 0.0f;
    for (int64_t p = 0; p < whole; p += kWide)
        for (int j = 0; j < kWide; ++j) lanes[j] += scores[p + j];
    float total = 0.0f;
    for (const float lane : lanes) total += lane;
    for (int64_t p = whole; p < n; ++p) total += scores[p];
    if (a.value_factors != nullptr)
        for (int64_t p = 0; p < n; ++p) scores[p] *= a.value_factors[first + p];
    *largest = most;
    return total;
}

// Calls body(head, kept, queries) for the query heads of all kept heads, at most kQueries of a group at a time.
template <class Body>
inline void each_head(const octavo::Attention& a, const Body& body) {
    const int64_t group = a.heads / a.key_heads;
    for (int64_t kept = 0; kept < a.key_heads; ++kept)
        for (int64_t q = 0; q < group; q += kQueries)
            body(kept * group + q, kept, group - q < kQueries ? group - q : kQueries);
}

template <class T>
void attend(const octavo::Attention& a, const T* keys, const T* values) {
    const int64_t width = a.width, row = a.key_heads * width, n = a.positions;
    for (int64_t p = 0, count; p < n; p += count) {
        count = n - p < kKeys ? 1 : kKeys;
        const auto multiply = count == 1 ? Kernels<T>::kOneKey : Kernels<T>::kFourKeys;
        const T* const ahead = keys + (p + count) * row + kAhead / int64_t{sizeof(T)};
        each_head(a, [&](int64_t head, int64_t kept, int64_t queries) {
            ask_for(ahead + kept * count * width, count * width * int64_t{sizeof(T)});
            multiply[queries](a.queries + head * width, keys + p * row + kept * width, row, width,
                              a.scores + head * n + p, n);
        });
    }
    for (int64_t head = 0; head < a.heads; ++head)
        a.totals[head] = weigh(a, head, a.scores + head * n, a.largest + head);
    memset(a.out, 0, static_cast<size_t>(a.heads * width) * sizeof *a.out);
    for (int64_t p = 0; p < n; p += kValues) {
        const int64_t count = n - p < kValues ? n - p : kValues;
        const T* const ahead = values + (p + count) * row + kAhead / int64_t{sizeof(T)};
        each_head(a, [&](int64_t head, int64_t kept, int64_t queries) {
            ask_for(ahead + kept * count * width, count * width * int64_t{sizeof(T)});
            Kernels<T>::kValues[queries](values + p * row + kept * width, row, count, a.scores + head * n + p, n, width,
                                         a.out + head * width);
        });
    }
}

inline void attend(const octavo::Attention& a) {
    if (a.key_factors == nullptr) {
        attend(a, static_cast<const uint16_t*>(a.keys), static_cast<const uint16_t*>(a.values));
    } else {
        attend(a, static_cast<const int8_t*>(a.keys), static_cast<const int8_t*>(a.values));
    }
}

}  // namespace
