// accumulate in fp32 vectors: the third part of kernels.inl, which includes this file.
//
// The terms are in a cache, the rows are not. So a cell, a few vectors of several rows, keeps its
// sums in registers: its terms are read once for all its rows, and every row's elements once, after
// the terms have been added up. Cells of further rows follow when the first rows are done: in turns
// they would want more of the cache than they save. Stores that bypass the caches were no faster
// where the old elements do not count.

namespace gapo {
namespace cpu {
namespace {

constexpr int kTall = 8;  // rows of a cell

constexpr int vectors_beside(int rows) { return kSums / rows >= 4 ? 4 : kSums / rows >= 2 ? 2 : 1; }

template <class T>
struct Addition {
  float* const* rows;
  const float* coefficients;  // of the first row
  const T* terms;
  int64_t count;
  int64_t stride;
  bool overwrite;
};

// The first `count` elements of a vector; the others are zero.
template <class T>
Vec load_part(const T* p, int64_t count) {
  T padded[Vec::kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

void store_part(Vec x, float* p, int64_t count) {
  float padded[Vec::kLanes];
  store(x, padded);
  std::memcpy(p, padded, count * sizeof(float));
}

// Adds to Beside vectors of Tall rows from element k on. If not kWhole, the vectors end after
// `part` elements.
template <class T, int Tall, int Beside, bool kWhole>
__attribute__((always_inline)) inline void cell(const Addition<T>& todo, float* const* rows,
                                                int64_t k, int64_t part) {
  constexpr int kVec = Vec::kLanes;
  constexpr int kStep = kLine / sizeof(float);
  Vec sum[Tall][Beside];
#pragma GCC unroll 8
  for (int i = 0; i < Tall; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Beside; ++v) sum[i][v] = Vec::broadcast(0.0f);
  }
  const T* terms = todo.terms + k;
  for (int64_t b = 0; b < todo.count; ++b, terms += todo.stride) {
    Vec x[Beside];
#pragma GCC unroll 4
    for (int v = 0; v < Beside; ++v)
      x[v] = kWhole ? load(terms + v * kVec) : load_part(terms, part);
#pragma GCC unroll 8
    for (int i = 0; i < Tall; ++i) {
      const Vec factor = Vec::broadcast(todo.coefficients[i * todo.count + b]);
#pragma GCC unroll 4
      for (int v = 0; v < Beside; ++v) sum[i][v] = multiply_add(factor, x[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Tall; ++i) {
#pragma GCC unroll 4
    for (int at = 0; at < Beside * kVec; at += kStep)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + k + at) + kAheadBlock, 1);
#pragma GCC unroll 4
    for (int v = 0; v < Beside; ++v) {
      float* target = rows[i] + k + v * kVec;
      if (!todo.overwrite)
        sum[i][v] = plus(kWhole ? load(target) : load_part(target, part), sum[i][v]);
      if (kWhole)
        store(sum[i][v], target);
      else
        store_part(sum[i][v], target, part);
    }
  }
}

template <class T, int Tall>
void add_to_rows(const Addition<T>& todo, int64_t length) {
  constexpr int kVec = Vec::kLanes;
  constexpr int kBeside = vectors_beside(Tall);
  // Nothing else points to these copies, so the compiler can keep them in registers.
  float* rows[Tall];
  for (int i = 0; i < Tall; ++i) rows[i] = todo.rows[i];
  const Addition<T> mine = todo;
  int64_t k = 0;
  for (; k + kBeside * kVec <= length; k += kBeside * kVec)
    cell<T, Tall, kBeside, true>(mine, rows, k, 0);
  for (; k + kVec <= length; k += kVec) cell<T, Tall, 1, true>(mine, rows, k, 0);
  if (k < length) cell<T, Tall, 1, false>(mine, rows, k, length - k);
}

template <class T, int Tall>
void pick_height(int height, const Addition<T>& todo, int64_t length) {
  if constexpr (Tall > 1) {
    if (height != Tall) return pick_height<T, Tall - 1>(height, todo, length);
  }
  add_to_rows<T, Tall>(todo, length);
}

template <class T>
void accumulate_of(int m, float* const* rows, const float* coefficients, const Terms& terms,
                   int64_t length, bool overwrite) {
  const int layers = (m + kTall - 1) / kTall;
  const int height = (m + layers - 1) / layers;
  for (int i = 0; i < m; i += height) {
    const Addition<T> todo = {rows + i,
                              coefficients + i * terms.count,
                              static_cast<const T*>(terms.data),
                              terms.count,
                              terms.stride,
                              overwrite};
    pick_height<T, kTall>(height < m - i ? height : m - i, todo, length);
  }
}

void accumulate(int m, float* const* rows, const float* coefficients, const Terms& terms,
                int64_t length, bool overwrite) {
  if (terms.dtype == DType::kFloat32)
    accumulate_of<float>(m, rows, coefficients, terms, length, overwrite);
  else if (terms.dtype == DType::kBFloat16)
    accumulate_of<Bf16>(m, rows, coefficients, terms, length, overwrite);
  else
    accumulate_of<Half>(m, rows, coefficients, terms, length, overwrite);
}

}  // namespace
}  // namespace cpu
}  // namespace gapo
