// Threads that work in step: every one calls body(rank, team), and they wait for each other at barriers.
//
// Like parallel.h they live for one call, so nothing survives it and fork() stays safe. Starting them costs some tens
// of microseconds: a caller has one team for as much work as it can.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace octavo {

class Team {
  public:
    // Calls body(rank, team) once for every rank in [0, size()); `threads` are wanted, fewer may come.
    template <class Body>
    static void run(int threads, const Body& body) {
        Team team;
        std::vector<std::thread> helpers;
        helpers.reserve(static_cast<size_t>(threads > 0 ? threads : 1));
        try {
            for (int rank = 1; rank < threads; ++rank)
                helpers.emplace_back([&team, &body, rank] {
                    team.await_start();
                    if (rank < team.size()) body(rank, team);
                });
        } catch (const std::system_error&) {
            // The system has no more threads to give: those that started share the work.
        }
        team.size_ = static_cast<int>(helpers.size()) + 1;
        team.start_.store(true, std::memory_order_release);
        body(0, team);
        for (auto& helper : helpers) helper.join();
    }

    int size() const { return size_; }

    // Waits until all of the team are here; what they wrote before is then visible to all.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) rest(spins);
    }

    // The share [first, last) of [0, n) of a rank, in whole multiples of `grain`.
    void share(int64_t n, int64_t grain, int rank, int64_t* first, int64_t* last) const {
        const int64_t pieces = (n + grain - 1) / grain;
        *first = pieces * rank / size_ * grain;
        *last = pieces * (rank + 1) / size_ * grain;
        if (*last > n) *last = n;
        if (*first > n) *first = n;
    }

  private:
    void await_start() const {
        for (int spins = 0; !start_.load(std::memory_order_acquire); ++spins) rest(spins);
    }
    static void rest(int spins) {
        // Where there are more threads than processors, spinning would keep the one that is waited for from running.
        if (spins > 2000) return std::this_thread::yield();
#if defined(__x86_64__) || defined(_M_X64)
        _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
        asm volatile("yield");
#endif
    }

    int size_ = 1;
    std::atomic<bool> start_{false};
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> round_{0};
};

}  // namespace octavo
