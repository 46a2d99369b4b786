// Threads that wait for work, so that a call does not have to start them.
//
// They spin for some microseconds after a call, for the next one often comes at once, and sleep then. There is one pool
// per process, made when it is first asked for, never ended: a process that forks has none in its child and makes
// another. Callers that find the pool in use get threads for their own call alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace octavo {

// One step of waiting in a loop.
inline void rest(int spins) {
    // Where there are more threads than processors, spinning would keep the one that is waited for from running.
    if (spins > 2000) return std::this_thread::yield();
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    asm volatile("yield");
#endif
}

class Pool;

// Up to `wanted` threads beside the caller's for one piece of work; the destructor waits until they are done.
class Helpers {
  public:
    explicit Helpers(int wanted);
    ~Helpers();
    Helpers(const Helpers&) = delete;
    Helpers& operator=(const Helpers&) = delete;

    int count() const { return count_; }

    // Lets the helpers call work(rank) for the ranks 1 to count(); `work` must outlive this object.
    template <class Work>
    void start(const Work& work) {
        run({[](const void* data, int rank) { (*static_cast<const Work*>(data))(rank); }, &work});
    }

    struct Job {
        void (*call)(const void* data, int rank);
        const void* data;
    };

  private:
    void run(const Job& job);

    int count_ = 0;
    Pool* pool_ = nullptr;          // if it is ours for now
    std::vector<std::thread> own_;  // if it is not
    std::atomic<int> begin_{0};     // of the latter: 1 to work, -1 to go home
    Job job_ = {};
};

}  // namespace octavo
