#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "cpu.h"
#include "octavo_c.h"
#include "ops.h"
#include "parallel.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace octavo {
namespace {

constexpr int64_t kHugePage = 2 << 20;
// Starting another thread is not worth it for fewer bytes of codes.
constexpr int64_t kWorthAThread = 1 << 16;

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

Bytes aligned_bytes(int64_t count) {
    const int64_t grain = count >= 4 * kHugePage ? kHugePage : 64;
    const int64_t rounded = (count + grain - 1) / grain * grain;
    void* found = std::aligned_alloc(static_cast<size_t>(grain), static_cast<size_t>(rounded));
    if (found == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (grain == kHugePage) madvise(found, static_cast<size_t>(rounded), MADV_HUGEPAGE);
#endif
    return Bytes(static_cast<uint8_t*>(found));
}

const Ops& ops_for(int isa) {
    switch (isa) {
#if defined(OCTAVO_X86)
        case OCTAVO_ISA_VBMI:
        case OCTAVO_ISA_AVX512: return ops_avx512();
        case OCTAVO_ISA_AVX2: return ops_avx2();
#endif
        default: return ops_baseline();
    }
}

void Matrix::rotate(const float* x, float* to) const {
    if (transform == 0) {
        std::memcpy(to, x, static_cast<size_t>(in) * sizeof *x);
    } else {
        ops_for(best_isa()).transform(x, signs.data(), in, transform, to);
    }
}

void Matrix::set_transform(int64_t block, const uint32_t* sign_bits) {
    transform = block;
    if (block == 0) return;
    const float factor = 1.0f / std::sqrt(static_cast<float>(block));
    for (int64_t i = 0; i < in; ++i) signs.push_back((sign_bits[i >> 5] >> (i & 31) & 1) != 0 ? -factor : factor);
}

void start_all(Product* products, int count, const float* x, int64_t columns, int rank, const Team& team, int isa) {
    for (int i = 0; i < count; ++i) {
        const Matrix& m = *products[i].matrix;
        int same = 0;
        while (same < i && (m.input == 0 || products[same].matrix->input != m.input)) ++same;
        float* const own = products[i].space->x(rank);
        products[i].prepared = same < i ? products[same].prepared : own;
        for (int64_t c = 0; same == i && c < columns; ++c) m.prepare(x + c * m.in, own + c * m.x_floats());
    }
    bool started[kTogether] = {};
    for (int i = 0; i < count; ++i) {
        if (started[i]) continue;
        Product together[kTogether] = {products[i]};
        int number = 1;
        for (int j = i + 1; j < count; ++j) {
            const uint64_t tables = products[i].matrix->tables;
            if (tables == 0 || products[j].matrix->tables != tables) continue;
            together[number++] = products[j];
            started[j] = true;
        }
        products[i].matrix->start(together, number, columns, rank, team, isa);
    }
}

Workspace::Workspace(int threads, int64_t x_floats, int64_t sums_floats, int64_t scratch_bytes)
    : x_bytes_(whole_lines(x_floats * int64_t{sizeof(float)})),
      sums_bytes_(whole_lines(sums_floats * int64_t{sizeof(float)})),
      scratch_bytes_(whole_lines(scratch_bytes)),
      memory_(aligned_bytes(threads * (x_bytes_ + sums_bytes_ + scratch_bytes_))) {}

}  // namespace octavo

using octavo::Matrix;

extern "C" {

void octavo_matrix_destroy(void* matrix) { delete static_cast<Matrix*>(matrix); }

int octavo_matrix_multiply(const void* matrix, const float* x, int64_t n, float* y, int32_t threads, int32_t isa) {
    using namespace octavo;
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    if (isa < OCTAVO_ISA_BASELINE || isa > best_isa() || n < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    if (n == 0) return OCTAVO_OK;
    try {
        const int64_t most = std::min<int64_t>(n, kColumns);
        const int64_t worth = std::max<int64_t>(m.code_bytes() * most / kWorthAThread, 1);
        const int wanted = static_cast<int>(std::min<int64_t>({threads, worth, m.most_threads()}));
        Workspace space(wanted, most * m.x_floats(), most * m.sums_floats(), m.scratch_bytes(most));
        Team::run(wanted, [&](int rank, Team& team) {
            Product product = {&m, &space, nullptr};
            for (int64_t at = 0; at < n; at += most) {
                const int64_t columns = std::min(most, n - at);
                start_all(&product, 1, x + at * m.in, columns, rank, team, isa);
                team.barrier();
                m.finish(product.prepared, columns, rank, team, space, isa, y + at * m.out);
                team.barrier();
            }
        });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

int octavo_matrix_has_many(const void* matrix) { return static_cast<const Matrix*>(matrix)->has_many() ? 1 : 0; }

int octavo_matrix_many(const void* matrix, const float* x, int64_t n, float* y, int32_t threads) {
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (!m.has_many() || n < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    try {
        if (n > 0) m.many(x, n, threads, y);
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

int octavo_matrix_rows(const void* matrix, const uint32_t* indices, const int64_t* rows, int64_t n, const float* x,
                       float* y, int32_t threads) {
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (!m.has_row_products() || n < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    for (int64_t i = 0; i < n; ++i)
        if (rows[i] < 0 || rows[i] >= m.out) return OCTAVO_OUT_OF_RANGE;
    try {
        m.row_products(indices, rows, n, x, threads, y);
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

int octavo_matrix_decode(const void* matrix, int64_t first, int64_t last, int32_t bfloat16, void* weights,
                         int32_t threads) {
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (first < 0 || first % OCTAVO_ROWS != 0 || last > m.out || last < first || threads < 1)
        return OCTAVO_BAD_ARGUMENT;
    try {
        m.decode(first, last, bfloat16 != 0, weights, threads);
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

int octavo_matrix_transform(const void* matrix, const float* x, int64_t n, float* y, int32_t threads) {
    using namespace octavo;
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (n < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    parallel_for(n, std::max<int64_t>((1 << 15) / m.in, 1), threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) m.rotate(x + i * m.in, y + i * m.in);
    });
    return OCTAVO_OK;
}
}
