// Looks products up in vector registers: AVX-512 VBMI has one instruction that reads 64 bytes from a table of 128.
#include <immintrin.h>

#include "lookup.h"

namespace {

using octavo::kChunk;
using octavo::kRows;
using octavo::kTable;
using octavo::kTableBytes;
using octavo::kTiles;
using octavo::LookUp;
using octavo::LookUpStage;

// How far ahead of their use codes are asked for.
constexpr int kAhead = 4096;

// The bytes of 32 products: low ones to table + c, high ones behind kTable.
inline void store_products(__m512 first, __m512 second, uint8_t* table) {
    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(first))),
                                             _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(second)), 1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(table), _mm512_cvtepi16_epi8(words));
    _mm256_store_si256(reinterpret_cast<__m256i*>(table + kTable), _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
}

// Sixteen-bit products of P vectors with all centroids: kTable low bytes, then kTable high bytes each. Vectors share
// the loads of centroids.
template <int V, int P>
void make_tables(const LookUpStage& stage, const float* x, float factor, uint8_t* table, int64_t step) {
    const float* book = stage.book;
    for (int64_t c = 0; c < stage.entries; c += 32) {
        __m512 first[P], second[P];
        for (int p = 0; p < P; ++p) first[p] = second[p] = _mm512_setzero_ps();
        for (int j = 0; j < V; ++j) {
            const __m512 low = _mm512_loadu_ps(book + j * kTable + c);
            const __m512 high = _mm512_loadu_ps(book + j * kTable + c + 16);
            for (int p = 0; p < P; ++p) {
                const __m512 element = _mm512_set1_ps(x[p * V + j] * factor);
                first[p] = _mm512_fmadd_ps(low, element, first[p]);
                second[p] = _mm512_fmadd_ps(high, element, second[p]);
            }
        }
        for (int p = 0; p < P; ++p) store_products(first[p], second[p], table + p * step + c);
    }
    if (stage.bits == 4) {
        // Four copies, so that a look-up may leave the neighbour's bits in the index.
        for (int plane = 0; plane < 2 * P; ++plane) {
            __m512i* at = reinterpret_cast<__m512i*>(table + plane / 2 * step + plane % 2 * kTable);
            _mm512_store_si512(at, _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<__m128i*>(at))));
        }
    }
}

// The tables of n vectors in a row, `step` bytes apart.
template <int V>
void make_tables(const LookUpStage& stage, const float* x, int64_t n, float factor, uint8_t* table, int64_t step) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) make_tables<V, 4>(stage, x + p * V, factor, table + p * step, step);
    for (; p < n; ++p) make_tables<V, 1>(stage, x + p * V, factor, table + p * step, step);
}

inline void make_tables(int v, const LookUpStage& stage, const float* x, int64_t n, float factor, uint8_t* table,
                        int64_t step) {
    switch (v) {
        case 1: return make_tables<1>(stage, x, n, factor, table, step);
        case 2: return make_tables<2>(stage, x, n, factor, table, step);
        case 4: return make_tables<4>(stage, x, n, factor, table, step);
        default: return make_tables<8>(stage, x, n, factor, table, step);
    }
}

struct Products {
    __m512i low, high;
};

// Tables of 256 entries in registers.
struct Wide {
    __m512i low[4], high[4];
    explicit Wide(const uint8_t* table) {
        for (int i = 0; i < 4; ++i) {
            low[i] = _mm512_load_si512(table + 64 * i);
            high[i] = _mm512_load_si512(table + kTable + 64 * i);
        }
    }
    static __m512i load(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
    Products at(__m512i index) const {
        const __mmask64 upper = _mm512_movepi8_mask(index);
        return {_mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(low[0], index, low[1]),
                                       _mm512_permutex2var_epi8(low[2], index, low[3])),
                _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(high[0], index, high[1]),
                                       _mm512_permutex2var_epi8(high[2], index, high[3]))};
    }
};

// Tables of up to 64 entries; codes of six or of four bits.
template <int Bits>
struct Narrow {
    __m512i low, high;
    explicit Narrow(const uint8_t* table) : low(_mm512_load_si512(table)), high(_mm512_load_si512(table + kTable)) {}
    static __m512i load(const uint8_t* codes) {
        if (Bits == 4) {
            const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
            return _mm512_mask_srli_epi16(both, 0xFFFF0000u, both, 4);
        }
        // Six bytes hold eight codes.
        const __m512i spread =
            _mm512_set_epi8(47, 46, 47, 46, 45, 44, 43, 42, 47, 46, 41, 40, 39, 38, 37, 36, 47, 46, 35, 34, 33, 32, 31,
                            30, 47, 46, 29, 28, 27, 26, 25, 24, 47, 46, 23, 22, 21, 20, 19, 18, 47, 46, 17, 16, 15, 14,
                            13, 12, 47, 46, 11, 10, 9, 8, 7, 6, 47, 46, 5, 4, 3, 2, 1, 0);
        const __m512i shifts = _mm512_set1_epi64(0x2A241E18120C0600);
        return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, _mm512_loadu_si512(codes)));
    }
    Products at(__m512i index) const {
        return {_mm512_permutexvar_epi8(index, low), _mm512_permutexvar_epi8(index, high)};
    }
};

template <int T>
struct Sums {
    __m512i first[T], second[T];
};

template <class Table, int T>
inline void look_up(const uint8_t* table, const uint8_t* codes, int64_t bytes, Sums<T>& sums) {
    const Table in_registers(table);
    for (int t = 0; t < T; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + t * bytes + kAhead), _MM_HINT_T0);
        const Products found = in_registers.at(Table::load(codes + t * bytes));
        sums.first[t] = _mm512_add_epi16(sums.first[t], _mm512_unpacklo_epi8(found.low, found.high));
        sums.second[t] = _mm512_add_epi16(sums.second[t], _mm512_unpackhi_epi8(found.low, found.high));
    }
}

inline void add_half(__m256i words, __m512 factor, const float* scales, float* sums) {
    __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words)), factor);
    if (scales != nullptr) values = _mm512_mul_ps(values, _mm512_loadu_ps(scales));
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), values));
}

// Adds a chunk's products of T tiles to sums [T * kRows].
template <int T>
void group(const LookUp& m, int64_t positions, const uint8_t* codes, const uint8_t* tables, float factor,
           const float* scales, float* sums) {
    Sums<T> words;
    for (int t = 0; t < T; ++t) words.first[t] = words.second[t] = _mm512_setzero_si512();
    for (int64_t p = 0; p < positions; ++p) {
        for (int s = 0; s < m.stages; ++s, tables += kTableBytes) {
            const int bits = m.stage[s].bits;
            const int64_t bytes = code_bytes(bits);
            if (bits == 8) {
                look_up<Wide, T>(tables, codes, bytes, words);
            } else if (bits == 6) {
                look_up<Narrow<6>, T>(tables, codes, bytes, words);
            } else {
                look_up<Narrow<4>, T>(tables, codes, bytes, words);
            }
            codes += T * bytes;
        }
    }
    const __m512 back = _mm512_set1_ps(factor);
    for (int t = 0; t < T; ++t) {
        const __m512i halves[2] = {words.first[t], words.second[t]};
        for (int h = 0; h < 2; ++h) {
            const int64_t row = t * kRows + 32 * h;
            const float* at = scales == nullptr ? nullptr : scales + row;
            add_half(_mm512_castsi512_si256(halves[h]), back, at, sums + row);
            add_half(_mm512_extracti64x4_epi64(halves[h], 1), back, at == nullptr ? nullptr : at + 16, sums + row + 16);
        }
    }
}

using Group = void (*)(const LookUp&, int64_t, const uint8_t*, const uint8_t*, float, const float*, float*);
constexpr Group kGroups[kTiles + 1] = {nullptr,  group<1>, group<2>, group<3>, group<4>,
                                       group<5>, group<6>, group<7>, group<8>};

}  // namespace

void octavo::accumulate_vbmi(const LookUp& m, const float* x, int64_t columns, int64_t first, int64_t last,
                             uint8_t* scratch, float* sums) {
    const int64_t column_bytes = kChunk * m.stages * kTableBytes;
    for (int64_t c = first; c < last; ++c) {
        const int64_t start = m.chunk_starts[c], positions = m.chunk_starts[c + 1] - start;
        float back[kColumns];
        for (int64_t column = 0; column < columns; ++column) {
            const float* part = x + column * m.padded_in + start * m.v;
            const float bound = largest_sum(m, part, positions);
            back[column] = bound / kLargestSum;
            if (!(bound > 0.0f)) continue;
            uint8_t* table = scratch + column * column_bytes;
            for (int k = 0; k < m.stages; ++k, table += kTableBytes)
                make_tables(m.v, m.stage[k], part, positions, kLargestSum / bound, table, m.stages * kTableBytes);
        }
        const float* scales = m.blocks > 1 ? m.scales + m.chunk_block[c] * m.rows : nullptr;
        for (int64_t tile = 0; tile < m.tiles; tile += kTiles) {
            const Group add = kGroups[m.tiles - tile < kTiles ? m.tiles - tile : kTiles];
            const uint8_t* codes = m.codes + code_offset(m, c, tile);
            for (int64_t column = 0; column < columns; ++column) {
                // Nothing is added where x is all zeros; NaN and infinity go through the factor.
                if (back[column] == 0.0f) continue;
                add(m, positions, codes, scratch + column * column_bytes, back[column],
                    scales == nullptr ? nullptr : scales + tile * kRows, sums + column * m.rows + tile * kRows);
            }
        }
    }
}
