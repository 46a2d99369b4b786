// Look-ups one after the other, for processors whose registers hold no table of 256 entries.
//
// Included by translation units with flags of their own, so nothing here has external linkage (see lanes.h).
#pragma once

#include <math.h>

#include "lookup.h"

namespace {

using octavo::kChunk;
using octavo::kRows;
using octavo::kTable;
using octavo::kTiles;
using octavo::LookUp;
using octavo::LookUpStage;

// No row's products of `positions` vectors in a row add up to more, by the inequality of Cauchy and Schwarz.
inline float largest_sum(const octavo::LookUp& m, const float* x, int64_t positions) {
    float centroids = 0.0f, vectors = 0.0f;
    for (int s = 0; s < m.stages; ++s) centroids += m.stage[s].largest;
    for (int64_t p = 0; p < positions; ++p, x += m.v) {
        float squares = 0.0f;
        for (int j = 0; j < m.v; ++j) squares += x[j] * x[j];
        vectors += sqrtf(squares);
    }
    return vectors * centroids;
}

inline void make_table(int v, const LookUpStage& stage, const float* x, float factor, int16_t* table) {
    float products[kTable];
    for (int64_t c = 0; c < stage.entries; ++c) products[c] = 0.0f;
    for (int j = 0; j < v; ++j) {
        const float element = x[j] * factor;
        const float* book = stage.book + j * kTable;
        for (int64_t c = 0; c < stage.entries; ++c) products[c] += element * book[c];
    }
    for (int64_t c = 0; c < stage.entries; ++c) {
        // Every product is far inside the range of int16; NaN, which is not, would be no integer at all.
        const float value = products[c] == products[c] ? products[c] : 0.0f;
        table[c] = static_cast<int16_t>(value + (value < 0.0f ? -0.5f : 0.5f));
    }
}

inline void add_tile(const LookUp& m, int64_t positions, const uint8_t* codes, int64_t step, const int64_t* offsets,
                     const int16_t* tables, float factor, const float* scales, float* sums) {
    int32_t words[kRows] = {};
    uint8_t index[kRows];
    for (int64_t p = 0; p < positions; ++p, codes += step) {
        for (int s = 0; s < m.stages; ++s, tables += kTable) {
            load_codes(codes + offsets[s], m.stage[s].bits, index);
            for (int i = 0; i < kRows; ++i) words[i] += tables[index[i]];
        }
    }
    for (int row = 0; row < kRows; ++row) {
        const float value = static_cast<float>(words[place_of_row(row)]) * factor;
        sums[row] += scales == nullptr ? value : value * scales[row];
    }
}

inline void accumulate(const LookUp& m, const float* x, int64_t columns, int64_t first, int64_t last, uint8_t* scratch,
                       float* sums) {
    const int64_t column_entries = kChunk * m.stages * kTable;
    int16_t* const tables = reinterpret_cast<int16_t*>(scratch);
    for (int64_t c = first; c < last; ++c) {
        const int64_t start = m.chunk_starts[c], positions = m.chunk_starts[c + 1] - start;
        float back[octavo::kColumns];
        for (int64_t column = 0; column < columns; ++column) {
            const float* part = x + column * m.padded_in + start * m.v;
            const float bound = largest_sum(m, part, positions);
            back[column] = bound / octavo::kLargestWord;
            if (!(bound > 0.0f)) continue;
            int16_t* table = tables + column * column_entries;
            for (int64_t p = 0; p < positions; ++p)
                for (int s = 0; s < m.stages; ++s, table += kTable)
                    make_table(m.v, m.stage[s], part + p * m.v, octavo::kLargestWord / bound, table);
        }
        const float* scales = m.blocks > 1 ? m.scales + m.chunk_block[c] * m.rows : nullptr;
        for (int64_t tile = 0; tile < m.tiles; ++tile) {
            const int64_t leader = tile / kTiles * kTiles;
            const int64_t width = m.tiles - leader < kTiles ? m.tiles - leader : kTiles;
            int64_t offsets[octavo::kMaxMatrixStages], before = 0;
            for (int s = 0; s < m.stages; ++s) {
                const int64_t bytes = code_bytes(m.stage[s].bits);
                offsets[s] = before + (tile - leader) * bytes;
                before += width * bytes;
            }
            for (int64_t column = 0; column < columns; ++column) {
                if (back[column] == 0.0f) continue;
                add_tile(m, positions, m.codes + code_offset(m, c, leader), before, offsets,
                         tables + column * column_entries, back[column],
                         scales == nullptr ? nullptr : scales + tile * kRows, sums + column * m.rows + tile * kRows);
            }
        }
    }
}

}  // namespace
