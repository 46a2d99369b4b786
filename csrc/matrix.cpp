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

// `width` bits from bit `at` on.
inline uint64_t read_bits(const uint32_t* words, int64_t at, int width) {
    const int64_t word = at >> 5;
    const int shift = static_cast<int>(at & 31);
    uint64_t value = words[word] >> shift;
    if (shift + width > 32) value |= static_cast<uint64_t>(words[word + 1]) << (32 - shift);
    return value & ((uint64_t{1} << width) - 1);
}

// Puts the codes of a tile, which stand row by row in a file, in their places. `bits` are the file's.
void regroup(Matrix& m, const uint32_t* indices, const int32_t* bits, int64_t tile) {
    const LookUp& l = m.look_up;
    int code_bits = 0;
    for (int s = 0; s < l.stages; ++s) code_bits += bits[s];
    const int64_t words = (l.positions * code_bits + 31) / 32;
    const int64_t leader = tile / kTiles * kTiles, width = std::min<int64_t>(l.tiles - leader, kTiles);
    uint8_t places[kMaxMatrixStages][kRows] = {};
    for (int64_t c = 0; c < l.chunks; ++c) {
        uint8_t* to = m.codes.get() + code_offset(l, c, leader);
        for (int64_t p = l.chunk_starts[c]; p < l.chunk_starts[c + 1]; ++p) {
            for (int row = 0; row < kRows && tile * kRows + row < m.out; ++row) {
                uint64_t code = read_bits(indices + (tile * kRows + row) * words, p * code_bits, code_bits);
                for (int s = 0; s < l.stages; ++s) {
                    places[s][place_of_row(row)] = static_cast<uint8_t>(code & ((1u << bits[s]) - 1));
                    code >>= bits[s];
                }
            }
            for (int s = 0; s < l.stages; ++s) {
                const int64_t bytes = code_bytes(l.stage[s].bits);
                store_codes(places[s], l.stage[s].bits, to + (tile - leader) * bytes);
                to += width * bytes;
            }
        }
    }
}

// Cuts the positions into chunks of about equal length, none of which crosses from one scale to the next; in a row with
// one scale their number is a multiple of eight if it can be, so that threads get equal shares.
void cut(Matrix& m, int64_t scale_positions) {
    LookUp& l = m.look_up;
    for (int64_t block = 0, first = 0; first < l.positions; ++block, first += scale_positions) {
        const int64_t length = std::min(scale_positions, l.positions - first);
        int64_t count = (length + kChunk - 1) / kChunk;
        if (l.blocks == 1) count = std::min(length, (count + 7) / 8 * 8);
        for (int64_t i = 0; i < count; ++i) {
            m.chunk_starts.push_back(first + length * i / count);
            m.chunk_block.push_back(block);
        }
    }
    l.chunks = static_cast<int64_t>(m.chunk_starts.size());
    m.chunk_starts.push_back(l.positions);
    l.chunk_starts = m.chunk_starts.data();
    l.chunk_block = m.chunk_block.data();
}

// Centroids [entries][v] in columns.
void load_book(LookUpStage& stage, std::vector<float>& book, const float* centroids, int v) {
    book.assign(static_cast<size_t>(v) * kTable, 0.0f);
    for (int64_t c = 0; c < stage.entries; ++c, centroids += v) {
        double norm = 0.0;
        for (int j = 0; j < v; ++j) {
            book[j * kTable + c] = centroids[j];
            norm += double{centroids[j]} * centroids[j];
        }
        stage.largest = std::max(stage.largest, static_cast<float>(std::sqrt(norm)));
    }
    stage.book = book.data();
}

void decode_rows(const Matrix& m, int64_t first, int64_t last, bool bfloat16, void* to, int threads) {
    const LookUp& l = m.look_up;
    std::vector<float> books[kMaxMatrixStages];
    const float* centroids[kMaxMatrixStages] = {};
    for (int s = 0; s < l.stages; ++s) {
        for (int64_t c = 0; c < kTable; ++c)
            for (int j = 0; j < l.v; ++j) books[s].push_back(l.stage[s].book[j * kTable + c]);
        centroids[s] = books[s].data();
    }
    const Ops& ops = ops_for(best_isa());
    const int64_t size = bfloat16 ? 2 : 4;
    parallel_for((last - first + kRows - 1) / kRows, 1, threads, [&](int64_t from, int64_t until) {
        for (int64_t t = from; t < until; ++t) {
            const int64_t tile = first / kRows + t, rows = std::min<int64_t>(kRows, last - tile * kRows);
            ops.decode(l, m.in, centroids, tile, rows, bfloat16, static_cast<uint8_t*>(to) + t * kRows * m.in * size);
        }
    });
}

// FNV-1a over all that decides what a matrix makes of its inputs.
uint64_t fingerprint(const Matrix& m) {
    uint64_t hash = 14695981039346656037u;
    const auto add = [&hash](uint64_t value) { hash = (hash ^ value) * 1099511628211u; };
    add(static_cast<uint64_t>(m.in));
    add(static_cast<uint64_t>(m.look_up.padded_in));
    add(static_cast<uint64_t>(m.transform));
    for (const float sign : m.signs) add(sign < 0.0f);
    return hash;
}

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

Accumulate accumulate_for(int isa) {
    switch (isa) {
#if defined(OCTAVO_X86)
        case OCTAVO_ISA_VBMI: return accumulate_vbmi;
        case OCTAVO_ISA_AVX512:
        case OCTAVO_ISA_AVX2: return accumulate_avx2;
#endif
        default: return accumulate_baseline;
    }
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

void transform(const Matrix& m, const float* x, float* to) {
    if (m.transform == 0) {
        std::memcpy(to, x, static_cast<size_t>(m.in) * sizeof *x);
    } else {
        ops_for(best_isa()).transform(x, m.signs.data(), m.in, m.transform, to);
    }
}

Workspace::Workspace(int threads, int64_t columns, int64_t padded_in, int64_t rows, int64_t scratch)
    : x_bytes_(whole_lines(columns * padded_in * int64_t{sizeof(float)})),
      sums_bytes_(whole_lines(columns * rows * int64_t{sizeof(float)})),
      scratch_bytes_(whole_lines(scratch)),
      memory_(aligned_bytes(threads * (x_bytes_ + sums_bytes_ + scratch_bytes_))) {}

void start_product(const Matrix& m, const float* x, int64_t columns, const float* moved, int rank, const Team& team,
                   Workspace& space, Accumulate accumulate) {
    const LookUp& l = m.look_up;
    if (moved == nullptr) {
        float* to = space.x(rank);
        for (int64_t c = 0; c < columns; ++c) {
            transform(m, x + c * m.in, to + c * l.padded_in);
            std::fill(to + c * l.padded_in + m.in, to + (c + 1) * l.padded_in, 0.0f);
        }
        moved = to;
    }
    float* const sums = space.sums(rank);
    std::fill(sums, sums + columns * l.rows, 0.0f);
    int64_t first, last;
    team.share(l.chunks, 1, rank, &first, &last);
    if (first < last) accumulate(l, moved, columns, first, last, space.scratch(rank), sums);
}

void finish_product(const Matrix& m, int64_t columns, int64_t first, int64_t last, const Team& team, Workspace& space,
                    float* y) {
    const LookUp& l = m.look_up;
    for (int64_t c = 0; c < columns; ++c) {
        float* to = y + c * m.out;
        std::copy(space.sums(0) + c * l.rows + first, space.sums(0) + c * l.rows + last, to + first);
        for (int rank = 1; rank < team.size(); ++rank) {
            const float* sums = space.sums(rank) + c * l.rows;
            for (int64_t r = first; r < last; ++r) to[r] += sums[r];
        }
        if (l.blocks == 1)
            for (int64_t r = first; r < last; ++r) to[r] *= l.scales[r];
        if (!m.bias.empty())
            for (int64_t r = first; r < last; ++r) to[r] += m.bias[r];
    }
}

}  // namespace octavo

using octavo::Matrix;

extern "C" {

int octavo_matrix_create(int64_t out, int64_t in, int32_t v, int32_t stages, const int32_t* bits, const float* books,
                         const uint32_t* indices, int64_t scale_columns, const float* scales, int64_t transform,
                         const uint32_t* signs, const float* bias, int32_t threads, void** matrix) {
    using namespace octavo;
    *matrix = nullptr;
    if (out < 1 || in < 1 || (v != 1 && v != 2 && v != 4 && v != 8)) return OCTAVO_BAD_ARGUMENT;
    if (stages < 1 || stages > kMaxMatrixStages || scale_columns < 1 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    if (scale_columns < in && scale_columns % v != 0) return OCTAVO_BAD_ARGUMENT;
    if (transform != 0 && (transform < 2 || (transform & (transform - 1)) != 0 || in % transform != 0))
        return OCTAVO_BAD_ARGUMENT;
    int code_bits = 0;
    for (int s = 0; s < stages; code_bits += bits[s++])
        if (bits[s] < 1 || bits[s] > 8) return OCTAVO_BAD_ARGUMENT;
    try {
        std::unique_ptr<Matrix> made(new Matrix);
        Matrix& m = *made;
        LookUp& l = m.look_up;
        m.out = out;
        m.in = in;
        l.v = v;
        l.stages = stages;
        l.positions = (in + v - 1) / v;
        l.padded_in = l.positions * v;
        l.tiles = (out + kRows - 1) / kRows;
        l.rows = l.tiles * kRows;
        for (int s = 0; s < stages; ++s) {
            LookUpStage& stage = l.stage[s];
            stage.entries = int64_t{1} << bits[s];
            stage.bits = bits[s] <= 4 ? 4 : bits[s] <= 6 ? 6 : 8;
            l.tile_bytes += code_bytes(stage.bits);
            load_book(stage, m.books[s], books, v);
            books += stage.entries * v;
        }
        l.blocks = (in + scale_columns - 1) / scale_columns;
        m.scales.assign(static_cast<size_t>(l.blocks * l.rows), 0.0f);
        for (int64_t r = 0; r < out; ++r)
            for (int64_t b = 0; b < l.blocks; ++b) m.scales[b * l.rows + r] = scales[r * l.blocks + b];
        l.scales = m.scales.data();
        if (bias != nullptr) m.bias.assign(bias, bias + out);
        m.transform = transform;
        if (transform != 0) {
            const float factor = 1.0f / std::sqrt(static_cast<float>(transform));
            for (int64_t i = 0; i < in; ++i) m.signs.push_back((signs[i >> 5] >> (i & 31) & 1) != 0 ? -factor : factor);
        }
        m.input = fingerprint(m);
        cut(m, l.blocks == 1 ? l.positions : scale_columns / v);
        m.code_count = l.positions * l.tiles * l.tile_bytes;
        m.codes = aligned_bytes(m.code_count + kSlack);
        l.codes = m.codes.get();
        parallel_for(l.tiles, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t tile = first; tile < last; ++tile) regroup(m, indices, bits, tile);
        });
        std::memset(m.codes.get() + m.code_count, 0, kSlack);
        *matrix = made.release();
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

void octavo_matrix_destroy(void* matrix) { delete static_cast<Matrix*>(matrix); }

int octavo_matrix_multiply(const void* matrix, const float* x, int64_t n, float* y, int32_t threads, int32_t isa) {
    using namespace octavo;
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    const LookUp& l = m.look_up;
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    if (isa < OCTAVO_ISA_BASELINE || isa > best_isa() || n < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    if (n == 0) return OCTAVO_OK;
    try {
        const int64_t most = std::min<int64_t>(n, kColumns);
        const int64_t worth = std::max<int64_t>(m.code_count * most / kWorthAThread, 1);
        const int wanted = static_cast<int>(std::min<int64_t>({threads, worth, l.chunks}));
        Workspace space(wanted, most, l.padded_in, l.rows, scratch_bytes(l, most));
        const Accumulate accumulate = accumulate_for(isa);
        Team::run(wanted, [&](int rank, Team& team) {
            for (int64_t at = 0; at < n; at += most) {
                const int64_t columns = std::min(most, n - at);
                start_product(m, x + at * m.in, columns, nullptr, rank, team, space, accumulate);
                team.barrier();
                int64_t first, last;
                team.share(m.out, 16, rank, &first, &last);
                finish_product(m, columns, first, last, team, space, y + at * m.out);
                // From here on the sums may be overwritten.
                team.barrier();
            }
        });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

int octavo_matrix_decode(const void* matrix, int64_t first, int64_t last, int32_t bfloat16, void* weights,
                         int32_t threads) {
    using namespace octavo;
    const Matrix& m = *static_cast<const Matrix*>(matrix);
    if (first < 0 || first % kRows != 0 || last > m.out || last < first || threads < 1) return OCTAVO_BAD_ARGUMENT;
    try {
        decode_rows(m, first, last, bfloat16 != 0, weights, threads);
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
        for (int64_t i = first; i < last; ++i) transform(m, x + i * m.in, y + i * m.in);
    });
    return OCTAVO_OK;
}
}
