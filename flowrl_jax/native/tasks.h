// Items of work, which XLA's own threads take one by one.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

// Items that follow each other, of which one worker takes the first and others the last.
class alignas(64) Share {
 public:
  void set(uint64_t first, uint64_t end) { left_ = pack(first, end); }

  // The number of an item, -1 where none is left.
  int64_t take(bool last) {
    uint64_t left = left_;
    for (;;) {
      const uint64_t first = left & UINT32_MAX, end = left >> 32;
      if (first >= end) return -1;
      const uint64_t rest = last ? pack(first, end - 1) : pack(first + 1, end);
      if (left_.compare_exchange_weak(left, rest)) return last ? end - 1 : first;
    }
  }

 private:
  static uint64_t pack(uint64_t first, uint64_t end) { return first | end << 32; }

  std::atomic<uint64_t> left_{0};
};

// Items of one call. A worker does those of a share of its own, one after the other, as they lie in
// memory, and then what is left of others'; it makes no difference how many workers come, or when. One
// that comes too late looks at no more than the shares.
template <class Run>
class Items {
 public:
  Items(Run run, int64_t count, int64_t workers) : run_(run), count_(count), shares_(workers) {
    for (int64_t i = 0; i < workers; ++i) {
      shares_[i].set(count * i / workers, count * (i + 1) / workers);
    }
  }

  void work() {
    const int64_t shares = shares_.size(), own = workers_.fetch_add(1);
    for (int64_t i = 0; i < shares; ++i) {
      Share& share = shares_[(own + i) % shares];
      const bool last = i > 0;
      for (int64_t item; (item = share.take(last)) >= 0;) {
        run_(item, std::clamp<int64_t>(last ? item - 1 : item + 1, 0, count_ - 1));
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  // For what other workers have begun.
  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < count_; ++spins) {
      if (spins > 1000) std::this_thread::yield();
    }
  }

 private:
  Run run_;
  int64_t count_;
  std::vector<Share> shares_;
  std::atomic<int64_t> workers_{0}, done_{0};
};

// Runs items 0 to before `count`, here and on the threads that are free. What runs an item is told which
// one will probably follow on this thread.
template <class Run>
void for_each_item(xla::ffi::ThreadPool& threads, int64_t count, Run run) {
  const int64_t workers = std::min(count, threads.num_threads());
  if (workers < 2) {
    for (int64_t item = 0; item < count; ++item) run(item, std::min(item + 1, count - 1));
    return;
  }
  auto items = std::make_shared<Items<Run>>(run, count, workers);
  for (int64_t i = 1; i < workers; ++i) threads.Schedule([items] { items->work(); });
  items->work();
  items->wait();
}

// What a thread keeps room for.
enum class Room { kItem, kNormalised };

// Room for one purpose, which a thread keeps from item to item.
template <Room>
float* scratch(int64_t floats) {
  thread_local std::vector<float> room;
  if (static_cast<int64_t>(room.size()) < floats) room.resize(floats);
  return room.data();
}

}  // namespace
