// Brute-force nearest centroid with points in the lanes: a centroid is broadcast once and compared with kLanes * P
// points that stay in registers, each lane keeping its own minimum. No reduction across lanes, no padding of the book.
#pragma once

#include <limits>

#include "lanes.h"
#include "nearest.h"

namespace {

using octavo::kDirectVector;
using octavo::Search;

// Vectors of points per block, so that points, minima and indices stay in registers.
constexpr int block_vectors(int per_vector) {
    int p = 4;
    while (p > 1 && p * (per_vector + 2) + 3 > kRegisters) --p;
    return p;
}

template <int V, int P, bool kWeighted>
void block(const Search& s, const float* x_columns, const float* w_columns, int32_t* winners) {
    constexpr bool kDirect = kWeighted || V <= kDirectVector;
    Float x[P][V], root[P][V], best[P];
    Int index[P];
    for (int p = 0; p < P; ++p) {
        for (int j = 0; j < V; ++j) {
            x[p][j] = load(x_columns + (j * P + p) * kLanes);
            if constexpr (kWeighted) {
                // w (x - c)^2 = (sqrt(w) x - sqrt(w) c)^2: two multiply-adds per element.
                root[p][j] = square_root(load(w_columns + (j * P + p) * kLanes));
                x[p][j] = mul(x[p][j], root[p][j]);
            }
        }
        best[p] = all(std::numeric_limits<float>::infinity());
        index[p] = all(int32_t{0});
    }
    const float* centroid = s.book;
    const int32_t k = static_cast<int32_t>(s.k);
    for (int32_t c = 0; c < k; ++c, centroid += V) {
        const Int current = all(c);
        Float score[P];
        for (int j = 0; j < V; ++j) {
            const Float value = all(centroid[j]);
            for (int p = 0; p < P; ++p) {
                if constexpr (kDirect) {
                    const Float gap = kWeighted ? neg_mul_add(value, root[p][j], x[p][j]) : sub(x[p][j], value);
                    score[p] = j == 0 ? mul(gap, gap) : mul_add(gap, gap, score[p]);
                } else {
                    score[p] = neg_mul_add(x[p][j], value, j == 0 ? all(s.half_norms[c]) : score[p]);
                }
            }
        }
        // Strictly less: the first of equals stays, and NaN never wins (lower() keeps its second operand on NaN).
        for (int p = 0; p < P; ++p) {
            index[p] = select(less(score[p], best[p]), current, index[p]);
            best[p] = lower(score[p], best[p]);
        }
    }
    for (int p = 0; p < P; ++p) store(winners + p * kLanes, index[p]);
}

// Points [first, first + count), count <= P * kLanes: transpose into columns, search, write.
template <int V, int P, bool kWeighted>
void points_block(const Search& s, int64_t first, int count) {
    constexpr int kPoints = P * kLanes;
    alignas(64) float x[V * kPoints];
    alignas(64) float w[kWeighted ? V * kPoints : 1];
    alignas(64) int32_t winners[kPoints];
    const float* points = s.points + first * V;
    const float* weights = kWeighted ? s.weights + first * V : nullptr;
    if (count < kPoints) {
        for (int i = 0; i < V * kPoints; ++i) x[i] = 0.0f;
        if constexpr (kWeighted)
            for (int i = 0; i < V * kPoints; ++i) w[i] = 0.0f;
    }
    for (int j = 0; j < V; ++j) {
        for (int i = 0; i < count; ++i) x[j * kPoints + i] = points[i * V + j] - s.shift[j];
        if constexpr (kWeighted)
            for (int i = 0; i < count; ++i) w[j * kPoints + i] = weights[i * V + j];
    }
    block<V, P, kWeighted>(s, x, w, winners);
    for (int i = 0; i < count; ++i) s.out[first + i] = winners[i];
}

template <int V, bool kWeighted>
void search_range(const Search& s, int64_t first, int64_t last) {
    constexpr int P = block_vectors(kWeighted ? 2 * V : V);
    for (; last - first >= P * kLanes; first += P * kLanes) points_block<V, P, kWeighted>(s, first, P * kLanes);
    for (; first < last; first += kLanes) {
        const int64_t left = last - first;
        points_block<V, 1, kWeighted>(s, first, left < kLanes ? static_cast<int>(left) : kLanes);
    }
}

template <int V>
void search(const Search& s, int64_t first, int64_t last) {
    if (s.weights != nullptr)
        search_range<V, true>(s, first, last);
    else
        search_range<V, false>(s, first, last);
}

inline octavo::Kernel kernel_for(int v) {
    static constexpr octavo::Kernel kTable[octavo::kMaxVector] = {
        search<1>, search<2>,  search<3>,  search<4>,  search<5>,  search<6>,  search<7>,  search<8>,
        search<9>, search<10>, search<11>, search<12>, search<13>, search<14>, search<15>, search<16>,
    };
    return kTable[v - 1];
}

}  // namespace
