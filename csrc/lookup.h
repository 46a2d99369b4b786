// A quantized matrix as the multiplying kernels read it: codes regrouped for one pass over the memory, books as
// numbers.
//
// A vector of x that meets a codebook gives one product per centroid; every row then only looks its products up:
//     y[r] = scale[r] sum_p sum_s <x_p, book_s[code[r][p][s]]>
// Codes stand in the order in which they are read: chunks of positions, groups of kTiles tiles of kRows rows,
// positions, stages, tiles. A thread takes some chunks, and all rows of them, so it makes just the tables that it uses.
//
// Translation units with flags of their own include this: nothing here has external linkage but declarations (lanes.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include "columns.h"

namespace octavo {

constexpr int kMaxMatrixStages = 4;
constexpr int kRows = 64;    // rows of a tile: one-byte codes in a vector register
constexpr int kTiles = 8;    // tiles of a group: their sums stay in registers
constexpr int kTable = 256;  // entries of a table
constexpr int kChunk = 12;   // most positions whose tables share a scale and stay in the L1 cache
constexpr int kSlack = 64;   // bytes behind the codes that may be read
// Of sixteen-bit products: all of a chunk's of one row must add up to less than 2^15, with what each was rounded by.
constexpr float kLargestWord = 32500.0f;
constexpr int64_t kTableBytes = 2 * kTable;

struct LookUpStage {
    int bits;           // of a stored code: 4, 6 or 8
    int64_t entries;    // of the book
    const float* book;  // [v][kTable]: centroids in columns, zeros behind the last
    float largest;      // norm of the largest centroid
    // Centroids times `unit`, rounded to thirteen bits, for kernels that multiply pairs of integers: [blocks of 64
    // entries][pairs of elements][4][16 entries][2]. Of the 16 entries of number k, four are 4 k and on of every 16 of
    // the block, so that packing puts them in order. A book of at most 16 entries stands there four times.
    const int16_t* integers;
    float unit;
};

struct LookUp {
    int v, stages;
    LookUpStage stage[kMaxMatrixStages];
    int64_t positions;  // vectors of a row
    int64_t padded_in;  // positions * v
    int64_t chunks;
    const int64_t* chunk_starts;  // [chunks + 1]: their first positions, and `positions`
    const int64_t* chunk_block;   // [chunks]: which of a row's scales a chunk has
    int64_t tiles;
    int64_t rows;        // tiles * kRows
    int64_t tile_bytes;  // codes of a tile at one position
    const uint8_t* codes;
    int64_t blocks;       // scales along a row
    const float* scales;  // [blocks][rows]
};

// A matrix and its sums [columns][rows].
struct LookUpSums {
    const LookUp* matrix;
    float* sums;
};

// Adds the products of chunks [first, last) to the sums of `count` matrices, scaled by rows if a row has several
// scales. The matrices have the same books and chunks: tables are made once for all. x [columns][padded_in] is
// transformed; scratch has scratch_bytes() and is aligned to 64 bytes.
using Accumulate = void (*)(const LookUpSums* to, int count, const float* x, int64_t columns, int64_t first,
                            int64_t last, uint8_t* scratch);
void accumulate_baseline(const LookUpSums*, int, const float*, int64_t, int64_t, int64_t, uint8_t*);
void accumulate_avx2(const LookUpSums*, int, const float*, int64_t, int64_t, int64_t, uint8_t*);
void accumulate_vbmi(const LookUpSums*, int, const float*, int64_t, int64_t, int64_t, uint8_t*);

}  // namespace octavo

namespace {

// Bytes of a tile's codes in one stage.
inline int64_t code_bytes(int bits) { return octavo::kRows * bits / 8; }

// Of a row in its tile: the place of its code. Interleaving low and high bytes of products then puts rows in order.
inline int place_of_row(int row) { return (row % 32) / 8 * 16 + row / 32 * 8 + row % 8; }

// Scratch of a thread for the tables of `columns` columns of x.
inline int64_t scratch_bytes(const octavo::LookUp& m, int64_t columns) {
    return columns * octavo::kChunk * m.stages * octavo::kTable * int64_t{sizeof(float)};
}

// Where the codes of a chunk and of the tiles from `tile` on begin; `tile` is a multiple of kTiles.
inline int64_t code_offset(const octavo::LookUp& m, int64_t chunk, int64_t tile) {
    const int64_t first = m.chunk_starts[chunk], count = m.chunk_starts[chunk + 1] - first;
    return (first * m.tiles + count * tile) * m.tile_bytes;
}

// A tile's codes of a stage, one byte each and in their places, to the bits that are stored.
inline void store_codes(const uint8_t* places, int bits, uint8_t* to) {
    if (bits == 8) {
        memcpy(to, places, octavo::kRows);
    } else if (bits == 4) {
        for (int i = 0; i < octavo::kRows / 2; ++i)
            to[i] = static_cast<uint8_t>(places[i] | places[i + octavo::kRows / 2] << 4);
    } else {
        for (int i = 0; i < octavo::kRows / 8; ++i) {
            uint64_t word = 0;
            for (int j = 0; j < 8; ++j) word |= static_cast<uint64_t>(places[8 * i + j]) << (6 * j);
            for (int b = 0; b < 6; ++b) to[6 * i + b] = static_cast<uint8_t>(word >> (8 * b));
        }
    }
}

// The inverse of store_codes.
inline void load_codes(const uint8_t* from, int bits, uint8_t* places) {
    if (bits == 8) {
        memcpy(places, from, octavo::kRows);
    } else if (bits == 4) {
        for (int i = 0; i < octavo::kRows / 2; ++i) {
            places[i] = from[i] & 15;
            places[i + octavo::kRows / 2] = from[i] >> 4;
        }
    } else {
        for (int i = 0; i < octavo::kRows / 8; ++i, from += 6) {
            uint64_t word = 0;
            for (int b = 0; b < 6; ++b) word |= static_cast<uint64_t>(from[b]) << (8 * b);
            for (int j = 0; j < 8; ++j) places[8 * i + j] = static_cast<uint8_t>(word >> (6 * j) & 63);
        }
    }
}

}  // namespace
