// combine in fp32 vectors: the second part of kernels.inl, which includes this file.

namespace gapo {
namespace cpu {
namespace {

// sum_i weights[i] row_i[k ..] for M rows, or for m rows if M is 0.
template <int M, class T>
__attribute__((always_inline)) inline Vec weighted_sum(int m, const T* const* rows,
                                                       const Vec* weights, int64_t k) {
  const int count = M > 0 ? M : m;
  Vec sum = multiply(weights[0], load(rows[0] + k));
#pragma GCC unroll 8
  for (int i = 1; i < count; ++i) sum = multiply_add(weights[i], load(rows[i] + k), sum);
  return sum;
}

// Combines the whole vectors of the rows. Returns how many elements they hold.
template <int M, class T, class Out>
int64_t combine_vectors(int m, const T* const* rows, const Vec* weights, Out* out, int64_t count) {
  constexpr int64_t kVec = Vec::kLanes;
  constexpr int kSlots = M > 0 ? M : kMaxRows;
  const int used = M > 0 ? M : m;
  // Nothing else points to these copies, so the compiler can keep them in registers.
  const T* mine[kSlots];
  Vec factors[kSlots];
  for (int i = 0; i < used; ++i) {
    mine[i] = rows[i];
    factors[i] = weights[i];
  }
  int64_t k = 0;
  for (; k + 2 * kVec <= count; k += 2 * kVec) {
#pragma GCC unroll 8
    for (int i = 0; i < used; ++i)
      __builtin_prefetch(reinterpret_cast<const char*>(mine[i] + k) + kAhead);
    const Vec even = weighted_sum<M>(m, mine, factors, k);
    const Vec odd = weighted_sum<M>(m, mine, factors, k + kVec);
    store(even, out + k);
    store(odd, out + k + kVec);
  }
  for (; k + kVec <= count; k += kVec) store(weighted_sum<M>(m, mine, factors, k), out + k);
  return k;
}

template <int M, class T, class Out>
int64_t pick_combine(int m, const T* const* rows, const Vec* weights, Out* out, int64_t count) {
  if constexpr (M > 0) {
    if (m != M) return pick_combine<M - 1>(m, rows, weights, out, count);
  }
  return combine_vectors<M>(m, rows, weights, out, count);
}

template <class T, class Out>
void combine_run(int m, const void* const* rows, const float* weights, void* out, int64_t count) {
  constexpr int kUnrolled = 8;  // up to so many rows have an unrolled loop
  const T* pointers[kMaxRows];
  Vec factors[kMaxRows];
  for (int i = 0; i < m; ++i) {
    pointers[i] = static_cast<const T*>(rows[i]);
    factors[i] = Vec::broadcast(weights[i]);
  }
  Out* target = static_cast<Out*>(out);
  const int64_t k = pick_combine<kUnrolled>(m, pointers, factors, target, count);
  if (k == count) return;
  constexpr int kVec = Vec::kLanes;
  T padded[kMaxRows][kVec] = {};
  for (int i = 0; i < m; ++i) {
    std::memcpy(padded[i], pointers[i] + k, (count - k) * sizeof(T));
    pointers[i] = padded[i];
  }
  Out result[kVec];
  store(weighted_sum<0>(m, pointers, factors, 0), result);
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

// Combines rows of different types in blocks of floats. Reads a whole block before writing it,
// because `out` may be a row.
void combine_mixed(int m, const void* const* rows, const DType* dtypes, const float* weights,
                   void* out, DType out_dtype, int64_t count) {
  alignas(64) float buffer[kMaxRows][kBlock];
  const void* floats[kMaxRows];
  for (int64_t k = 0; k < count; k += kBlock) {
    const int64_t here = count - k < kBlock ? count - k : kBlock;
    for (int i = 0; i < m; ++i)
      floats[i] = to_floats(advance(rows[i], k, dtypes[i]), dtypes[i], here, buffer[i]);
    char* target = static_cast<char*>(out) + k * element_size(out_dtype);
    combine_of<float>(m, floats, weights, target, out_dtype, here);
  }
}

void combine(int m, const void* const* rows, const DType* dtypes, const float* weights, void* out,
             DType out_dtype, int64_t count) {
  if (!alike(m, dtypes))
    combine_mixed(m, rows, dtypes, weights, out, out_dtype, count);
  else if (dtypes[0] == DType::kFloat32)
    combine_of<float>(m, rows, weights, out, out_dtype, count);
  else if (dtypes[0] == DType::kBFloat16)
    combine_of<Bf16>(m, rows, weights, out, out_dtype, count);
  else
    combine_of<Half>(m, rows, weights, out, out_dtype, count);
}

}  // namespace
}  // namespace cpu
}  // namespace gapo
