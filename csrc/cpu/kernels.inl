// The kernels, written once over a vector type. A translation unit defines, in its own namespace,
//   Bf16, Half            element types
//   Vec                   kLanes floats, with zero() and broadcast(x)
//   kDirect, kTile        rows that fit in its registers: a whole triangle, one side of a tile
//   load, store, multiply, multiply_add, add_to_doubles
// and includes this file. Everything here is in an unnamed namespace and uses no inline function of
// the standard library: code for a wide instruction set must never be merged with the baseline's.

#include <cstring>

#include "cpu/kernels.h"

namespace gapo {
namespace cpu {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int64_t kBlock = 512;  // elements summed in fp32 before they go to fp64
using Lanes = double[kLanes];

// Gram of M rows from row `first` on, over at most kBlock elements.
template <class T, int M, bool kWeighted>
void triangle(int m, int first, const T* const* rows, const float* weight, int64_t vectors,
              Lanes* sums) {
  constexpr int kPairs = pair_count(M);
  Vec sum[kPairs];
#pragma GCC unroll 32
  for (int p = 0; p < kPairs; ++p) sum[p] = Vec::zero();
  for (int64_t k = 0; k < vectors * kLanes; k += kLanes) {
    Vec x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) x[i] = load(rows[first + i] + k);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec left = kWeighted ? multiply(load(weight + k), x[i]) : x[i];
#pragma GCC unroll 8
      for (int j = i; j < M; ++j) {
        Vec& s = sum[pair_index(M, i, j)];
        s = multiply_add(left, x[j], s);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = i; j < M; ++j)
      add_to_doubles(sum[pair_index(M, i, j)], sums[pair_index(m, first + i, first + j)]);
  }
}

// Inner products of kTile rows from `a` on with B rows from `b` on.
template <int B, bool kWeighted>
void rectangle(int m, int a, int b, const float* const* rows, const float* weight, int64_t vectors,
               Lanes* sums) {
  Vec sum[kTile * B];
#pragma GCC unroll 32
  for (int p = 0; p < kTile * B; ++p) sum[p] = Vec::zero();
  for (int64_t k = 0; k < vectors * kLanes; k += kLanes) {
    Vec y[B];
#pragma GCC unroll 8
    for (int j = 0; j < B; ++j) y[j] = load(rows[b + j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      Vec left = load(rows[a + i] + k);
      if (kWeighted) left = multiply(load(weight + k), left);
#pragma GCC unroll 8
      for (int j = 0; j < B; ++j) sum[i * B + j] = multiply_add(left, y[j], sum[i * B + j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < B; ++j) add_to_doubles(sum[i * B + j], sums[pair_index(m, a + i, b + j)]);
  }
}

// From a run-time number of rows to the kernel compiled for it.
template <class T, int M, bool kWeighted>
void pick_triangle(int rows_here, int m, int first, const T* const* rows, const float* weight,
                   int64_t vectors, Lanes* sums) {
  if constexpr (M > 0) {
    if (rows_here == M)
      triangle<T, M, kWeighted>(m, first, rows, weight, vectors, sums);
    else
      pick_triangle<T, M - 1, kWeighted>(rows_here, m, first, rows, weight, vectors, sums);
  }
}

template <int B, bool kWeighted>
void pick_rectangle(int rows_here, int m, int a, int b, const float* const* rows,
                    const float* weight, int64_t vectors, Lanes* sums) {
  if constexpr (B > 0) {
    if (rows_here == B)
      rectangle<B, kWeighted>(m, a, b, rows, weight, vectors, sums);
    else
      pick_rectangle<B - 1, kWeighted>(rows_here, m, a, b, rows, weight, vectors, sums);
  }
}

const float* to_floats(const float* row, int64_t, float*) { return row; }

template <class T>
const float* to_floats(const T* row, int64_t vectors, float* buffer) {
  for (int64_t k = 0; k < vectors * kLanes; k += kLanes) store(load(row + k), buffer + k);
  return buffer;
}

// More rows than a triangle in registers holds: tile by tile over a block that stays in the cache.
template <class T, bool kWeighted>
void tiled(int m, const T* const* rows, const float* weight, int64_t vectors, Lanes* sums) {
  alignas(64) float buffer[kMaxRows][kBlock];
  const float* floats[kMaxRows];
  for (int i = 0; i < m; ++i) floats[i] = to_floats(rows[i], vectors, buffer[i]);
  for (int a = 0; a < m; a += kTile) {
    const int height = m - a < kTile ? m - a : kTile;
    pick_triangle<float, kTile, kWeighted>(height, m, a, floats, weight, vectors, sums);
    for (int b = a + kTile; b < m; b += kTile) {
      const int width = m - b < kTile ? m - b : kTile;
      pick_rectangle<kTile, kWeighted>(width, m, a, b, floats, weight, vectors, sums);
    }
  }
}

template <class T, bool kWeighted>
void block(int m, const T* const* rows, const float* weight, int64_t vectors, Lanes* sums) {
  if (m <= kDirect)
    pick_triangle<T, kDirect, kWeighted>(m, m, 0, rows, weight, vectors, sums);
  else
    tiled<T, kWeighted>(m, rows, weight, vectors, sums);
}

// The elements after the last whole vector, padded with zeros.
template <class T, bool kWeighted>
void remainder(int m, const T* const* rows, const float* weight, int64_t count, Lanes* sums) {
  T padded[kMaxRows][kLanes] = {};
  float padded_weight[kLanes] = {};
  const T* pointers[kMaxRows];
  for (int i = 0; i < m; ++i) {
    std::memcpy(padded[i], rows[i], count * sizeof(T));
    pointers[i] = padded[i];
  }
  if (kWeighted) std::memcpy(padded_weight, weight, count * sizeof(float));
  block<T, kWeighted>(m, pointers, padded_weight, 1, sums);
}

template <class T, bool kWeighted>
void gramian_run(int m, const void* const* rows, const float* weight, int64_t count, double* out) {
  alignas(64) double sums[pair_count(kMaxRows)][kLanes];
  std::memset(sums, 0, pair_count(m) * sizeof(Lanes));
  const T* pointers[kMaxRows];
  for (int i = 0; i < m; ++i) pointers[i] = static_cast<const T*>(rows[i]);
  while (count > 0) {
    const int64_t here = count < kBlock ? count : kBlock;
    const int64_t whole = here / kLanes * kLanes;
    if (whole > 0) block<T, kWeighted>(m, pointers, weight, whole / kLanes, sums);
    for (int i = 0; i < m; ++i) pointers[i] += whole;
    if (kWeighted) weight += whole;
    if (here > whole) remainder<T, kWeighted>(m, pointers, weight, here - whole, sums);
    count -= here;
  }
  for (int p = 0; p < pair_count(m); ++p) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[p][lane];
    out[p] += sum;
  }
}

template <class T>
void gramian_of(int m, const void* const* rows, const float* weight, int64_t count, double* out) {
  if (weight == nullptr)
    gramian_run<T, false>(m, rows, nullptr, count, out);
  else
    gramian_run<T, true>(m, rows, weight, count, out);
}

void gramian(int m, const void* const* rows, DType dtype, const float* weight, int64_t count,
             double* out) {
  if (dtype == DType::kFloat32)
    gramian_of<float>(m, rows, weight, count, out);
  else if (dtype == DType::kBFloat16)
    gramian_of<Bf16>(m, rows, weight, count, out);
  else
    gramian_of<Half>(m, rows, weight, count, out);
}

template <class T>
Vec weighted_sum(int m, const T* const* rows, const Vec* weights, int64_t k) {
  Vec sum = multiply(weights[0], load(rows[0] + k));
  for (int i = 1; i < m; ++i) sum = multiply_add(weights[i], load(rows[i] + k), sum);
  return sum;
}

template <class T, class Out>
void combine_run(int m, const void* const* rows, const float* weights, void* out, int64_t count) {
  const T* pointers[kMaxRows];
  Vec factors[kMaxRows];
  for (int i = 0; i < m; ++i) {
    pointers[i] = static_cast<const T*>(rows[i]);
    factors[i] = Vec::broadcast(weights[i]);
  }
  Out* target = static_cast<Out*>(out);
  const int64_t whole = count / kLanes * kLanes;
  int64_t k = 0;
  for (; k + 2 * kLanes <= whole; k += 2 * kLanes) {
    const Vec even = weighted_sum(m, pointers, factors, k);
    const Vec odd = weighted_sum(m, pointers, factors, k + kLanes);
    store(even, target + k);
    store(odd, target + k + kLanes);
  }
  for (; k < whole; k += kLanes) store(weighted_sum(m, pointers, factors, k), target + k);
  if (k == count) return;
  T padded[kMaxRows][kLanes] = {};
  for (int i = 0; i < m; ++i) {
    std::memcpy(padded[i], pointers[i] + k, (count - k) * sizeof(T));
    pointers[i] = padded[i];
  }
  Out result[kLanes];
  store(weighted_sum(m, pointers, factors, 0), result);
  std::memcpy(target + k, result, (count - k) * sizeof(Out));
}

template <class T>
void combine_of(int m, const void* const* rows, const float* weights, void* out, DType out_dtype,
                int64_t count) {
  if (out_dtype == DType::kFloat32)
    combine_run<T, float>(m, rows, weights, out, count);
  else if (out_dtype == DType::kBFloat16)
    combine_run<T, Bf16>(m, rows, weights, out, count);
  else
    combine_run<T, Half>(m, rows, weights, out, count);
}

void combine(int m, const void* const* rows, DType dtype, const float* weights, void* out,
             DType out_dtype, int64_t count) {
  if (dtype == DType::kFloat32)
    combine_of<float>(m, rows, weights, out, out_dtype, count);
  else if (dtype == DType::kBFloat16)
    combine_of<Bf16>(m, rows, weights, out, out_dtype, count);
  else
    combine_of<Half>(m, rows, weights, out, out_dtype, count);
}

}  // namespace
}  // namespace cpu
}  // namespace gapo
