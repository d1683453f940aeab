#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gapo {
namespace cpu {

// Calls task(i) for every i in [0, count), on at most `threads` threads. They live for this call
// only, which keeps no state, is safe across fork, and is cheap compared with the memory that a
// call streams through. The task must not throw.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(threads, count) - 1;
  for (int64_t i = 0; i < wanted; ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the system has no more threads: the running ones do all the work
    }
  }
  work();
  for (auto& helper : helpers) helper.join();
}

}  // namespace cpu
}  // namespace gapo
