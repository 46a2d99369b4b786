// Included by translation units with flags of their own, so everything lives in an unnamed namespace (see lanes.h).
#pragma once

#include <string.h>

#include "gather.h"
#include "half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using octavo::Gather;
using octavo::GatherKernels;
using octavo::GatherStage;

inline int64_t code_of(const GatherStage& stage, int64_t at) {
    return stage.narrow != nullptr ? stage.narrow[at] : stage.wide[at];
}

// The vector at `at`: the sum of its centroids, signs applied.
template <int V>
inline void decode_vector(const Gather& g, int64_t at, float (&sum)[V]) {
    for (int s = 0; s < g.stages; ++s) {
        const GatherStage& stage = g.stage[s];
        const int64_t entry = code_of(stage, at) * V;
        for (int j = 0; j < V; ++j) {
            const float element = stage.book != nullptr ? stage.book[entry + j] : from_half(stage.half_book[entry + j]);
            sum[j] = s == 0 ? element : sum[j] + element;
        }
    }
    if (g.signs == nullptr) return;
    for (int j = 0; j < V; ++j)
        if ((g.signs[at] >> j & 1) != 0) sum[j] = -sum[j];
}

template <int V>
struct Plain {
    static void columns(const Gather& g, const float* x, int64_t first, int64_t last, float* sums) {
        for (int64_t r = first; r < last; ++r) {
            float total[V] = {}, vector[V];
            for (int64_t i = 0; i < g.vectors; ++i) {
                decode_vector<V>(g, r * g.vectors + i, vector);
                for (int j = 0; j < V; ++j) total[j] += x[i] * vector[j];
            }
            for (int j = 0; j < V; ++j) sums[r * V + j] += total[j];
        }
    }
    static void rows(const Gather& g, const float* x, int64_t first, int64_t last, float* y) {
        for (int64_t r = first; r < last; ++r) {
            float total[V] = {}, vector[V];
            for (int64_t i = 0; i < g.vectors; ++i) {
                decode_vector<V>(g, r * g.vectors + i, vector);
                for (int j = 0; j < V; ++j) total[j] += x[i * V + j] * vector[j];
            }
            for (int j = 0; j < V; ++j) y[r] += total[j];
        }
    }
};

#if defined(__AVX2__)

// Vectors of eight in a register. Every stage adds its part for itself: the look-ups of many vectors are under way at a
// time, which is what large books in the L2 cache need.
struct Eight {
    static __m256 centroid(const GatherStage& stage, int64_t at) {
        const int64_t entry = code_of(stage, at) * 8;
        if (stage.book != nullptr) return _mm256_loadu_ps(stage.book + entry);
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stage.half_book + entry)));
    }
    static __m256 vector(const Gather& g, int64_t at) {
        __m256 sum = centroid(g.stage[0], at);
        for (int s = 1; s < g.stages; ++s) sum = _mm256_add_ps(sum, centroid(g.stage[s], at));
        if (g.signs != nullptr) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(g.sign_table + 8 * g.signs[at]));
        return sum;
    }
    // The sum over a vector row of f(i) * vector i, in four parts that do not wait for each other.
    template <class Factor>
    static __m256 total(const Gather& g, int64_t row, const Factor& factor) {
        __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        const int64_t from = row * g.vectors;
        int64_t i = 0;
        for (; i + 4 <= g.vectors; i += 4)
            for (int u = 0; u < 4; ++u) part[u] = _mm256_fmadd_ps(factor(i + u), vector(g, from + i + u), part[u]);
        for (; i < g.vectors; ++i) part[0] = _mm256_fmadd_ps(factor(i), vector(g, from + i), part[0]);
        return _mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]));
    }
    static void columns(const Gather& g, const float* x, int64_t first, int64_t last, float* sums) {
        for (int64_t r = first; r < last; ++r) {
            const __m256 found = total(g, r, [x](int64_t i) { return _mm256_broadcast_ss(x + i); });
            _mm256_storeu_ps(sums + 8 * r, _mm256_add_ps(_mm256_loadu_ps(sums + 8 * r), found));
        }
    }
    static void rows(const Gather& g, const float* x, int64_t first, int64_t last, float* y) {
        for (int64_t r = first; r < last; ++r) {
            float lanes[8];
            _mm256_storeu_ps(lanes, total(g, r, [x](int64_t i) { return _mm256_loadu_ps(x + 8 * i); }));
            for (const float lane : lanes) y[r] += lane;
        }
    }
};

#else

using Eight = Plain<8>;

#endif

inline GatherKernels gather_kernels(int v) {
    switch (v) {
        case 1: return {Plain<1>::columns, Plain<1>::rows};
        case 2: return {Plain<2>::columns, Plain<2>::rows};
        case 3: return {Plain<3>::columns, Plain<3>::rows};
        case 4: return {Plain<4>::columns, Plain<4>::rows};
        case 5: return {Plain<5>::columns, Plain<5>::rows};
        case 6: return {Plain<6>::columns, Plain<6>::rows};
        case 8: return {Eight::columns, Eight::rows};
        case 10: return {Plain<10>::columns, Plain<10>::rows};
        case 12: return {Plain<12>::columns, Plain<12>::rows};
        case 16: return {Plain<16>::columns, Plain<16>::rows};
        default: return {nullptr, nullptr};
    }
}

}  // namespace
