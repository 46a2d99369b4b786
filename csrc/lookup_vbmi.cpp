// Looks products up in vector registers: AVX-512 VBMI has one instruction that reads 64 bytes from a table of 128.
//
// Tables are made in integers: x and the centroids have 16 bits each, AVX-512 VNNI adds their products up, and the
// upper 16 bits of the sums are kept.
#include <immintrin.h>
#include <math.h>

#include "lookup.h"

namespace {

using octavo::kChunk;
using octavo::kColumns;
using octavo::kRows;
using octavo::kTable;
using octavo::kTableBytes;
using octavo::kTiles;
using octavo::LookUp;
using octavo::LookUpStage;

// How far ahead of their use codes are asked for, and into the L2 cache: it waits for more of memory at a time than L1.
constexpr int kAhead = 16384;
// Entries of a block: as many bytes as a register has.
constexpr int kBlock = 64;
// Longest vectors.
constexpr int kMaxVector = 8;

// Elements of x times a factor in 16 bits; a zero follows each if vectors have a single element, for they come in
// pairs.
inline void to_integers(const float* x, int64_t n, int v, float factor, int16_t* to) {
    const __m512 times = _mm512_set1_ps(factor);
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : static_cast<__mmask16>(-1);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + i), times));
        const __m256i words = _mm512_cvtsepi32_epi16(whole);
        if (v == 1) {
            _mm512_mask_storeu_epi32(to + 2 * i, there, _mm512_cvtepu16_epi32(words));
        } else {
            _mm256_mask_storeu_epi16(to + i, there, words);
        }
    }
}

inline __m512i upper_words(__m512i low, __m512i high) {
    return _mm512_packs_epi32(_mm512_srai_epi32(low, 16), _mm512_srai_epi32(high, 16));
}

// The products of a block of centroids to table (low bytes) and behind kTable (high bytes). They come in the order of
// LookUpStage::integers, and packing puts them in theirs.
inline void store_products(const __m512i* sums, int64_t step, uint8_t* table) {
    const __m512i lower = _mm512_set1_epi16(0xFF);
    const __m512i first = upper_words(sums[0], sums[step]), second = upper_words(sums[2 * step], sums[3 * step]);
    _mm512_store_si512(table, _mm512_packus_epi16(_mm512_and_si512(first, lower), _mm512_and_si512(second, lower)));
    _mm512_store_si512(table + kTable, _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
}

// Products of P vectors with all centroids of a stage, rounded; tables are `step` bytes apart.
template <int Pairs, int P>
void multiply(const LookUpStage& stage, const int16_t* x, uint8_t* table, int64_t step) {
    const int64_t blocks = stage.bits == 8 ? kTable / kBlock : 1;
    const int16_t* book = stage.integers;
    for (int64_t block = 0; block < blocks; ++block) {
        __m512i sums[4][P];
        for (int k = 0; k < 4; ++k)
            for (int p = 0; p < P; ++p) sums[k][p] = _mm512_set1_epi32(1 << 15);
        for (int pair = 0; pair < Pairs; ++pair) {
            __m512i elements[P];
            for (int p = 0; p < P; ++p) {
                int32_t both;
                memcpy(&both, x + 2 * (p * Pairs + pair), sizeof both);
                elements[p] = _mm512_set1_epi32(both);
            }
            for (int k = 0; k < 4; ++k, book += 32) {
                const __m512i centroids = _mm512_loadu_si512(book);
                for (int p = 0; p < P; ++p) sums[k][p] = _mm512_dpwssd_epi32(sums[k][p], centroids, elements[p]);
            }
        }
        for (int p = 0; p < P; ++p) store_products(&sums[0][p], P, table + p * step + block * kBlock);
    }
}

template <int Pairs>
void multiply(const LookUpStage& stage, const int16_t* x, int64_t n, uint8_t* table, int64_t step) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) multiply<Pairs, 4>(stage, x + 2 * p * Pairs, table + p * step, step);
    for (; p < n; ++p) multiply<Pairs, 1>(stage, x + 2 * p * Pairs, table + p * step, step);
}

inline void multiply(int v, const LookUpStage& stage, const int16_t* x, int64_t n, uint8_t* table, int64_t step) {
    switch (v) {
        case 1:
        case 2: return multiply<1>(stage, x, n, table, step);
        case 4: return multiply<2>(stage, x, n, table, step);
        default: return multiply<4>(stage, x, n, table, step);
    }
}

struct Size {
    float norm, largest;
};

// sqrt(sum x^2), which NaN and infinity spoil, and the largest |x|.
inline Size size_of(const float* x, int64_t n) {
    __m512 squares = _mm512_setzero_ps(), largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 there = n - i < 16 ? static_cast<__mmask16>((1u << (n - i)) - 1) : static_cast<__mmask16>(-1);
        const __m512 some = _mm512_maskz_loadu_ps(there, x + i);
        squares = _mm512_fmadd_ps(some, some, squares);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
    }
    return {sqrtf(_mm512_reduce_add_ps(squares)), _mm512_reduce_max_ps(largest)};
}

// The tables of a chunk. Returns the worth of a unit: 0 if all of x is zeros, NaN or infinity if x has some.
inline float make_tables(const LookUp& m, const float* x, int64_t positions, uint8_t* tables) {
    float centroids = 0.0f, unit = INFINITY;
    for (int s = 0; s < m.stages; ++s) {
        centroids += m.stage[s].largest;
        unit = unit > m.stage[s].unit ? m.stage[s].unit : unit;
    }
    const Size size = size_of(x, positions * m.v);
    // No row's products add up to more, by Cauchy and Schwarz.
    const float bound = size.norm * sqrtf(static_cast<float>(positions)) * centroids;
    if (!(bound > 0.0f)) return bound;
    // The upper words of sums are products times the factor. Neither these nor the integers of x may overflow.
    const float of_sums = octavo::kLargestWord / bound, of_x = 32767.0f / 65536.0f * unit / size.largest;
    const float factor = of_sums < of_x ? of_sums : of_x;
    for (int s = 0; s < m.stages; ++s) {
        const LookUpStage& stage = m.stage[s];
        alignas(64) int16_t integers[2 * kChunk * kMaxVector];
        to_integers(x, positions * m.v, m.v, factor * 65536.0f / stage.unit, integers);
        multiply(m.v, stage, integers, positions, tables + s * kTableBytes, m.stages * kTableBytes);
    }
    return 1.0f / factor;
}

// Codes of eight bits, tables of 256 entries.
struct Wide {
    __m512i table[4];
    explicit Wide(const uint8_t* from) {
        for (int i = 0; i < 4; ++i) table[i] = _mm512_load_si512(from + 64 * i);
    }
    static __m512i load(const uint8_t* codes) { return _mm512_loadu_si512(codes); }
    __m512i at(__m512i index) const {
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), _mm512_permutex2var_epi8(table[0], index, table[1]),
                                      _mm512_permutex2var_epi8(table[2], index, table[3]));
    }
};

// Codes of six or of four bits, tables of up to 64 entries; those of 16 stand there four times, so that a code may
// come with its neighbour's bits.
template <int Bits>
struct Narrow {
    __m512i table;
    explicit Narrow(const uint8_t* from) : table(_mm512_load_si512(from)) {}
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
    __m512i at(__m512i index) const { return _mm512_permutexvar_epi8(index, table); }
};

template <int T>
struct Sums {
    __m512i first[T], second[T];
};

template <class Table, int T>
inline void look_up(const uint8_t* table, const uint8_t* codes, int64_t bytes, Sums<T>& sums) {
    const Table low(table), high(table + kTable);
    for (int t = 0; t < T; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + t * bytes + kAhead), _MM_HINT_T1);
        const __m512i index = Table::load(codes + t * bytes), lower = low.at(index), upper = high.at(index);
        sums.first[t] = _mm512_add_epi16(sums.first[t], _mm512_unpacklo_epi8(lower, upper));
        sums.second[t] = _mm512_add_epi16(sums.second[t], _mm512_unpackhi_epi8(lower, upper));
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

// Adds a chunk's products of all tiles to sums [columns][rows]; tables are `step` bytes apart by columns.
inline void add_chunk(const LookUp& m, int64_t c, const uint8_t* tables, int64_t step, const float* units,
                      int64_t columns, float* sums) {
    const int64_t positions = m.chunk_starts[c + 1] - m.chunk_starts[c];
    const float* scales = m.blocks > 1 ? m.scales + m.chunk_block[c] * m.rows : nullptr;
    for (int64_t tile = 0; tile < m.tiles; tile += kTiles) {
        const Group add = kGroups[m.tiles - tile < kTiles ? m.tiles - tile : kTiles];
        const uint8_t* codes = m.codes + code_offset(m, c, tile);
        for (int64_t column = 0; column < columns; ++column) {
            // Nothing is added where x is all zeros; NaN and infinity go through the unit.
            if (units[column] == 0.0f) continue;
            add(m, positions, codes, tables + column * step, units[column],
                scales == nullptr ? nullptr : scales + tile * kRows, sums + column * m.rows + tile * kRows);
        }
    }
}

}  // namespace

void octavo::accumulate_vbmi(const LookUpSums* to, int count, const float* x, int64_t columns, int64_t first,
                             int64_t last, uint8_t* scratch) {
    const LookUp& m = *to->matrix;
    const int64_t step = kChunk * m.stages * kTableBytes;
    for (int64_t c = first; c < last; ++c) {
        const int64_t start = m.chunk_starts[c], positions = m.chunk_starts[c + 1] - start;
        float units[kColumns];
        for (int64_t column = 0; column < columns; ++column)
            units[column] = make_tables(m, x + column * m.padded_in + start * m.v, positions, scratch + column * step);
        for (int i = 0; i < count; ++i) add_chunk(*to[i].matrix, c, scratch, step, units, columns, to[i].sums);
    }
}
