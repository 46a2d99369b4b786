#include "pool.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace octavo {

class Pool {
  public:
    static constexpr int kBits = 10, kMost = (1 << kBits) - 1;

    // The pool of this process, for the caller alone until it calls give_back(); NULL if somebody else has it.
    static Pool* borrow();

    void give_back() { in_use_.store(false, std::memory_order_release); }

    // Makes sure of `wanted` threads, if the system has so many; returns how many of them there are.
    int grow(int wanted) {
        try {
            for (; threads_ < wanted; ++threads_) std::thread([this, rank = threads_ + 1] { serve(rank); }).detach();
        } catch (const std::exception&) {
            // No more threads, or no memory for one: those that have started share the work.
        }
        return threads_ < wanted ? threads_ : wanted;
    }

    void start(const Helpers::Job& job, int count) {
        job_ = job;
        running_.store(count, std::memory_order_relaxed);
        order_.store(((order_.load(std::memory_order_relaxed) >> kBits) + 1) << kBits | static_cast<uint64_t>(count));
        if (asleep_.load() == 0) return;
        // Whoever is between looking at the order and falling asleep holds the mutex.
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_all();
    }

    void wait() const {
        for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) rest(spins);
    }

  private:
    static constexpr int kSpins = 2000;

    [[noreturn]] void serve(int rank) {
        for (uint64_t done = 0;;) {
            const uint64_t order = next(done);
            done = order;
            if (rank > static_cast<int>(order & kMost)) continue;
            job_.call(job_.data, rank);
            running_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    // The order after the one that was done last.
    uint64_t next(uint64_t done) {
        for (int spins = 0; spins < kSpins; ++spins) {
            const uint64_t order = order_.load(std::memory_order_acquire);
            if (order != done) return order;
            rest(spins);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return order_.load() != done; });
        asleep_.fetch_sub(1);
        return order_.load();
    }

    std::atomic<bool> in_use_{false};
    int threads_ = 0;
    Helpers::Job job_ = {};
    // Number of the work in the upper bits, how many threads it is for in the lower ones.
    std::atomic<uint64_t> order_{0};
    std::atomic<int> running_{0}, asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

namespace {

std::atomic<Pool*> the_pool{nullptr};

#if !defined(_WIN32)
// Threads do not survive a fork. What the parent's pool holds is lost to the child, whoever held it.
void forget() { the_pool.store(nullptr); }
#endif

}  // namespace

Pool* Pool::borrow() {
    Pool* pool = the_pool.load(std::memory_order_acquire);
    if (pool == nullptr) {
#if !defined(_WIN32)
        static const int watched = pthread_atfork(nullptr, nullptr, forget);
        if (watched != 0) return nullptr;
#endif
        Pool* const made = new (std::nothrow) Pool;
        if (made == nullptr) return nullptr;
        if (the_pool.compare_exchange_strong(pool, made)) {
            pool = made;
        } else {
            delete made;
        }
    }
    return pool->in_use_.exchange(true, std::memory_order_acquire) ? nullptr : pool;
}

Helpers::Helpers(int wanted) {
    wanted = std::min(wanted, Pool::kMost);
    if (wanted < 1) return;
    pool_ = Pool::borrow();
    if (pool_ != nullptr) {
        count_ = pool_->grow(wanted);
        return;
    }
    try {
        own_.reserve(static_cast<size_t>(wanted));
        while (count_ < wanted) {
            own_.emplace_back([this, rank = count_ + 1] {
                int begin = 0;
                for (int spins = 0; (begin = begin_.load(std::memory_order_acquire)) == 0; ++spins) rest(spins);
                if (begin > 0) job_.call(job_.data, rank);
            });
            ++count_;
        }
    } catch (const std::exception&) {
        // As many as have started.
    }
}

void Helpers::run(const Job& job) {
    if (count_ == 0) return;
    if (pool_ != nullptr) return pool_->start(job, count_);
    job_ = job;
    begin_.store(1, std::memory_order_release);
}

Helpers::~Helpers() {
    if (pool_ != nullptr) {
        pool_->wait();
        pool_->give_back();
    }
    int idle = 0;
    begin_.compare_exchange_strong(idle, -1);
    for (auto& thread : own_) thread.join();
}

}  // namespace octavo
