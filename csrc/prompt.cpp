#include "prompt_matrix.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace octavo {

void PromptBook::load(const LookUp& m, float largest) {
    float possible = 0.0f;
    for (int s = 0; s < m.stages; ++s) {
        float most = 0.0f;
        for (int64_t i = 0; i < m.v * kTable; ++i) most = std::max(most, std::abs(m.stage[s].book[i]));
        possible += most;
    }
    // No integer of a book leaves sixteen bits.
    largest = std::min(std::max(largest, possible / 2), possible);
    const float scale = largest > 0.0f ? static_cast<float>(127 << kFractionBits) / largest : 1.0f;
    for (int s = 0; s < m.stages; ++s) {
        for (int64_t c = 0; c < kTable; ++c)
            for (int j = 0; j < m.v; ++j)
                numbers[s].push_back(static_cast<int16_t>(std::lrint(m.stage[s].book[j * kTable + c] * scale)));
        view.book[s] = numbers[s].data();
    }
    view.unit = static_cast<float>(1 << kFractionBits) / scale;
}

#if defined(OCTAVO_X86)
void multiply_many(const Matrix& matrix, const LookUp& m, const PromptBooks& books, const float* x, int64_t n,
                   int threads, float* y) {
    PromptInputs inputs = {n, m.padded_in, (m.padded_in + kGroup - 1) / kGroup, nullptr, nullptr, nullptr};
    const Bytes bytes = aligned_bytes(n * inputs.width);
    std::vector<float> factors(static_cast<size_t>(n * inputs.groups));
    std::vector<int32_t> starts(factors.size());
    inputs.x = reinterpret_cast<int8_t*>(bytes.get());
    inputs.factors = factors.data();
    inputs.starts = starts.data();
    // Of every thread: a transformed vector, and then a tile's weights.
    const int64_t own = std::max(matrix.in * int64_t{sizeof(float)}, kRows * inputs.width) / 64 * 64 + 64;
    const Bytes scratch = aligned_bytes(threads * own);
    const float* bias = matrix.bias.empty() ? nullptr : matrix.bias.data();
    std::atomic<int64_t> next{0};
    Team::run(threads, [&](int rank, Team& team) {
        uint8_t* const mine = scratch.get() + rank * own;
        int64_t first, last;
        team.share(n, 1, rank, &first, &last);
        for (int64_t i = first; i < last; ++i) {
            float* const moved = reinterpret_cast<float*>(mine);
            matrix.rotate(x + i * matrix.in, moved);
            prompt_input_vbmi(moved, matrix.in, i, inputs);
        }
        team.barrier();
        for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < m.tiles;)
            prompt_tile_vbmi(m, books, tile, inputs, bias, matrix.out, mine, y);
    });
}
#else
// Never called: there is no kernel for this processor, and has_many() says so.
void multiply_many(const Matrix&, const LookUp&, const PromptBooks&, const float*, int64_t, int, float*) {}
#endif

}  // namespace octavo
