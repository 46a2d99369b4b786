// Threads that work in step: every one calls body(rank, team), and they wait for each other at barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "pool.h"

namespace octavo {

class Team {
  public:
    // Calls body(rank, team) once for every rank in [0, size()); `threads` are wanted, fewer may come.
    template <class Body>
    static void run(int threads, const Body& body) {
        Team team;
        const auto work = [&](int rank) { body(rank, team); };
        Helpers helpers(threads - 1);
        team.size_ = helpers.count() + 1;
        helpers.start(work);
        body(0, team);
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
    int size_ = 1;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> round_{0};
};

}  // namespace octavo
