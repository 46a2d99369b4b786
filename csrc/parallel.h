// Splits a range over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "pool.h"

namespace octavo {

// Calls body(first, last) for pieces of [0, n) of at most `grain`; on the caller's thread alone if one piece is enough.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
    const int64_t pieces = (n + grain - 1) / grain;
    std::atomic<int64_t> next{0};
    const auto work = [&](int) {
        for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
            body(first, std::min(first + grain, n));
    };
    Helpers helpers(static_cast<int>(std::min<int64_t>(threads, pieces)) - 1);
    helpers.start(work);
    work(0);
}

}  // namespace octavo
