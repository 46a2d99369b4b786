// Look-ups one after the other, for processors whose registers hold no table of 256 entries.
//
// Eight rows at a time, each with a sum of its own in a register: two loads per look-up are all that counts.
// Included by translation units with flags of their own, so nothing here has external linkage (see lanes.h).
#pragma once

#include "lookup.h"

namespace {

using octavo::kChunk;
using octavo::kMaxMatrixStages;
using octavo::kRows;
using octavo::kTable;
using octavo::kTiles;
using octavo::LookUp;
using octavo::LookUpStage;

inline void make_table(int v, const LookUpStage& stage, const float* x, float* table) {
    for (int64_t c = 0; c < stage.entries; ++c) table[c] = 0.0f;
    for (int j = 0; j < v; ++j) {
        const float element = x[j];
        const float* book = stage.book + j * kTable;
        for (int64_t c = 0; c < stage.entries; ++c) table[c] += element * book[c];
    }
}

// Sums of eight rows. Named members stay in registers, which elements of arrays do not.
struct Eight {
    float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f, e = 0.0f, f = 0.0f, g = 0.0f, h = 0.0f;

    void add(const float* table, const uint8_t* codes) {
        // One load for eight codes: loads are what a processor has too few of.
        uint64_t all;
        memcpy(&all, codes, sizeof all);
        a += table[all & 255];
        b += table[all >> 8 & 255];
        c += table[all >> 16 & 255];
        d += table[all >> 24 & 255];
        e += table[all >> 32 & 255];
        f += table[all >> 40 & 255];
        g += table[all >> 48 & 255];
        h += table[all >> 56];
    }
    void store(const float* scales, float* sums) const {
        const float all[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; ++i) sums[i] += scales == nullptr ? all[i] : all[i] * scales[i];
    }
};

// Adds a chunk's products of a tile to sums [kRows]; codes[i] are those that belong to table i, in their places.
inline void add_tile(int64_t tables, const uint8_t* const* codes, const float* table, const float* scales,
                     float* sums) {
    for (int place = 0; place < kRows; place += 8) {
        Eight rows;
        for (int64_t i = 0; i < tables; ++i) rows.add(table + i * kTable, codes[i] + place);
        // Eight places in a row are eight rows in a row.
        const int first = place / 16 * 8 + place % 16 * 4;
        rows.store(scales == nullptr ? nullptr : scales + first, sums + first);
    }
}

// Adds a chunk's products of all tiles to sums [columns][rows]; tables [columns][positions][stages][kTable], columns
// `step` entries apart.
inline void add_chunk(const LookUp& m, int64_t c, const float* tables, int64_t step, int64_t columns, float* sums) {
    const int64_t positions = m.chunk_starts[c + 1] - m.chunk_starts[c];
    const float* scales = m.blocks > 1 ? m.scales + m.chunk_block[c] * m.rows : nullptr;
    for (int64_t tile = 0; tile < m.tiles; ++tile) {
        const int64_t leader = tile / kTiles * kTiles;
        const int64_t width = m.tiles - leader < kTiles ? m.tiles - leader : kTiles;
        const uint8_t* from = m.codes + code_offset(m, c, leader);
        const uint8_t* codes[kChunk * kMaxMatrixStages];
        uint8_t places[kChunk * kMaxMatrixStages][kRows];
        for (int64_t i = 0; i < positions * m.stages; ++i) {
            const int bits = m.stage[i % m.stages].bits;
            codes[i] = from + (tile - leader) * code_bytes(bits);
            from += width * code_bytes(bits);
            if (bits == 8) continue;
            load_codes(codes[i], bits, places[i]);
            codes[i] = places[i];
        }
        for (int64_t column = 0; column < columns; ++column)
            add_tile(positions * m.stages, codes, tables + column * step,
                     scales == nullptr ? nullptr : scales + tile * kRows, sums + column * m.rows + tile * kRows);
    }
}

inline void accumulate(const octavo::LookUpSums* to, int count, const float* x, int64_t columns, int64_t first,
                       int64_t last, uint8_t* scratch) {
    const LookUp& m = *to->matrix;
    const int64_t step = kChunk * m.stages * kTable;
    float* const tables = reinterpret_cast<float*>(scratch);
    for (int64_t c = first; c < last; ++c) {
        const int64_t start = m.chunk_starts[c], positions = m.chunk_starts[c + 1] - start;
        for (int64_t column = 0; column < columns; ++column) {
            const float* part = x + column * m.padded_in + start * m.v;
            float* table = tables + column * step;
            for (int64_t p = 0; p < positions; ++p)
                for (int s = 0; s < m.stages; ++s, table += kTable) make_table(m.v, m.stage[s], part + p * m.v, table);
        }
        for (int i = 0; i < count; ++i) add_chunk(*to[i].matrix, c, tables, step, columns, to[i].sums);
    }
}

}  // namespace
