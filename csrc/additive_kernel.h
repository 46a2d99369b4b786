// Beam search over additive codebooks, one point after the other, centroids in the lanes. With A_s[c] = |b|^2 - 2 x.b
// and G_st = 2 B_s B_t^T, extending a kept sum by every centroid of a book takes additions only:
// |x - sum b|^2 = |x|^2 + sum_s A_s[c_s] + sum_{s<t} G_st[c_s][c_t].
//
// Nothing of the standard library is called but C functions: its templates have external linkage (see lanes.h).
//
// Kept sums always stand in the lexicographic order of their codes, so the first of equals is the lowest one.
#pragma once

#include <math.h>
#include <string.h>

#include <limits>

#include "additive.h"
#include "additive_lanes.h"

namespace {

using octavo::AdditiveBook;
using octavo::AdditiveKernel;
using octavo::AdditiveScratch;
using octavo::AdditiveSearch;
using octavo::kBlock;
using octavo::kCodeBits;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <int V>
void transform(const float* from, int64_t n, float scale, const float* root, float* to) {
    for (int64_t i = 0; i < n; ++i, from += V, to += V) {
        float sum[V] = {};
        for (int a = 0; a < V; ++a) {
            const float x = from[a] * scale;
            if (root == nullptr) {
                sum[a] = x;
                continue;
            }
            for (int b = 0; b < V; ++b) sum[b] += x * root[a * V + b];
        }
        for (int b = 0; b < V; ++b) to[b] = sum[b];
    }
}

template <int V>
void project(const float* x, int64_t n, float factor, const AdditiveBook& book, const float* base, float* to) {
    for (int64_t i = 0; i < n; ++i, x += V) {
        Float element[V];
        for (int j = 0; j < V; ++j) element[j] = all(factor * x[j]);
        const float* block = book.blocks;
        for (int64_t c = 0; c < book.padded; c += kBlock, block += V * kBlock, to += kBlock) {
            for (int lane = 0; lane < kBlock; lane += kLanes) {
                Float sum = base == nullptr ? all(0.0f) : load(base + c + lane);
                for (int j = 0; j < V; ++j) sum = mul_add(load(block + j * kBlock + lane), element[j], sum);
                store(to + lane, sum);
            }
        }
    }
}

// The values below `limit` are those to keep. Where equal ones stand at the border, they are `below` in number, fewer
// than wanted, and the first that equal `limit` are kept with them.
struct Cut {
    float limit;
    int below;
};

// How many values are below each of two limits.
inline void count_below(const float* values, int64_t vectors, const float (&limits)[2], int (&counts)[2]) {
    const Float first = all(limits[0]), second = all(limits[1]);
    int below_first = 0, below_second = 0;
    for (int64_t i = 0; i < vectors; ++i) {
        const Float value = load(values + i * kLanes);
        below_first += ones(less(value, first));
        below_second += ones(less(value, second));
    }
    counts[0] = below_first;
    counts[1] = below_second;
}

// Floats and integers in the same order, so that neighbours are neighbours.
inline int32_t place(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? INT32_MIN - bits : bits;
}
inline float at_place(int32_t place) {
    const int32_t bits = place < 0 ? INT32_MIN - place : place;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float just_above(float value) { return value < kInfinity ? at_place(place(value) + 1) : kInfinity; }

// Cuts off the `wanted` lowest values, or all finite ones if those are fewer, by narrowing an interval of values.
inline Cut find_cut(const float* values, int64_t vectors, int64_t wanted) {
    // The minima of at least `wanted` groups of values: as many values are not above the highest of them.
    const int64_t groups = (wanted + kLanes - 1) / kLanes, length = vectors / groups;
    Float lowest_lanes = all(kInfinity), negated = all(kInfinity);
    for (int64_t g = 0; g < groups; ++g) {
        Float minimum = all(kInfinity);
        for (int64_t i = g * length; i < (g + 1) * length; ++i) minimum = lower(load(values + i * kLanes), minimum);
        lowest_lanes = lower(minimum, lowest_lanes);
        negated = lower(sub(all(0.0f), minimum), negated);
    }
    for (int64_t i = groups * length; i < vectors; ++i) lowest_lanes = lower(load(values + i * kLanes), lowest_lanes);
    float low = least(lowest_lanes), high = just_above(-least(negated));
    float middle[2] = {low + 0.55f * (high - low), high};
    int below[2], below_low = 0, below_high = 0;
    for (int round = 1;; ++round) {
        count_below(values, vectors, middle, below);
        if (round == 1) {
            below_high = below[1];
            if (below_high <= wanted) return {high, below_high};
        }
        for (int i = 0; i < 2; ++i)
            if (below[i] == wanted) return {middle[i], below[i]};
        // Always fewer than `wanted` are below low, and more below high.
        for (int i = 0; i < 2; ++i) {
            low = below[i] < wanted ? middle[i] : low;
            below_low = below[i] < wanted ? below[i] : below_low;
            high = below[1 - i] > wanted ? middle[1 - i] : high;
            below_high = below[1 - i] > wanted ? below[1 - i] : below_high;
        }
        // Interpolation gets there in a few steps; halving bounds their number whatever the values.
        const float gap = high - low;
        const float goal = static_cast<float>(wanted - below_low) + 0.5f;
        const float share = goal / static_cast<float>(below_high - below_low);
        middle[0] = low + gap * (0.85f * share);
        middle[1] = low + gap * (0.85f * share + 0.15f);
        if (round % 4 == 0 || !(gap < kInfinity)) {
            middle[0] = middle[1] = at_place(static_cast<int32_t>((int64_t{place(low)} + place(high)) >> 1));
            if (middle[0] == low) return {low, below_low};
        }
    }
}

// Moves what a cut keeps to the front of scores and tags, which may be the source; returns their number.
inline int64_t keep(const float* from, const int32_t* from_tags, int64_t vectors, Cut cut, int64_t wanted,
                    float* scores, int32_t* tags) {
    int64_t count = 0;
    if (cut.below == wanted || cut.limit == kInfinity) {
        const Float border = all(cut.limit);
        for (int64_t i = 0; i < vectors; ++i) {
            const Float score = load(from + i * kLanes);
            count += append(less(score, border), score, load(from_tags + i * kLanes), scores + count, tags + count);
        }
        return count;
    }
    int64_t equal = wanted - cut.below;
    for (int64_t i = 0; i < vectors * kLanes; ++i) {
        if (!(from[i] < cut.limit) && !(from[i] == cut.limit && equal-- > 0)) continue;
        scores[count] = from[i];
        tags[count++] = from_tags[i];
    }
    return count;
}

// Kept sums that are extended at a time.
constexpr int kTogether = 4;

// The search of one point after the other.
class BeamSearch {
   public:
    BeamSearch(const AdditiveSearch& search, const AdditiveScratch& scratch) : s_(search), at_(scratch) {}

    // Codes of n transformed points, at most kPoints; zeros where no sum of centroids is at a finite distance.
    void points(const float* y, int64_t n, int64_t* out) {
        for (int t = 0; t < s_.stages; ++t)
            s_.kernel.project(y, n, -2.0f, s_.books[t], s_.books[t].norms, at_.rows[t]);
        for (int64_t i = 0; i < n; ++i, y += s_.v, out += s_.stages) {
            bool finite = true;
            for (int j = 0; j < s_.v; ++j) finite = finite && fabsf(y[j]) <= octavo::kMaxElement;
            for (int t = 0; t < s_.stages; ++t) {
                out[t] = 0;
                rows_[t] = at_.rows[t] + i * s_.books[t].padded;
            }
            if (finite) search(out);
        }
    }

   private:
    void search(int64_t* out) {
        const int last = s_.stages - 1;
        const AdditiveBook& book = s_.books[0];
        const int64_t vectors = book.padded / kLanes, wanted = s_.beam < book.k ? s_.beam : book.k;
        const Cut cut = find_cut(rows_[0], vectors, wanted);
        now_ = 0;
        kept_ = keep(rows_[0], s_.counting, vectors, cut, wanted, at_.totals[now_], at_.codes[now_][0]);
        if (last > 1) extend<1>();
        if (last > 2) extend<2>();
        switch (last) {
            case 1: return finish<1>(out);
            case 2: return finish<2>(out);
            default: return finish<3>(out);
        }
    }

    // What a kept sum adds to the row of stage T: one line of G for each of its codes.
    template <int T>
    struct Lines {
        const float* of[T];
        Float at(int64_t i, Float sum) const {
            for (int s = 0; s < T; ++s) sum = add(sum, load(of[s] + i));
            return sum;
        }
    };
    template <int T>
    Lines<T> lines(int64_t entry) const {
        const AdditiveBook& book = s_.books[T];
        Lines<T> found;
        for (int s = 0; s < T; ++s) found.of[s] = book.pairs[s] + at_.codes[now_][s][entry] * book.padded;
        return found;
    }

    // The best extensions of the kept sums by the centroids of stage T.
    template <int T>
    void extend() {
        constexpr int kStep = 4;
        const int64_t padded = s_.books[T].padded;
        float limit = first_limit<T>();
        int64_t count = 0, i = 0;
        for (int64_t entry = 0; entry < kept_; ++entry) {
            if (!any(less(load(at_.minima + entry * kLanes), all(limit)))) continue;
            const Lines<T> from = lines<T>(entry);
            for (i = 0; i + kStep * kLanes <= padded; i += kStep * kLanes)
                count = collect<T, kStep>(from, entry, i, limit, count);
            for (; i < padded; i += kLanes) count = collect<T, 1>(from, entry, i, limit, count);
            if (count > at_.room) limit = shrink(count);
        }
        if (count > s_.beam) shrink(count);
        const int next = 1 - now_;
        for (i = 0; i < count; ++i) {
            const int32_t from = at_.tags[i] >> kCodeBits;
            at_.totals[next][i] = at_.scores[i];
            for (int s = 0; s < T; ++s) at_.codes[next][s][i] = at_.codes[now_][s][from];
            at_.codes[next][T][i] = at_.tags[i] & ((int32_t{1} << kCodeBits) - 1);
        }
        now_ = next;
        kept_ = count;
    }

    // A number that enough extensions are below: as many as are wanted of the best ones in each lane of each row.
    template <int T>
    float first_limit() {
        row_minima<T>([&](int64_t entry, Float minimum) { store(at_.minima + entry * kLanes, minimum); });
        if (kept_ * kLanes < s_.beam) return kInfinity;
        const Cut cut = find_cut(at_.minima, kept_, s_.beam);
        return cut.below == s_.beam ? cut.limit : just_above(cut.limit);
    }

    // Appends those of N vectors of candidates that are below the limit; returns how many there are then.
    template <int T, int N>
    int64_t collect(const Lines<T>& from, int64_t entry, int64_t i, float limit, int64_t count) {
        const Float total = all(at_.totals[now_][entry]), border = all(limit);
        Float score[N], minimum = all(kInfinity);
        for (int p = 0; p < N; ++p) {
            score[p] = add(from.at(i + p * kLanes, load(rows_[T] + i + p * kLanes)), total);
            minimum = lower(score[p], minimum);
        }
        if (!any(less(minimum, border))) return count;
        const Int base = all(static_cast<int32_t>(entry << kCodeBits));
        for (int p = 0; p < N; ++p) {
            const Int tag = add(base, load(s_.counting + i + p * kLanes));
            count += append(less(score[p], border), score[p], tag, at_.scores + count, at_.tags + count);
        }
        return count;
    }

    // Keeps the best of the candidates; later ones must be below the returned limit.
    float shrink(int64_t& count) {
        for (int lane = 0; lane < kBlock; lane += kLanes) store(at_.scores + count + lane, all(kInfinity));
        const int64_t vectors = (count + kLanes - 1) / kLanes;
        const Cut cut = find_cut(at_.scores, vectors, s_.beam);
        count = keep(at_.scores, at_.tags, vectors, cut, s_.beam, at_.scores, at_.tags);
        return cut.limit;
    }

    // The best extension by the centroids of the last stage, T.
    template <int T>
    void finish(int64_t* out) const {
        Float best = all(kInfinity);
        Int which = all(int32_t{0});
        row_minima<T>([&](int64_t entry, Float score) {
            which = select(less(score, best), all(static_cast<int32_t>(entry)), which);
            best = lower(score, best);
        });
        const float value = least(best);
        if (!(value < kInfinity)) return;
        const int32_t winner = lowest(best, value, which);
        const Lines<T> from = lines<T>(winner);
        best = all(kInfinity);
        for (int64_t i = 0; i < s_.books[T].padded; i += kLanes) {
            const Float score = from.at(i, load(rows_[T] + i));
            which = select(less(score, best), load(s_.counting + i), which);
            best = lower(score, best);
        }
        for (int s = 0; s < T; ++s) out[s] = at_.codes[now_][s][winner];
        out[T] = lowest(best, least(best), which);
    }

    // Calls take(entry, minimum) for every kept sum, with the least of its extensions by stage T in each lane.
    template <int T, class Take>
    void row_minima(const Take& take) const {
        int64_t entry = 0;
        for (; entry + kTogether <= kept_; entry += kTogether) minima_of<T, kTogether>(entry, take);
        for (; entry < kept_; ++entry) minima_of<T, 1>(entry, take);
    }

    // N kept sums at a time share the loads of A_T.
    template <int T, int N, class Take>
    void minima_of(int64_t first, const Take& take) const {
        Lines<T> from[N];
        Float minimum[N];
        for (int e = 0; e < N; ++e) {
            from[e] = lines<T>(first + e);
            minimum[e] = all(kInfinity);
        }
        const float* row = rows_[T];
        const int64_t padded = s_.books[T].padded;
        int64_t i = 0;
        for (; i + 2 * kLanes <= padded; i += 2 * kLanes) {
            const Float first_half = load(row + i), second_half = load(row + i + kLanes);
            for (int e = 0; e < N; ++e) {
                minimum[e] = lower(from[e].at(i, first_half), minimum[e]);
                minimum[e] = lower(from[e].at(i + kLanes, second_half), minimum[e]);
            }
        }
        for (; i < padded; i += kLanes)
            for (int e = 0; e < N; ++e) minimum[e] = lower(from[e].at(i, load(row + i)), minimum[e]);
        for (int e = 0; e < N; ++e) take(first + e, add(minimum[e], all(at_.totals[now_][first + e])));
    }

    const AdditiveSearch& s_;
    const AdditiveScratch& at_;
    const float* rows_[octavo::kMaxStages] = {};  // A_t of the point at hand
    int now_ = 0;                                 // which of the two sets of kept sums is the present one
    int64_t kept_ = 0;                            // how many they are
};

inline void search_points(const AdditiveSearch& s, const AdditiveScratch& scratch, int64_t first, int64_t last) {
    float moved[octavo::kPoints * octavo::kMaxVector];
    BeamSearch search(s, scratch);
    for (; first < last; first += octavo::kPoints) {
        const int64_t count = last - first < octavo::kPoints ? last - first : octavo::kPoints;
        s.kernel.transform(s.points + first * s.v, count, s.scale, s.root, moved);
        search.points(moved, count, s.out + first * s.stages);
    }
}

inline AdditiveKernel additive_kernel(int v) {
#define OCTAVO_LENGTH(V) {transform<V>, project<V>, search_points}
    static constexpr AdditiveKernel kTable[octavo::kMaxVector] = {
        OCTAVO_LENGTH(1),  OCTAVO_LENGTH(2),  OCTAVO_LENGTH(3),  OCTAVO_LENGTH(4),
        OCTAVO_LENGTH(5),  OCTAVO_LENGTH(6),  OCTAVO_LENGTH(7),  OCTAVO_LENGTH(8),
        OCTAVO_LENGTH(9),  OCTAVO_LENGTH(10), OCTAVO_LENGTH(11), OCTAVO_LENGTH(12),
        OCTAVO_LENGTH(13), OCTAVO_LENGTH(14), OCTAVO_LENGTH(15), OCTAVO_LENGTH(16),
    };
#undef OCTAVO_LENGTH
    return kTable[v - 1];
}

}  // namespace
