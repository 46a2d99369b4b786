// Beam search over additive codebooks: scales and transforms the books, tabulates the products of their centroids, and
// splits the points over threads.
#include "additive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu.h"
#include "octavo_c.h"
#include "parallel.h"

namespace octavo {
namespace {

// Lane operations of a piece of work that is worth a thread.
constexpr int64_t kPieceOperations = int64_t{1} << 21;

AdditiveKernel additive_for(int isa, int v) {
    switch (isa) {
#if defined(OCTAVO_X86)
        case OCTAVO_ISA_VBMI:
        case OCTAVO_ISA_AVX512: return additive_avx512(v);
        case OCTAVO_ISA_AVX2: return additive_avx2(v);
#endif
        default: return additive_baseline(v);
    }
}

// The power of two that brings the largest finite value to between 1/2 and 1. Distances of all codes grow by the same
// factor, and digits are neither lost nor squared out of the range of floats.
float unit_scale(const float* values, int64_t count) {
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float size = std::fabs(values[i]);
        if (size > largest && std::isfinite(size)) largest = size;
    }
    int exponent = 0;
    std::frexp(largest, &exponent);
    return std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
}

// Floats in pieces that each start a cache line.
class Floats {
   public:
    explicit Floats(int64_t count) : raw_(new float[static_cast<size_t>(count + kBlock)]) {
        void* at = raw_.get();
        size_t space = static_cast<size_t>(count + kBlock) * sizeof(float);
        const size_t wanted = static_cast<size_t>(count) * sizeof(float);
        at_ = static_cast<float*>(std::align(kBlock * sizeof(float), wanted, at, space));
    }
    // The next piece; all but the last are whole blocks.
    float* take(int64_t count) {
        float* taken = at_;
        at_ += count;
        return taken;
    }

   private:
    std::unique_ptr<float[]> raw_;
    float* at_;
};

int64_t padded(int64_t k) { return (k + kBlock - 1) / kBlock * kBlock; }

// parallel_for whose body may run out of memory: an exception must not leave a thread.
template <class Body>
void guarded_for(int64_t n, int64_t operations, int threads, const Body& body) {
    std::atomic<bool> no_memory{false};
    parallel_for(n, std::max(kPieceOperations / operations, int64_t{1}), threads, [&](int64_t first, int64_t last) {
        try {
            body(first, last);
        } catch (const std::bad_alloc&) {
            no_memory = true;
        }
    });
    if (no_memory) throw std::bad_alloc();
}

// Blocks and norms of a book. A centroid that is not finite gets zeros and an infinite norm, which keeps it out.
AdditiveBook pack_book(float* centroids, int64_t k, int v, Floats& memory) {
    AdditiveBook book{k, padded(k), nullptr, nullptr, {}};
    float *blocks = memory.take(book.padded * v), *norms = memory.take(book.padded);
    std::fill_n(blocks, book.padded * v, 0.0f);
    std::fill_n(norms, book.padded, std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < k; ++c) {
        float* from = centroids + c * v;
        if (!std::all_of(from, from + v, [](float x) { return std::fabs(x) <= kMaxElement; })) {
            std::fill_n(from, v, 0.0f);
            continue;
        }
        float norm = 0.0f;
        for (int j = 0; j < v; ++j) {
            blocks[(c / kBlock * v + j) * kBlock + c % kBlock] = from[j];
            norm += from[j] * from[j];
        }
        norms[c] = norm;
    }
    book.blocks = blocks;
    book.norms = norms;
    return book;
}

// Searches a piece of the points, with memory of its own.
void search_piece(const AdditiveSearch& search, int64_t widest, int64_t first, int64_t last) {
    const int64_t room = 4 * search.beam, beam = padded(search.beam) + kBlock;
    const int64_t candidates = padded(room) + widest + kBlock;
    Floats floats(search.stages * kPoints * widest + search.beam * kBlock + candidates + 2 * beam);
    std::vector<int32_t> integers(static_cast<size_t>(candidates + 2 * (search.stages - 1) * beam));
    int32_t* next = integers.data();
    AdditiveScratch scratch{};
    scratch.room = room;
    for (int t = 0; t < search.stages; ++t) scratch.rows[t] = floats.take(kPoints * widest);
    scratch.minima = floats.take(search.beam * kBlock);
    scratch.scores = floats.take(candidates);
    scratch.tags = next;
    next += candidates;
    for (int side = 0; side < 2; ++side) {
        scratch.totals[side] = floats.take(beam);
        for (int t = 0; t < search.stages - 1; ++t, next += beam) scratch.codes[side][t] = next;
    }
    search.kernel.search(search, scratch, first, last);
}

}  // namespace
}  // namespace octavo

extern "C" int octavo_nearest_additive(const float* points, int64_t n, int32_t v, const float* books,
                                       const int64_t* sizes, int32_t stages, const float* root, int32_t beam,
                                       int64_t* out, int32_t threads, int32_t isa) {
    using namespace octavo;
    if (n < 0 || v < 1 || v > kMaxVector || stages < 2 || stages > kMaxStages || threads < 1)
        return OCTAVO_BAD_ARGUMENT;
    if (beam < 1 || beam > kMaxBeam) return OCTAVO_BAD_ARGUMENT;
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    if (isa < OCTAVO_ISA_BASELINE || isa > best_isa()) return OCTAVO_BAD_ARGUMENT;
    int64_t total = 0, needed = 0, operations = 0, widest = 0, sums = 1, most = 1;
    for (int t = 0; t < stages; ++t) {
        if (sizes[t] < 1 || sizes[t] > kMaxAdditiveBook) return OCTAVO_BAD_ARGUMENT;
        total += sizes[t];
        widest = std::max(widest, padded(sizes[t]));
        needed += padded(sizes[t]) * (v + 1);
        for (int s = 0; s < t; ++s) needed += sizes[s] * padded(sizes[t]);
        operations += sizes[t] * (v + t * sums);
        most = sums;
        sums = std::min<int64_t>(beam, sums * sizes[t]);
    }
    try {
        std::vector<int32_t> counting(static_cast<size_t>(widest));
        std::iota(counting.begin(), counting.end(), 0);
        const AdditiveKernel kernel = additive_for(isa, v);
        const float scale = unit_scale(books, total * v);
        // No more sums than `most` are ever kept.
        AdditiveSearch search{kernel, points, nullptr, scale, v, stages, most, counting.data(), {}, out};
        std::vector<float> scaled_root;
        if (root != nullptr) {
            const float root_scale = unit_scale(root, int64_t{v} * v);
            for (int i = 0; i < v * v; ++i) scaled_root.push_back(root[i] * root_scale);
            search.root = scaled_root.data();
        }
        std::vector<float> moved(static_cast<size_t>(total * v));
        kernel.transform(books, total, scale, search.root, moved.data());
        Floats memory(needed);
        float* centroids[kMaxStages] = {moved.data()};
        for (int t = 0; t < stages; ++t) {
            if (t > 0) centroids[t] = centroids[t - 1] + sizes[t - 1] * v;
            AdditiveBook& book = search.books[t] = pack_book(centroids[t], sizes[t], v, memory);
            for (int s = 0; s < t; ++s) {
                float* pairs = memory.take(sizes[s] * book.padded);
                guarded_for(sizes[s], book.padded * v, threads, [&](int64_t first, int64_t last) {
                    kernel.project(centroids[s] + first * v, last - first, 2.0f, book, nullptr,
                                   pairs + first * book.padded);
                });
                book.pairs[s] = pairs;
            }
        }
        guarded_for(n, operations, threads,
                    [&](int64_t first, int64_t last) { search_piece(search, widest, first, last); });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
