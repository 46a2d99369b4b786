// Bit streams: element j of a row occupies bits [j * width, (j + 1) * width), bit n being bit n % 32 of word n / 32.
#include <algorithm>
#include <atomic>
#include <new>

#include "octavo_c.h"
#include "parallel.h"

namespace {

constexpr int64_t kPieceElements = int64_t{1} << 17;
constexpr int kWord = 32;

int64_t row_words(int64_t count, int width) { return (count * width + kWord - 1) / kWord; }

bool usable(int64_t rows, int64_t count, int width, int threads) {
    return rows >= 0 && count >= 0 && count <= INT64_MAX / kWord && width >= 1 && width <= kWord && threads >= 1;
}

int64_t rows_per_piece(int64_t count) { return std::max(kPieceElements / std::max(count, int64_t{1}), int64_t{1}); }

// Returns the bits of all codes that lie outside of [0, 2^width): zero if all are legal.
uint64_t pack_row(const int64_t* codes, int64_t count, int width, uint32_t* words) {
    const uint64_t limit = (uint64_t{1} << width) - 1;
    uint64_t buffer = 0, excess = 0;
    int filled = 0;
    for (int64_t j = 0; j < count; ++j) {
        const uint64_t code = static_cast<uint64_t>(codes[j]);
        excess |= code & ~limit;
        buffer |= (code & limit) << filled;
        filled += width;
        if (filled >= kWord) {
            *words++ = static_cast<uint32_t>(buffer);
            buffer >>= kWord;
            filled -= kWord;
        }
    }
    if (filled > 0) *words = static_cast<uint32_t>(buffer);
    return excess;
}

void unpack_row(const uint32_t* words, int64_t count, int width, int64_t* codes) {
    const uint64_t mask = (uint64_t{1} << width) - 1;
    uint64_t buffer = 0;
    int filled = 0;
    for (int64_t j = 0; j < count; ++j) {
        if (filled < width) {
            buffer |= static_cast<uint64_t>(*words++) << filled;
            filled += kWord;
        }
        codes[j] = static_cast<int64_t>(buffer & mask);
        buffer >>= width;
        filled -= width;
    }
}

}  // namespace

extern "C" int octavo_pack(const int64_t* codes, int64_t rows, int64_t count, int32_t width, uint32_t* words,
                           int32_t threads) {
    if (!usable(rows, count, width, threads)) return OCTAVO_BAD_ARGUMENT;
    const int64_t stride = row_words(count, width);
    std::atomic<uint64_t> excess{0};
    try {
        octavo::parallel_for(rows, rows_per_piece(count), threads, [&](int64_t first, int64_t last) {
            uint64_t seen = 0;
            for (int64_t r = first; r < last; ++r)
                seen |= pack_row(codes + r * count, count, width, words + r * stride);
            excess.fetch_or(seen, std::memory_order_relaxed);
        });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return excess.load() == 0 ? OCTAVO_OK : OCTAVO_OUT_OF_RANGE;
}

extern "C" int octavo_unpack(const uint32_t* words, int64_t rows, int64_t count, int32_t width, int64_t* codes,
                             int32_t threads) {
    if (!usable(rows, count, width, threads)) return OCTAVO_BAD_ARGUMENT;
    const int64_t stride = row_words(count, width);
    try {
        octavo::parallel_for(rows, rows_per_piece(count), threads, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) unpack_row(words + r * stride, count, width, codes + r * count);
        });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
