// Nearest centroid: prepares the book, picks the kernel of the widest instruction set, splits the points over threads.
#include "nearest.h"

#include <algorithm>
#include <memory>
#include <new>

#include "cpu.h"
#include "octavo_c.h"
#include "parallel.h"

namespace octavo {
namespace {

// Lane operations of a piece of work that is worth a thread (about 0.1 ms; a thread costs about 0.02 ms to start).
constexpr int64_t kPieceOperations = int64_t{1} << 23;
constexpr int64_t kPieceMultiple = 64;  // no block of points straddles two pieces, whatever the instruction set

// Floats of scratch that small books find on the stack instead of the heap.
constexpr int64_t kStackFloats = 2048;

// A book far from the origin for its size loses digits in |c|^2 / 2 - x.c. Distances do not change when points and
// centroids move together, so such a book is moved to the origin. Others stay: their ties then stay exact.
bool far_from_origin(const float* book, int64_t k, int v, float* mean) {
    double offset = 0.0, spread = 0.0;
    for (int j = 0; j < v; ++j) {
        double sum = 0.0, squares = 0.0;
        for (int64_t c = 0; c < k; ++c) {
            const double x = book[c * v + j];
            sum += x;
            squares += x * x;
        }
        const double m = sum / static_cast<double>(k);
        mean[j] = static_cast<float>(m);
        offset += m * m;
        spread += squares / static_cast<double>(k) - m * m;
    }
    return offset > 16.0 * spread && offset <= 1e30;
}

}  // namespace

Kernel nearest_kernel(int isa, int v) {
    switch (isa) {
#if defined(OCTAVO_X86)
        case OCTAVO_ISA_VBMI:
        case OCTAVO_ISA_AVX512: return nearest_avx512(v);
        case OCTAVO_ISA_AVX2: return nearest_avx2(v);
#endif
        default: return nearest_baseline(v);
    }
}

void prepare(Search& s, int v, float* scratch) {
    float* norms = scratch;
    float mean[kMaxVector];
    if (far_from_origin(s.book, s.k, v, mean)) {
        float* moved = scratch + s.k;
        for (int64_t c = 0; c < s.k; ++c)
            for (int j = 0; j < v; ++j) moved[c * v + j] = s.book[c * v + j] - mean[j];
        std::copy(mean, mean + v, s.shift);
        s.book = moved;
    }
    for (int64_t c = 0; c < s.k; ++c) {
        float norm = 0.0f;
        for (int j = 0; j < v; ++j) norm += s.book[c * v + j] * s.book[c * v + j];
        norms[c] = 0.5f * norm;
    }
    s.half_norms = norms;
}

}  // namespace octavo

extern "C" int octavo_nearest(const float* points, const float* weights, int64_t n, const float* book, int64_t k,
                              int32_t v, int64_t* out, int32_t threads, int32_t isa) {
    using namespace octavo;
    if (n < 0 || k < 1 || k > INT32_MAX || v < 1 || v > kMaxVector || threads < 1) return OCTAVO_BAD_ARGUMENT;
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    if (isa < OCTAVO_ISA_BASELINE || isa > best_isa()) return OCTAVO_BAD_ARGUMENT;
    try {
        Search search{points, weights, book, nullptr, k, out, {}};
        float stack[kStackFloats];
        std::unique_ptr<float[]> heap;
        if (weights == nullptr && v > kDirectVector) {
            const int64_t needed = prepare_floats(k, v);
            if (needed > kStackFloats) heap.reset(new float[static_cast<size_t>(needed)]);
            prepare(search, v, heap ? heap.get() : stack);
        }
        const Kernel kernel = nearest_kernel(isa, v);
        const int64_t per_point = k * (v * (weights != nullptr ? 2 : 1) + 3);
        const int64_t grain = std::max(kPieceOperations / per_point / kPieceMultiple, int64_t{1}) * kPieceMultiple;
        parallel_for(n, grain, threads, [&](int64_t first, int64_t last) { kernel(search, first, last); });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
