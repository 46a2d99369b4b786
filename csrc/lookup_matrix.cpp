// The matrix whose products with centroids are looked up; see lookup.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "cpu.h"
#include "lookup.h"
#include "matrix.h"
#include "octavo_c.h"
#include "ops.h"
#include "parallel.h"
#include "prompt_matrix.h"

namespace octavo {
namespace {

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

class LookUpMatrix : public Matrix {
  public:
    LookUp look_up = {};
    std::vector<float> books[kMaxMatrixStages];
    std::vector<int16_t> integers[kMaxMatrixStages];
    PromptBook prompt_book;
    std::vector<int64_t> chunk_starts, chunk_block;
    int bits[kMaxMatrixStages] = {};  // of the codes as they were passed
    Bytes codes;
    std::vector<float> scales;  // [blocks][rows]

    int64_t x_floats() const override { return look_up.padded_in; }
    int64_t sums_floats() const override { return look_up.rows; }
    int64_t scratch_bytes(int64_t columns) const override { return ::scratch_bytes(look_up, columns); }
    int64_t most_threads() const override { return look_up.chunks; }
    int64_t code_bytes() const override { return look_up.positions * look_up.tiles * look_up.tile_bytes; }

    void prepare(const float* x, float* to) const override {
        rotate(x, to);
        std::fill(to + in, to + look_up.padded_in, 0.0f);
    }

    void start(const Product* products, int count, int64_t columns, int rank, const Team& team,
               int isa) const override {
        LookUpSums to[kTogether];
        for (int i = 0; i < count; ++i) {
            const LookUp& other = static_cast<const LookUpMatrix*>(products[i].matrix)->look_up;
            to[i] = {&other, products[i].space->sums(rank)};
            std::fill(to[i].sums, to[i].sums + columns * other.rows, 0.0f);
        }
        int64_t first, last;
        team.share(look_up.chunks, 1, rank, &first, &last);
        if (first >= last) return;
        accumulate_for(isa)(to, count, products->prepared, columns, first, last, products->space->scratch(rank));
    }

    void finish(const float*, int64_t columns, int rank, const Team& team, Workspace& space, int,
                float* y) const override {
        int64_t first, last;
        team.share(out, 16, rank, &first, &last);
        for (int64_t c = 0; c < columns; ++c) {
            float* to = y + c * out;
            const float* sums = space.sums(0) + c * look_up.rows;
            std::copy(sums + first, sums + last, to + first);
            for (int other = 1; other < team.size(); ++other) {
                sums = space.sums(other) + c * look_up.rows;
                for (int64_t r = first; r < last; ++r) to[r] += sums[r];
            }
            if (look_up.blocks == 1)
                for (int64_t r = first; r < last; ++r) to[r] *= scales[r];
            if (!bias.empty())
                for (int64_t r = first; r < last; ++r) to[r] += bias[r];
        }
    }

    bool has_many() const override {
        return best_isa() >= OCTAVO_ISA_VBMI && (look_up.v == 4 || look_up.v == 8) && look_up.blocks == 1;
    }
    void many(const float* x, int64_t n, int threads, float* y) const override {
        multiply_many(*this, look_up, prompt_book.view, x, n, threads, y);
    }

    bool has_rows() const override { return true; }
    void row(int64_t r, float* to) const override;
    bool has_row_products() const override { return look_up.blocks == 1; }
    void row_products(const uint32_t* indices, const int64_t* which, int64_t n, const float* x, int threads,
                      float* y) const override;

    void decode(int64_t first, int64_t last, bool bfloat16, void* to, int threads) const override {
        const LookUp& l = look_up;
        std::vector<float> by_entry[kMaxMatrixStages];
        const float* centroids[kMaxMatrixStages] = {};
        for (int s = 0; s < l.stages; ++s) {
            for (int64_t c = 0; c < kTable; ++c)
                for (int j = 0; j < l.v; ++j) by_entry[s].push_back(l.stage[s].book[j * kTable + c]);
            centroids[s] = by_entry[s].data();
        }
        const Ops& ops = ops_for(best_isa());
        const int64_t size = bfloat16 ? 2 : 4;
        parallel_for((last - first + kRows - 1) / kRows, 1, threads, [&](int64_t from, int64_t until) {
            for (int64_t t = from; t < until; ++t) {
                const int64_t tile = first / kRows + t, rows = std::min<int64_t>(kRows, last - tile * kRows);
                ops.decode(l, in, centroids, tile, rows, bfloat16, static_cast<uint8_t*>(to) + t * kRows * in * size);
            }
        });
    }
};

void LookUpMatrix::row(int64_t r, float* to) const {
    const LookUp& l = look_up;
    const int64_t tile = r / kRows, leader = tile / kTiles * kTiles,
                  width = std::min(l.tiles - leader, int64_t{kTiles});
    const int place = place_of_row(static_cast<int>(r % kRows));
    std::fill(to, to + in, 0.0f);
    for (int64_t c = 0; c < l.chunks; ++c) {
        const uint8_t* from = l.codes + code_offset(l, c, leader);
        const float scale = l.scales[l.chunk_block[c] * l.rows + r];
        for (int64_t p = l.chunk_starts[c]; p < l.chunk_starts[c + 1]; ++p) {
            for (int s = 0; s < l.stages; ++s) {
                const int64_t bytes = ::code_bytes(l.stage[s].bits);
                uint8_t places[kRows];
                load_codes(from + (tile - leader) * bytes, l.stage[s].bits, places);
                from += width * bytes;
                for (int64_t j = 0; j < l.v && p * l.v + j < in; ++j)
                    to[p * l.v + j] += scale * l.stage[s].book[j * kTable + places[place]];
            }
        }
    }
    if (transform == 0) return;
    // x H diag(signs) = signs * (H diag(signs) (signs * x)), H being symmetric; its factor is part of the signs.
    for (int64_t i = 0; i < in; ++i) to[i] = signs[i] < 0.0f ? -to[i] : to[i];
    ops_for(best_isa()).transform(to, signs.data(), in, transform, to);
    for (int64_t i = 0; i < in; ++i) to[i] = signs[i] < 0.0f ? -to[i] : to[i];
}

void LookUpMatrix::row_products(const uint32_t* indices, const int64_t* which, int64_t n, const float* x, int threads,
                                float* y) const {
    const LookUp& l = look_up;
    std::vector<float> prepared(static_cast<size_t>(l.padded_in));
    prepare(x, prepared.data());
    // [positions][stages][kTable]: what a code of a stage adds.
    std::vector<float> tables(static_cast<size_t>(l.positions * l.stages * kTable), 0.0f);
    parallel_for(l.positions, 32, threads, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) {
            for (int s = 0; s < l.stages; ++s) {
                float* table = tables.data() + (p * l.stages + s) * kTable;
                for (int j = 0; j < l.v; ++j) {
                    const float element = prepared[p * l.v + j];
                    const float* book = l.stage[s].book + j * kTable;
                    for (int64_t c = 0; c < l.stage[s].entries; ++c) table[c] += element * book[c];
                }
            }
        }
    });
    int code_bits = 0;
    for (int s = 0; s < l.stages; ++s) code_bits += bits[s];
    const int64_t words = (l.positions * code_bits + 31) / 32;
    parallel_for(n, 64, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const uint32_t* row = indices + which[i] * words;
            const float* table = tables.data();
            float sum = 0.0f;
            for (int64_t p = 0; p < l.positions; ++p) {
                uint64_t code = read_bits(row, p * code_bits, code_bits);
                for (int s = 0; s < l.stages; ++s, table += kTable) {
                    sum += table[code & ((1u << bits[s]) - 1)];
                    code >>= bits[s];
                }
            }
            y[i] = sum * scales[which[i]];
        }
    });
}

// Puts the codes of a tile, which stand row by row in a file, in their places. `bits` are the file's.
void regroup(LookUpMatrix& m, const uint32_t* indices, const int32_t* bits, int64_t tile) {
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
                const int64_t bytes = ::code_bytes(l.stage[s].bits);
                store_codes(places[s], l.stage[s].bits, to + (tile - leader) * bytes);
                to += width * bytes;
            }
        }
    }
}

// Cuts the positions into chunks of about equal length, none of which crosses from one scale to the next; in a row with
// one scale their number is a multiple of eight if it can be, so that threads get equal shares.
void cut(LookUpMatrix& m, int64_t scale_positions) {
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

// The same centroids as LookUpStage::integers. Numbers of eight bits stay exact, and x has digits left.
void load_integers(int v, LookUpStage& stage, std::vector<int16_t>& integers) {
    float largest = 0.0f;
    for (const float* at = stage.book; at < stage.book + v * kTable; ++at) largest = std::max(largest, std::abs(*at));
    stage.unit = largest > 0.0f ? 127.0f * 32.0f / largest : 1.0f;
    const int64_t blocks = stage.bits == 8 ? kTable / 64 : 1;
    for (int64_t block = 0; block < blocks; ++block) {
        for (int pair = 0; pair < (v + 1) / 2; ++pair) {
            for (int i = 0; i < 64; ++i) {
                const int number = i / 16, part = i % 16 / 4;
                int64_t entry = block * 64 + part * 16 + number * 4 + i % 4;
                if (stage.bits == 4) entry %= 16;
                for (int j = 2 * pair; j < 2 * pair + 2; ++j) {
                    const float value = j < v ? stage.book[j * kTable + entry] * stage.unit : 0.0f;
                    integers.push_back(static_cast<int16_t>(std::lrint(value)));
                }
            }
        }
    }
    stage.integers = integers.data();
}

// Of a tile's rows, before their scales; rows of a matrix are alike.
float largest_weight(const LookUpMatrix& m) {
    const int64_t rows = std::min<int64_t>(m.out, kRows);
    std::vector<float> weights(static_cast<size_t>(rows * m.in));
    m.decode(0, rows, false, weights.data(), 1);
    float largest = 0.0f;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < m.in && m.scales[r] != 0.0f; ++i)
            largest = std::max(largest, std::abs(weights[r * m.in + i] / m.scales[r]));
    return largest;
}

// FNV-1a over all that decides what a matrix makes of its inputs, and what its tables are.
void take_fingerprints(LookUpMatrix& m) {
    uint64_t hash = 14695981039346656037u;
    const auto add = [&hash](int64_t value) { hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211u; };
    add(m.in);
    add(m.look_up.padded_in);
    add(m.transform);
    for (const float sign : m.signs) add(sign < 0.0f);
    m.input = hash;
    for (int s = 0; s < m.look_up.stages; ++s) {
        add(m.look_up.stage[s].bits);
        for (const float number : m.books[s]) {
            uint32_t bits;
            std::memcpy(&bits, &number, sizeof bits);
            add(bits);
        }
    }
    for (const int64_t start : m.chunk_starts) add(start);
    m.tables = hash;
}

}  // namespace
}  // namespace octavo

extern "C" int octavo_lookup_create(int64_t out, int64_t in, int32_t v, int32_t stages, const int32_t* bits,
                                    const float* books, const uint32_t* indices, int64_t scale_columns,
                                    const float* scales, int64_t transform, const uint32_t* signs, const float* bias,
                                    int32_t threads, void** matrix) {
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
        std::unique_ptr<LookUpMatrix> made(new LookUpMatrix);
        LookUpMatrix& m = *made;
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
            m.bits[s] = bits[s];
            stage.entries = int64_t{1} << bits[s];
            stage.bits = bits[s] <= 4 ? 4 : bits[s] <= 6 ? 6 : 8;
            l.tile_bytes += code_bytes(stage.bits);
            load_book(stage, m.books[s], books, v);
            load_integers(v, stage, m.integers[s]);
            books += stage.entries * v;
        }
        l.blocks = (in + scale_columns - 1) / scale_columns;
        m.scales.assign(static_cast<size_t>(l.blocks * l.rows), 0.0f);
        for (int64_t r = 0; r < out; ++r)
            for (int64_t b = 0; b < l.blocks; ++b) m.scales[b * l.rows + r] = scales[r * l.blocks + b];
        l.scales = m.scales.data();
        if (bias != nullptr) m.bias.assign(bias, bias + out);
        m.set_transform(transform, signs);
        cut(m, l.blocks == 1 ? l.positions : scale_columns / v);
        take_fingerprints(m);
        m.codes = aligned_bytes(m.code_bytes() + kSlack);
        l.codes = m.codes.get();
        parallel_for(l.tiles, 1, threads, [&](int64_t first, int64_t last) {
            for (int64_t tile = first; tile < last; ++tile) regroup(m, indices, bits, tile);
        });
        std::memset(m.codes.get() + m.code_bytes(), 0, kSlack);
        if (m.has_many()) m.prompt_book.load(l, largest_weight(m));
        *matrix = static_cast<Matrix*>(made.release());
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
