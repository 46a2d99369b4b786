#include "prompt.h"

#include <immintrin.h>
#include <math.h>

namespace {

using octavo::kFractionBits;
using octavo::kGroup;
using octavo::kMaxMatrixStages;
using octavo::kRows;
using octavo::kTiles;
using octavo::LookUp;
using octavo::PromptBooks;
using octavo::PromptInputs;

// Vectors that are multiplied at a time. Compilers keep the sums of five no longer in registers, which halves the
// speed.
constexpr int kVectors = 4;
constexpr int kWide = kRows / 16;

// Weights of a tile, 128 added: [width / 4][kRows][4].
inline void store_rows_of_8(__m128i even, __m128i odd, uint8_t* first, uint8_t* second) {
    const __m128i half = _mm_set1_epi16(1 << (kFractionBits - 1));
    even = _mm_srai_epi16(_mm_adds_epi16(even, half), kFractionBits);
    odd = _mm_srai_epi16(_mm_adds_epi16(odd, half), kFractionBits);
    const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(even, odd), _mm_set1_epi8(-128));
    const __m128i apart = _mm_shuffle_epi32(bytes, _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(first), apart);
    _mm_storeh_pd(reinterpret_cast<double*>(second), _mm_castsi128_pd(apart));
}

inline __m128i load_8(const int16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline __m128i load_4(const int16_t* from) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)); }

// The vectors of all rows at a position; codes [stages][kRows] are in the order of rows.
inline void decode_8(const PromptBooks& books, int stages, const uint8_t (*codes)[kRows], uint8_t* to) {
    for (int row = 0; row < kRows; row += 2) {
        __m128i even = load_8(books.book[0] + 8 * codes[0][row]), odd = load_8(books.book[0] + 8 * codes[0][row + 1]);
        for (int s = 1; s < stages; ++s) {
            even = _mm_adds_epi16(even, load_8(books.book[s] + 8 * codes[s][row]));
            odd = _mm_adds_epi16(odd, load_8(books.book[s] + 8 * codes[s][row + 1]));
        }
        store_rows_of_8(even, odd, to + 4 * row, to + 4 * (kRows + row));
    }
}

inline void decode_4(const PromptBooks& books, int stages, const uint8_t (*codes)[kRows], uint8_t* to) {
    const __m128i half = _mm_set1_epi16(1 << (kFractionBits - 1));
    for (int row = 0; row < kRows; row += 4) {
        __m128i sums[2] = {_mm_setzero_si128(), _mm_setzero_si128()};
        for (int s = 0; s < stages; ++s) {
            const uint8_t* code = codes[s] + row;
            for (int i = 0; i < 2; ++i)
                sums[i] = _mm_adds_epi16(sums[i], _mm_unpacklo_epi64(load_4(books.book[s] + 4 * code[2 * i]),
                                                                     load_4(books.book[s] + 4 * code[2 * i + 1])));
        }
        for (__m128i& sum : sums) sum = _mm_srai_epi16(_mm_adds_epi16(sum, half), kFractionBits);
        const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(sums[0], sums[1]), _mm_set1_epi8(-128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * row), bytes);
    }
}

// A tile's codes of a stage in the order of rows; see place_of_row.
inline void codes_by_row(const uint8_t* from, int bits, uint8_t* to) {
    alignas(64) uint8_t places[kRows];
    load_codes(from, bits, places);
    // Rows come eight at a time.
    const __m512i found = _mm512_load_si512(places);
    const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, found));
}

void decode(const LookUp& m, const PromptBooks& books, int64_t tile, uint8_t* to) {
    const int64_t leader = tile / kTiles * kTiles, width = m.tiles - leader < kTiles ? m.tiles - leader : kTiles;
    uint8_t codes[kMaxMatrixStages][kRows];
    for (int64_t c = 0; c < m.chunks; ++c) {
        const uint8_t* from = m.codes + code_offset(m, c, leader);
        for (int64_t p = m.chunk_starts[c]; p < m.chunk_starts[c + 1]; ++p) {
            for (int s = 0; s < m.stages; ++s) {
                const int64_t bytes = code_bytes(m.stage[s].bits);
                codes_by_row(from + (tile - leader) * bytes, m.stage[s].bits, codes[s]);
                from += width * bytes;
            }
            if (m.v == 8) {
                decode_8(books, m.stages, codes, to + p * 8 * kRows);
            } else {
                decode_4(books, m.stages, codes, to + p * 4 * kRows);
            }
        }
    }
}

// Sums of a tile's rows for V vectors. Named members stay in registers, which elements of arrays do not.
template <int V>
struct Sums {
    Sums<V - 1> others;
    __m512i a, b, c, d;

    void start(const int32_t* starts, int64_t groups) {
        others.start(starts, groups);
        a = b = c = d = _mm512_set1_epi32(starts[(V - 1) * groups]);
    }
    void add(__m512i first, __m512i second, __m512i third, __m512i fourth, const int8_t* x, int64_t width) {
        others.add(first, second, third, fourth, x, width);
        int32_t four;
        memcpy(&four, x + (V - 1) * width, sizeof four);
        const __m512i elements = _mm512_set1_epi32(four);
        a = _mm512_dpbusd_epi32(a, first, elements);
        b = _mm512_dpbusd_epi32(b, second, elements);
        c = _mm512_dpbusd_epi32(c, third, elements);
        d = _mm512_dpbusd_epi32(d, fourth, elements);
    }
    // to [V][kRows] += sums * factors
    void finish(const float* factors, int64_t groups, float* to) const {
        others.finish(factors, groups, to);
        const __m512 factor = _mm512_set1_ps(factors[(V - 1) * groups]);
        const __m512i sums[kWide] = {a, b, c, d};
        for (int w = 0; w < kWide; ++w) {
            float* at = to + (V - 1) * kRows + 16 * w;
            _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[w]), factor, _mm512_load_ps(at)));
        }
    }
};
template <>
struct Sums<0> {
    void start(const int32_t*, int64_t) {}
    void add(__m512i, __m512i, __m512i, __m512i, const int8_t*, int64_t) {}
    void finish(const float*, int64_t, float*) const {}
};

// Products of V vectors from number i on with the rows of a tile, before their scales: to [V][kRows].
template <int V>
void multiply(const PromptInputs& in, int64_t i, const uint8_t* weights, float* to) {
    memset(to, 0, V * kRows * sizeof *to);
    for (int64_t g = 0; g < in.groups; ++g) {
        Sums<V> sums;
        sums.start(in.starts + i * in.groups + g, in.groups);
        const int64_t first = g * kGroup, last = first + kGroup < in.width ? first + kGroup : in.width;
        for (int64_t k = first; k < last; k += 4) {
            const uint8_t* rows = weights + k * kRows;
            sums.add(_mm512_load_si512(rows), _mm512_load_si512(rows + 64), _mm512_load_si512(rows + 128),
                     _mm512_load_si512(rows + 192), in.x + i * in.width + k, in.width);
        }
        sums.finish(in.factors + i * in.groups + g, in.groups, to);
    }
}

template <int V>
void multiply(const LookUp& m, const PromptBooks& books, int64_t tile, const PromptInputs& in, int64_t i,
              const uint8_t* weights, const float* bias, int64_t out, float* y) {
    alignas(64) float sums[V * kRows];
    multiply<V>(in, i, weights, sums);
    for (int w = 0; w < kWide; ++w) {
        const int64_t row = tile * kRows + 16 * w, left = out - row;
        if (left <= 0) return;
        const __mmask16 there = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xFFFFu);
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(m.scales + row), _mm512_set1_ps(books.unit));
        const __m512 start = bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, bias + row);
        for (int v = 0; v < V; ++v)
            _mm512_mask_storeu_ps(y + (i + v) * out + row, there,
                                  _mm512_fmadd_ps(_mm512_load_ps(sums + v * kRows + 16 * w), scale, start));
    }
}

}  // namespace

void octavo::prompt_input_vbmi(const float* x, int64_t in, int64_t i, const PromptInputs& to) {
    for (int64_t g = 0; g < to.groups; ++g) {
        const int64_t first = g * kGroup, last = first + kGroup < to.width ? first + kGroup : to.width;
        const int64_t end = in < last ? in : last;
        const auto some = [&](int64_t k) {
            const int64_t left = end - k;
            return _mm512_maskz_loadu_ps(static_cast<__mmask16>(left >= 16 ? 0xFFFFu
                                                                : left > 0 ? (1u << left) - 1
                                                                           : 0),
                                         x + k);
        };
        __m512 most = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
        for (int64_t k = first; k < last; k += 16) {
            most = _mm512_max_ps(most, _mm512_abs_ps(some(k)));
            sum = _mm512_add_ps(sum, some(k));
        }
        float largest = _mm512_reduce_max_ps(most);
        // A maximum may lose NaN; a sum does not.
        const float all = _mm512_reduce_add_ps(sum);
        if (all != all) largest = all;
        const __m512 times = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
        int32_t total = 0;
        for (int64_t k = first; k < last; k += 16) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(some(k), times));
            total += _mm512_reduce_add_epi32(
                _mm512_max_epi32(_mm512_min_epi32(whole, _mm512_set1_epi32(127)), _mm512_set1_epi32(-128)));
            const int64_t left = to.width - k;
            _mm_mask_storeu_epi8(to.x + i * to.width + k,
                                 static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xFFFFu),
                                 _mm512_cvtsepi32_epi8(whole));
        }
        to.factors[i * to.groups + g] = largest / 127.0f;
        to.starts[i * to.groups + g] = -128 * total;
    }
}

void octavo::prompt_tile_vbmi(const LookUp& m, const PromptBooks& books, int64_t tile, const PromptInputs& in,
                              const float* bias, int64_t out, uint8_t* weights, float* y) {
    decode(m, books, tile, weights);
    int64_t i = 0;
    for (; i + kVectors <= in.n; i += kVectors) multiply<kVectors>(m, books, tile, in, i, weights, bias, out, y);
    switch (in.n - i) {
        case 3: return multiply<3>(m, books, tile, in, i, weights, bias, out, y);
        case 2: return multiply<2>(m, books, tile, in, i, weights, bias, out, y);
        case 1: return multiply<1>(m, books, tile, in, i, weights, bias, out, y);
        default: return;
    }
}
