// Splits a range over short-lived threads. There is no pool: nothing survives a call, so fork() stays safe.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace octavo {

// Calls body(first, last) for pieces of [0, n) of at most `grain`; on the caller's thread alone if one piece is enough.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
    const int64_t pieces = (n + grain - 1) / grain;
    const int64_t helpers = std::min<int64_t>(threads, pieces) - 1;
    if (helpers <= 0) {
        if (n > 0) body(int64_t{0}, n);
        return;
    }
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
            body(first, std::min(first + grain, n));
    };
    std::vector<std::thread> team;
    team.reserve(static_cast<size_t>(helpers));
    try {
        for (int64_t i = 0; i < helpers; ++i) team.emplace_back(work);
    } catch (const std::system_error&) {
        // The system has no more threads to give: those that started, and this one, do all the work.
    }
    work();
    for (auto& thread : team) thread.join();
}

}  // namespace octavo
