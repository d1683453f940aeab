// The parts of the kernels that do not depend on the instruction set: chunks and threads.
#include <cstddef>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace gapo {
namespace cpu {
namespace {

// Elements per chunk. Chunks depend on positions only. Each has its own partial sum, and these are
// added in order, so the result does not depend on which thread computed them.
constexpr int64_t kChunk = 1 << 16;
// Longer rows get longer chunks, so that the partial sums stay below a megabyte.
constexpr int64_t kMaxChunks = 512;

int64_t chunk_length(int64_t total) {
  const int64_t steps = (total + kChunk * kMaxChunks - 1) / (kChunk * kMaxChunks);
  return kChunk * std::max<int64_t>(1, steps);
}

int64_t total_length(const std::vector<int64_t>& lengths) {
  int64_t total = 0;
  for (int64_t length : lengths) total += length;
  return total;
}

}  // namespace

void gramian(const Rows& rows, const Selection& selection, double* out, int threads,
             const char* isa) {
  const Kernels& set = kernels(isa);
  const int pairs = pair_count(rows.m);
  const int64_t total = total_length(rows.lengths);
  const int64_t length = chunk_length(total);
  const int64_t chunks = (total + length - 1) / length;
  std::vector<double> partials(chunks * pairs, 0.0);
  const std::vector<Run> runs = selected_runs(rows.lengths, selection, 0, total);
  std::vector<int64_t> starts{0};
  for (int64_t length : rows.lengths) starts.push_back(starts.back() + length);

  parallel_for(chunks, threads, [&](int64_t chunk) {
    const int64_t low = chunk * length;
    const int64_t high = std::min(total, low + length);
    auto ends_after = [&](int64_t at, const Run& run) { return at < starts[run.piece] + run.end; };
    auto run = std::upper_bound(runs.begin(), runs.end(), low, ends_after);
    for (; run != runs.end() && starts[run->piece] + run->begin < high; ++run) {
      const int64_t start = starts[run->piece];
      const int64_t begin = std::max(run->begin, low - start);
      const int64_t end = std::min(run->end, high - start);
      // Splits long chunks, too, so that no sum adds more than kChunk products in a row.
      for (int64_t at = begin; at < end; at += kChunk) {
        const void* pointers[kMaxRows];
        for (int i = 0; i < rows.m; ++i)
          pointers[i] = advance(rows.piece(i, run->piece), at, rows.dtypes[i]);
        const float* weight =
            selection.weights.empty() ? nullptr : selection.weights[run->piece] + at;
        set.gramian(rows.m, pointers, rows.dtypes.data(), {weight, selection.form},
                    std::min(kChunk, end - at), partials.data() + chunk * pairs);
      }
    }
  });

  for (int i = 0; i < rows.m; ++i) {
    for (int j = i; j < rows.m; ++j) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum += partials[chunk * pairs + pair_index(rows.m, i, j)];
      out[i * rows.m + j] += sum;
      if (i != j) out[j * rows.m + i] += sum;
    }
  }
}

void combine(const Rows& rows, const double* weights, const std::vector<void*>& out,
             DType out_dtype, int threads, const char* isa) {
  const Kernels& set = kernels(isa);
  std::vector<int> used;
  std::vector<DType> dtypes;
  std::vector<float> factors;
  for (int i = 0; i < rows.m; ++i) {
    if (weights[i] == 0.0) continue;
    used.push_back(i);
    dtypes.push_back(rows.dtypes[i]);
    factors.push_back(static_cast<float>(weights[i]));
  }
  const Selection everything;
  const int64_t total = total_length(rows.lengths);
  parallel_for((total + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
    const int64_t low = chunk * kChunk;
    const int64_t high = std::min(total, low + kChunk);
    int64_t start = 0;
    for (int64_t piece = 0; piece < rows.pieces() && start < high; ++piece) {
      const int64_t begin = std::max<int64_t>(0, low - start);
      const int64_t end = std::min(rows.lengths[piece], high - start);
      start += rows.lengths[piece];
      if (begin >= end) continue;
      char* target = static_cast<char*>(out[piece]) + begin * element_size(out_dtype);
      if (used.empty()) {
        std::memset(target, 0, (end - begin) * element_size(out_dtype));
        continue;
      }
      const void* pointers[kMaxRows];
      for (std::size_t k = 0; k < used.size(); ++k)
        pointers[k] = advance(rows.piece(used[k], piece), begin, dtypes[k]);
      set.combine(static_cast<int>(used.size()), pointers, dtypes.data(), factors.data(), target,
                  out_dtype, end - begin);
    }
  });
}

void accumulate(const std::vector<float*>& rows, const float* coefficients, const Terms& terms,
                int64_t length, bool overwrite, int threads, const char* isa) {
  // Numbers that a thread reads and writes at a time: this takes about as long as to start a
  // thread.
  constexpr int64_t kWork = 1 << 19;
  const Kernels& set = kernels(isa);
  const int m = static_cast<int>(rows.size());
  const int64_t stretch = std::max<int64_t>(1, kWork / (terms.count + 2 * m) / 64) * 64;
  parallel_for((length + stretch - 1) / stretch, threads, [&](int64_t index) {
    const int64_t begin = index * stretch;
    float* targets[kMaxRows];
    for (int i = 0; i < m; ++i) targets[i] = rows[i] + begin;
    Terms here = terms;
    here.data = advance(terms.data, begin, terms.dtype);
    set.accumulate(m, targets, coefficients, here, std::min(stretch, length - begin), overwrite);
  });
}

}  // namespace cpu
}  // namespace gapo
