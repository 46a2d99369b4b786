// Decodes tiles of rows. Included by translation units with flags of their own (see lanes.h).
#pragma once

#include <string.h>

#include "half.h"
#include "lookup.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using octavo::kChunk;
using octavo::kMaxMatrixStages;
using octavo::kRows;
using octavo::kTiles;
using octavo::LookUp;

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX2__)
// Eight numbers at a time.
inline void store_scaled(__m256 sum, float scale, float* to) {
    _mm256_storeu_ps(to, _mm256_mul_ps(sum, _mm256_set1_ps(scale)));
}
inline void store_scaled(__m256 sum, float scale, uint16_t* to) {  // bfloat16, to nearest even
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(sum, _mm256_set1_ps(scale)));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i upper =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#endif

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, uint16_t* to) { *to = to_bfloat16(value); }

// Rows of a tile as numbers to[rows][in]. books are [kTable][V].
template <int V, class T>
void decode_tile(const LookUp& l, int64_t in, const float* const* books, int64_t tile, int64_t rows, T* to) {
    const int64_t leader = tile / kTiles * kTiles, width = lesser(l.tiles - leader, kTiles);
    uint8_t places[kChunk][kMaxMatrixStages][kRows];
    for (int64_t c = 0; c < l.chunks; ++c) {
        const uint8_t* codes = l.codes + code_offset(l, c, leader);
        const float* scales = l.scales + l.chunk_block[c] * l.rows + tile * kRows;
        const int64_t first = l.chunk_starts[c], count = l.chunk_starts[c + 1] - first;
        for (int64_t p = 0; p < count; ++p) {
            for (int s = 0; s < l.stages; ++s) {
                const int64_t bytes = code_bytes(l.stage[s].bits);
                load_codes(codes + (tile - leader) * bytes, l.stage[s].bits, places[p][s]);
                codes += width * bytes;
            }
        }
        // A row's vectors one after the other: rows often lie a power of two apart, where caches keep few of them.
        for (int64_t row = 0; row < rows; ++row) {
            const int place = place_of_row(static_cast<int>(row));
            for (int64_t p = 0; p < count; ++p) {
                const int64_t at = (first + p) * V;
#if defined(__AVX2__)
                if (V == 8 && at + V <= in) {
                    __m256 wide = _mm256_loadu_ps(books[0] + places[p][0][place] * V);
                    for (int s = 1; s < l.stages; ++s)
                        wide = _mm256_add_ps(wide, _mm256_loadu_ps(books[s] + places[p][s][place] * V));
                    store_scaled(wide, scales[row], to + row * in + at);
                    continue;
                }
#endif
                float sum[V];
                memcpy(sum, books[0] + places[p][0][place] * V, sizeof sum);
                for (int s = 1; s < l.stages; ++s) {
                    const float* centroid = books[s] + places[p][s][place] * V;
                    for (int j = 0; j < V; ++j) sum[j] += centroid[j];
                }
                T decoded[V];
                for (int j = 0; j < V; ++j) narrow(sum[j] * scales[row], decoded + j);
                memcpy(to + row * in + at, decoded, lesser(V, in - at) * sizeof(T));
            }
        }
    }
}

template <class T>
void decode_tile(const LookUp& l, int64_t in, const float* const* books, int64_t tile, int64_t rows, T* to) {
    switch (l.v) {
        case 1: return decode_tile<1>(l, in, books, tile, rows, to);
        case 2: return decode_tile<2>(l, in, books, tile, rows, to);
        case 4: return decode_tile<4>(l, in, books, tile, rows, to);
        default: return decode_tile<8>(l, in, books, tile, rows, to);
    }
}

inline void decode(const LookUp& l, int64_t in, const float* const* books, int64_t tile, int64_t rows, bool bfloat16,
                   void* to) {
    if (bfloat16) return decode_tile(l, in, books, tile, rows, static_cast<uint16_t*>(to));
    decode_tile(l, in, books, tile, rows, static_cast<float*>(to));
}

}  // namespace
