// What the processor's memory and arithmetic give at most, for benchmarks/kernels.py: loops that
// read rows and do next to nothing with them, a loop with combine_'s reads and writes, copies, and
// multiply-adds in registers. Written without a line of the extension; compiled for the machine at
// hand by ceilings.py.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
#ifdef __AVX512F__
constexpr int kDoubles = 8;
#else
constexpr int kDoubles = 4;
#endif
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
constexpr int64_t kLanes = 8;
constexpr int64_t kChunk =
    1 << 16;  // elements that are read from one row before the next one's turn
constexpr int kMaxRows = 16;

template <class Task>
void on_threads(int threads, const Task& task) {
  std::vector<std::thread> helpers;
  for (int t = 1; t < threads; ++t) helpers.emplace_back(task, t);
  task(0);
  for (auto& helper : helpers) helper.join();
}

Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }

float total(const Floats* sums, int count) {
  float result = 0;
  for (int i = 0; i < count; ++i)
    for (int lane = 0; lane < kLanes; ++lane) result += sums[i][lane];
  return result;
}

// `n` floats of every row, one row after the other.
float read_in_turn(const float* const* rows, int m, int64_t n, int64_t ahead) {
  Floats sums[8] = {};
  for (int i = 0; i < m; ++i) {
    for (int64_t k = 0; k + 64 <= n; k += 64) {
      if (ahead) {
        for (int64_t line = 0; line < 64; line += 16)
          __builtin_prefetch(rows[i] + k + line + ahead);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sums[j] += load(rows[i] + k + j * kLanes);
    }
  }
  return total(sums, 8);
}

// The same, a cache line of every row in turn.
template <int M>
float read_side_by_side(const float* const* rows, int m, int64_t n, int64_t ahead) {
  if constexpr (M > 1) {
    if (m != M) return read_side_by_side<M - 1>(rows, m, n, ahead);
  }
  Floats sums[M] = {};
  for (int64_t k = 0; k + 16 <= n; k += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      if (ahead) __builtin_prefetch(rows[i] + k + ahead);
      sums[i] += load(rows[i] + k) + load(rows[i] + k + kLanes);
    }
  }
  return total(sums, M);
}

template <int M>
void weighted_sum(const float* const* rows, int m, float* out, int64_t n, int64_t ahead) {
  if constexpr (M > 1) {
    if (m != M) return weighted_sum<M - 1>(rows, m, out, n, ahead);
  }
  for (int64_t k = 0; k + 16 <= n; k += 16) {
    Floats low = {}, high = {};
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      if (ahead) __builtin_prefetch(rows[i] + k + ahead);
      low += load(rows[i] + k);
      high += load(rows[i] + k + kLanes);
    }
    *reinterpret_cast<Floats*>(out + k) = low;
    *reinterpret_cast<Floats*>(out + k + kLanes) = high;
  }
}

}  // namespace

extern "C" {

// Reads m rows of n floats. `side_by_side`: all rows at once, else one after the other; `ahead`:
// elements that software prefetching runs ahead, 0 for none. Returns a sum, so that the compiler
// leaves no load out.
float ceiling_read(const float* const* rows, int m, int64_t n, int threads, int side_by_side,
                   int64_t ahead) {
  std::vector<float> sums(threads * 16);
  on_threads(threads, [&](int thread) {
    const int64_t low = n * thread / threads, high = n * (thread + 1) / threads;
    for (int64_t chunk = low; chunk < high; chunk += kChunk) {
      const float* here[kMaxRows];
      for (int i = 0; i < m; ++i) here[i] = rows[i] + chunk;
      const int64_t count = high - chunk < kChunk ? high - chunk : kChunk;
      sums[thread * 16] += side_by_side ? read_side_by_side<kMaxRows>(here, m, count, ahead)
                                        : read_in_turn(here, m, count, ahead);
    }
  });
  float sum = 0;
  for (int t = 0; t < threads; ++t) sum += sums[t * 16];
  return sum;
}

// Reads m rows of n floats and writes their sum.
void ceiling_combine(const float* const* rows, int m, float* out, int64_t n, int threads,
                     int64_t ahead) {
  on_threads(threads, [&](int thread) {
    const int64_t low = n * thread / threads / 16 * 16;
    const int64_t high = thread + 1 == threads ? n : n * (thread + 1) / threads / 16 * 16;
    const float* here[kMaxRows];
    for (int i = 0; i < m; ++i) here[i] = rows[i] + low;
    weighted_sum<kMaxRows>(here, m, out + low, high - low, ahead);
  });
}

// Copies n floats: with the C library's memcpy, which may write past the caches, or with plain
// stores.
void ceiling_copy(const float* from, float* to, int64_t n, int threads, int plain) {
  on_threads(threads, [&](int thread) {
    const int64_t low = n * thread / threads / 16 * 16;
    const int64_t high = thread + 1 == threads ? n : n * (thread + 1) / threads / 16 * 16;
    if (plain) {
      const float* row = from + low;
      weighted_sum<1>(&row, 1, to + low, high - low, 0);
    } else {
      std::memcpy(to + low, from + low, (high - low) * sizeof(float));
    }
  });
}

// Multiply-adds of one round of ceiling_fma on one thread.
int ceiling_fma_count() { return 10 * kDoubles; }

// `rounds` times 10 independent fp64 multiply-adds of a whole vector on every thread; they stay in
// registers.
double ceiling_fma(int64_t rounds, int threads) {
  std::vector<double> sums(threads * 16);
  on_threads(threads, [&](int thread) {
    Doubles sum[10], factor;
    for (int lane = 0; lane < kDoubles; ++lane) {
      for (int i = 0; i < 10; ++i) sum[i][lane] = i + lane;
      factor[lane] = lane % 2 ? 0.25 : 0.5;
    }
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
      for (int i = 0; i < 10; ++i) sum[i] = sum[i] * factor + factor;
    }
    for (int i = 0; i < 10; ++i)
      for (int lane = 0; lane < kDoubles; ++lane) sums[thread * 16] += sum[i][lane];
  });
  double result = 0;
  for (int t = 0; t < threads; ++t) result += sums[t * 16];
  return result;
}

}  // extern "C"
