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
            const float element = stage.book != nullptr        ? stage.book[entry + j]
                                  : stage.half_book != nullptr ? from_half(stage.half_book[entry + j])
                                                               : stage.byte_book[entry + j] * stage.byte_step;
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
            float total[V] = {}, vector[V] = {};
            for (int64_t i = 0; i < g.vectors; ++i) {
                decode_vector<V>(g, r * g.vectors + i, vector);
                for (int j = 0; j < V; ++j) total[j] += x[i] * vector[j];
            }
            for (int j = 0; j < V; ++j) sums[r * V + j] += total[j];
        }
    }
    static void rows(const Gather& g, const float* x, int64_t first, int64_t last, float* y) {
        for (int64_t r = first; r < last; ++r) {
            float total[V] = {}, vector[V] = {};
            for (int64_t i = 0; i < g.vectors; ++i) {
                decode_vector<V>(g, r * g.vectors + i, vector);
                for (int j = 0; j < V; ++j) total[j] += x[i * V + j] * vector[j];
            }
            for (int j = 0; j < V; ++j) y[r] += total[j];
        }
    }
};

#if defined(__AVX2__)

// Books of vectors of eight, by how they are kept. unit() times an entry is the centroid.
struct FloatBook {
    const float* at;
    explicit FloatBook(const GatherStage& stage) : at(stage.book) {}
    float unit() const { return 1.0f; }
    __m256 operator[](int64_t entry) const { return _mm256_loadu_ps(at + 8 * entry); }
};
struct HalfBook {
    const uint16_t* at;
    explicit HalfBook(const GatherStage& stage) : at(stage.half_book) {}
    float unit() const { return 1.0f; }
    __m256 operator[](int64_t entry) const {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8 * entry)));
    }
};
struct ByteBook {
    const int8_t* at;
    float step;
    explicit ByteBook(const GatherStage& stage) : at(stage.byte_book), step(stage.byte_step) {}
    float unit() const { return step; }
    // In units.
    __m256 operator[](int64_t entry) const {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * entry));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
};

// What vector i is multiplied by: one number of x, or eight of them, with signs or without.
struct Alone {
    const float* x;
    __m256 operator[](int64_t i) const { return _mm256_broadcast_ss(x + i); }
};
struct Together {
    const float* x;
    __m256 operator[](int64_t i) const { return _mm256_loadu_ps(x + 8 * i); }
};
template <class Factor>
struct Signed {
    Factor factor;
    const float* table;
    const uint16_t* signs;
    __m256 operator[](int64_t i) const { return _mm256_mul_ps(factor[i], _mm256_loadu_ps(table + 8 * signs[i])); }
};

struct Eight {
    // sum_i factor[i] book[codes[i]], in four parts that do not wait for each other: what bounds this are the look-ups
    // of large books in the second-level cache, of which many must be under way.
    template <class Book, class Code, class Factor>
    static __m256 sum(const Book& book, const Code* codes, int64_t n, const Factor& factor) {
        __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        int64_t i = 0;
        for (; i + 4 <= n; i += 4)
            for (int u = 0; u < 4; ++u) part[u] = _mm256_fmadd_ps(factor[i + u], book[codes[i + u]], part[u]);
        for (; i < n; ++i) part[0] = _mm256_fmadd_ps(factor[i], book[codes[i]], part[0]);
        return _mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]));
    }
    template <class Book, class Factor>
    static __m256 sum(const GatherStage& stage, int64_t from, int64_t n, const Factor& factor) {
        const Book book(stage);
        if (stage.narrow != nullptr) return sum(book, stage.narrow + from, n, factor);
        return sum(book, stage.wide + from, n, factor);
    }
    // The first two stages at once, VPTQ's large book and its residual: the look-ups of the one hide behind those of
    // the other.
    template <class Book, class Factor>
    static __m256 pair(const Gather& g, int64_t from, const Factor& factor) {
        const Book large(g.stage[0]);
        const FloatBook residual(g.stage[1]);
        const uint16_t* const codes = g.stage[0].wide + from;
        const uint8_t* const residuals = g.stage[1].narrow + from;
        const __m256 unit = _mm256_set1_ps(large.unit());
        const auto vector = [&](int64_t i) { return _mm256_fmadd_ps(large[codes[i]], unit, residual[residuals[i]]); };
        __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        int64_t i = 0;
        for (; i + 4 <= g.vectors; i += 4)
            for (int u = 0; u < 4; ++u) part[u] = _mm256_fmadd_ps(factor[i + u], vector(i + u), part[u]);
        for (; i < g.vectors; ++i) part[0] = _mm256_fmadd_ps(factor[i], vector(i), part[0]);
        return _mm256_add_ps(_mm256_add_ps(part[0], part[1]), _mm256_add_ps(part[2], part[3]));
    }
    // All stages of a vector row, one after the other unless they are a pair.
    template <class Factor>
    static __m256 total(const Gather& g, int64_t row, const Factor& factor) {
        __m256 found = _mm256_setzero_ps();
        const int64_t from = row * g.vectors;
        int first = 0;
        if (g.stages > 1 && g.stage[0].wide != nullptr && g.stage[1].narrow != nullptr && g.stage[1].book != nullptr) {
            found = g.stage[0].book != nullptr        ? pair<FloatBook>(g, from, factor)
                    : g.stage[0].half_book != nullptr ? pair<HalfBook>(g, from, factor)
                                                      : pair<ByteBook>(g, from, factor);
            first = 2;
        }
        for (int s = first; s < g.stages; ++s) {
            const GatherStage& stage = g.stage[s];
            if (stage.book != nullptr) {
                found = _mm256_add_ps(found, sum<FloatBook>(stage, from, g.vectors, factor));
            } else if (stage.half_book != nullptr) {
                found = _mm256_add_ps(found, sum<HalfBook>(stage, from, g.vectors, factor));
            } else {
                const __m256 steps = sum<ByteBook>(stage, from, g.vectors, factor);
                found = _mm256_fmadd_ps(steps, _mm256_set1_ps(stage.byte_step), found);
            }
        }
        return found;
    }
    template <class Factor>
    static __m256 signed_total(const Gather& g, int64_t row, const Factor& factor) {
        if (g.signs == nullptr) return total(g, row, factor);
        return total(g, row, Signed<Factor>{factor, g.sign_table, g.signs + row * g.vectors});
    }
    static void columns(const Gather& g, const float* x, int64_t first, int64_t last, float* sums) {
        for (int64_t r = first; r < last; ++r) {
            const __m256 found = signed_total(g, r, Alone{x});
            _mm256_storeu_ps(sums + 8 * r, _mm256_add_ps(_mm256_loadu_ps(sums + 8 * r), found));
        }
    }
    static void rows(const Gather& g, const float* x, int64_t first, int64_t last, float* y) {
        for (int64_t r = first; r < last; ++r) {
            float lanes[8];
            _mm256_storeu_ps(lanes, signed_total(g, r, Together{x}));
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
