// The kernels, written once over vectors of doubles and of floats: gramian here, combine in
// combine.inl, accumulate in accumulate.inl. A translation unit defines in its own namespace
//   Bf16, Half    element types
//   Vec           kLanes floats, with broadcast(x): combine and accumulate work in fp32
//   Wide          kLanes doubles, with zero(): gramian works in fp64
//   kDirect       rows whose whole triangle of sums fits in the registers
//   kColumns      columns whose rectangle of sums with kDirect rows fits there
//   kSums         sums of accumulate that fit there
//   load, store, multiply, multiply_add, plus, widen, and load_wide from elements or doubles
//   inverse_root  of a Vec, as FactorForm defines it
// and includes this file. Everything here is in an unnamed namespace and uses no inline function of
// the standard library: the linker must never merge code for a wide instruction set with the
// baseline's.
//
// Why fp64 throughout: fp32 sums of n products err by up to n/2 * 2^-24 for some inputs (a constant
// row is one), and short fp32 chains that stay below 1e-7 cost more instructions to widen than they
// save. fp64 products of fp32 elements are exact.

#include <cstring>

#include "cpu/kernels.h"

namespace gapo {
namespace cpu {
namespace {

constexpr int kLanes = Wide::kLanes;
constexpr int64_t kBlock = 128;  // elements that several consecutive passes read from the cache
using Lanes = double[kLanes];

// How far ahead of its reads a pass prefetches. The processor's own prefetching stops at pages and
// waits for misses; a loop with so much arithmetic between its misses leaves bandwidth unused.
constexpr int64_t kAhead = 1024;      // bytes, for a single pass
constexpr int64_t kAheadBlock = 512;  // bytes, for several passes over a block
constexpr int64_t kLine = 64;

// One pass over `count` elements (whole vectors). It sums the products of the triangle of Left rows
// (if kTriangle), and of Left rows with Right others. With few sums, kSets independent sets of them
// hide the latency of the additions.
template <class T, int Left, bool kTriangle, int Right, bool kWeighted>
struct Pass {
  static constexpr int kSums = (kTriangle ? pair_count(Left) : 0) + Left * Right;
  static constexpr int kStep = kLine / sizeof(T);  // elements per cache line
  static constexpr int kSets = kSums <= 4 ? (kSums == 1 && kStep >= 4 * kLanes ? 4 : 2) : 1;
  const T* left[Left];
  const T* right[Right > 0 ? Right : 1];
  const float* weight;

  static Wide scaled(Wide x, Wide factor) { return kWeighted ? multiply(x, factor) : x; }

  // Adds the products of kLanes elements from k on.
  __attribute__((always_inline)) inline void add(int64_t k, Wide* sum) const {
    const Wide factor = kWeighted ? load_wide(weight + k) : Wide::zero();
    Wide x[Left];
    int p = 0;
#pragma GCC unroll 8
    for (int i = 0; i < Left; ++i) {
      x[i] = load_wide(left[i] + k);
      if (!kTriangle) continue;
      const Wide y = scaled(x[i], factor);
#pragma GCC unroll 8
      for (int j = 0; j <= i; ++j, ++p) sum[p] = multiply_add(y, x[j], sum[p]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Right; ++j) {
      const Wide y = scaled(load_wide(right[j] + k), factor);
#pragma GCC unroll 8
      for (int i = 0; i < Left; ++i, ++p) sum[p] = multiply_add(x[i], y, sum[p]);
    }
  }

  __attribute__((always_inline)) inline void prefetch(int64_t k, int64_t ahead) const {
#pragma GCC unroll 8
    for (int i = 0; kTriangle && i < Left; ++i)  // else the triangle before has prefetched them
      __builtin_prefetch(reinterpret_cast<const char*>(left[i] + k) + ahead);
#pragma GCC unroll 8
    for (int j = 0; j < Right; ++j)
      __builtin_prefetch(reinterpret_cast<const char*>(right[j] + k) + ahead);
  }

  // Adds to kSums sums in the order of add().
  void run(int64_t count, int64_t ahead, Lanes* total) const {
    Wide sum[kSets * kSums];
#pragma GCC unroll 32
    for (int p = 0; p < kSums; ++p) sum[p] = load_wide(static_cast<const double*>(total[p]));
#pragma GCC unroll 32
    for (int p = kSums; p < kSets * kSums; ++p) sum[p] = Wide::zero();
    int64_t k = 0;
    for (; k + kStep <= count; k += kStep) {
      prefetch(k, ahead);
#pragma GCC unroll 4
      for (int step = 0; step < kStep; step += kSets * kLanes) {
#pragma GCC unroll 4
        for (int set = 0; set < kSets; ++set) add(k + step + set * kLanes, sum + set * kSums);
      }
    }
    for (; k < count; k += kLanes) add(k, sum);
#pragma GCC unroll 32
    for (int p = kSums; p < kSets * kSums; ++p) sum[p % kSums] = plus(sum[p % kSums], sum[p]);
#pragma GCC unroll 32
    for (int p = 0; p < kSums; ++p) store(sum[p], total[p]);
  }
};

// Runs the passes of a schedule over `count` elements; stores their sums one after the other.
template <class T, bool kWeighted>
struct Compute {
  const T* const* rows;
  const float* weight;
  int64_t count;
  int64_t ahead;
  Lanes* sums;

  template <int Left, bool kTriangle, int Right>
  void pass(int a, int b) {
    Pass<T, Left, kTriangle, Right, kWeighted> one;
    for (int i = 0; i < Left; ++i) one.left[i] = rows[a + i];
    for (int j = 0; j < Right; ++j) one.right[j] = rows[b + j];
    one.weight = weight;
    one.run(count, ahead, sums);
    sums += one.kSums;
  }
};

// Adds the sums of the same schedule to the upper triangle of an m x m matrix.
struct Collect {
  int m;
  const Lanes* sums;
  double* out;

  void take(int i, int j) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += (*sums)[lane];
    out[i < j ? pair_index(m, i, j) : pair_index(m, j, i)] += sum;
    ++sums;
  }

  template <int Left, bool kTriangle, int Right>
  void pass(int a, int b) {
    for (int i = 0; kTriangle && i < Left; ++i) {
      for (int j = 0; j <= i; ++j) take(a + j, a + i);
    }
    for (int j = 0; j < Right; ++j) {
      for (int i = 0; i < Left; ++i) take(a + i, b + j);
    }
  }
};

// These two pick the pass that is compiled for a run-time number of rows: the triangle of the rows
// from `a` on, and kDirect rows from `a` on with the columns from `b` on.
template <int Rows, class Visitor>
void triangle(Visitor& visitor, int rows, int a) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      visitor.template pass<Rows, true, 0>(a, 0);
    else
      triangle<Rows - 1>(visitor, rows, a);
  }
}

template <int Columns, class Visitor>
void rectangle(Visitor& visitor, int columns, int a, int b) {
  if constexpr (Columns > 0) {
    if (columns == Columns)
      visitor.template pass<kDirect, false, Columns>(a, b);
    else
      rectangle<Columns - 1>(visitor, columns, a, b);
  }
}

// The passes that cover every pair of m rows once.
template <class Visitor>
void schedule(int m, Visitor& visitor) {
  // With one or two rows too many, their own triangle would stall on the latency of its additions.
  if (m == kDirect + 1) visitor.template pass<1, true, kDirect>(kDirect, 0);
  if (m == kDirect + 2) visitor.template pass<2, true, kDirect>(kDirect, 0);
  const int rest = m <= kDirect + 2 && m > kDirect ? kDirect : m;
  for (int a = 0; a < rest; a += kDirect) {
    triangle<kDirect>(visitor, rest - a < kDirect ? rest - a : kDirect, a);
    for (int b = a + kDirect; b < rest; b += kColumns)
      rectangle<kColumns>(visitor, rest - b < kColumns ? rest - b : kColumns, a, b);
  }
}

// Widens a row's block into `buffer` and prefetches the next block.
template <class T>
const float* widen_block(const T* row, int64_t count, float* buffer) {
  __builtin_prefetch(reinterpret_cast<const char*>(row) + kAheadBlock);
  __builtin_prefetch(reinterpret_cast<const char*>(row) + kAheadBlock + kLine);
  int64_t k = 0;
  for (; k + Vec::kLanes <= count; k += Vec::kLanes) store(load(row + k), buffer + k);
  for (; k < count; ++k) buffer[k] = widen(row[k]);
  return buffer;
}

// A row's block as floats: in place, or widened into `buffer`.
const float* to_floats(const void* row, DType dtype, int64_t count, float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row);
  if (dtype == DType::kBFloat16) return widen_block(static_cast<const Bf16*>(row), count, buffer);
  return widen_block(static_cast<const Half*>(row), count, buffer);
}

// A block of factors: in place, or computed into `buffer`.
const float* to_factors(const Factors& factors, int64_t first, int64_t count, float* buffer) {
  const float* values = factors.values + first;
  if (!factors.form.inverse_root) return values;
  __builtin_prefetch(reinterpret_cast<const char*>(values) + kAheadBlock);
  const Vec scale = Vec::broadcast(factors.form.root_scale);
  const Vec epsilon = Vec::broadcast(factors.form.epsilon);
  int64_t k = 0;
  for (; k + Vec::kLanes <= count; k += Vec::kLanes)
    store(inverse_root(load(values + k), scale, epsilon), buffer + k);
  if (k == count) return buffer;
  float rest[Vec::kLanes] = {};
  std::memcpy(rest, values + k, (count - k) * sizeof(float));
  store(inverse_root(load(rest), scale, epsilon), rest);
  std::memcpy(buffer + k, rest, (count - k) * sizeof(float));
  return buffer;
}

// Up to kDirect rows of one type, in one pass without a buffer.
template <class T>
void directly(int m, const void* const* rows, const float* weight, int64_t count, Lanes* sums) {
  const T* pointers[kDirect];
  for (int i = 0; i < m; ++i) pointers[i] = static_cast<const T*>(rows[i]);
  if (weight == nullptr) {
    Compute<T, false> compute{pointers, nullptr, count, kAhead, sums};
    triangle<kDirect>(compute, m, 0);
  } else {
    Compute<T, true> compute{pointers, weight, count, kAhead, sums};
    triangle<kDirect>(compute, m, 0);
  }
}

// All other rows, in blocks of floats, so that each element is widened once for several passes.
template <bool kWeighted>
void in_blocks(int m, const void* const* rows, const DType* dtypes, const Factors& factors,
               int64_t count, Lanes* sums) {
  alignas(64) float buffer[kMaxRows][kBlock];
  alignas(64) float weight[kBlock];
  const float* floats[kMaxRows];
  for (int64_t k = 0; k < count; k += kBlock) {
    const int64_t here = count - k < kBlock ? count - k : kBlock;
    for (int i = 0; i < m; ++i)
      floats[i] = to_floats(advance(rows[i], k, dtypes[i]), dtypes[i], here, buffer[i]);
    const float* block_factors = kWeighted ? to_factors(factors, k, here, weight) : nullptr;
    Compute<float, kWeighted> compute{floats, block_factors, here, kAheadBlock, sums};
    schedule(m, compute);
  }
}

// Sums over `count` elements, a whole number of vectors.
void whole_vectors(int m, const void* const* rows, const DType* dtypes, const Factors& factors,
                   int64_t count, Lanes* sums) {
  const bool weighted = factors.values != nullptr;
  const bool plain = !weighted || !factors.form.inverse_root;
  if (m > kDirect || !plain || !alike(m, dtypes)) {
    if (weighted)
      in_blocks<true>(m, rows, dtypes, factors, count, sums);
    else
      in_blocks<false>(m, rows, dtypes, factors, count, sums);
  } else if (dtypes[0] == DType::kFloat32) {
    directly<float>(m, rows, factors.values, count, sums);
  } else if (dtypes[0] == DType::kBFloat16) {
    directly<Bf16>(m, rows, factors.values, count, sums);
  } else {
    directly<Half>(m, rows, factors.values, count, sums);
  }
}

void gramian(int m, const void* const* rows, const DType* dtypes, const Factors& factors,
             int64_t count, double* out) {
  alignas(64) Lanes sums[pair_count(kMaxRows)];
  std::memset(sums, 0, pair_count(m) * sizeof(Lanes));
  const int64_t whole = count / kLanes * kLanes;
  if (whole > 0) whole_vectors(m, rows, dtypes, factors, whole, sums);
  if (count > whole) {  // pad the elements after the last whole vector with zeros
    alignas(64) unsigned char padded[kMaxRows][kLanes * sizeof(float)] = {};
    float padded_weight[kLanes] = {};
    const void* pointers[kMaxRows];
    for (int i = 0; i < m; ++i) {
      std::memcpy(padded[i], advance(rows[i], whole, dtypes[i]),
                  (count - whole) * element_size(dtypes[i]));
      pointers[i] = padded[i];
    }
    Factors rest = factors;
    if (factors.values != nullptr) {
      std::memcpy(padded_weight, factors.values + whole, (count - whole) * sizeof(float));
      rest.values = padded_weight;
    }
    whole_vectors(m, pointers, dtypes, rest, kLanes, sums);
  }
  Collect collect{m, sums, out};
  schedule(m, collect);
}

}  // namespace
}  // namespace cpu
}  // namespace gapo

#include "cpu/accumulate.inl"
#include "cpu/combine.inl"
