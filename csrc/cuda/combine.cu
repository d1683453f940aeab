// out = sum_i w_i row_i in one pass, with weights from device memory. Each thread reads its
// elements of every row before it writes them, so `out` may be one of the rows.
#include <algorithm>

#include "cuda/device.cuh"

namespace gapo {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // in two rounds of two

struct Job {
  const void* rows[kMaxRows];
  DType dtypes[kMaxRows];
  void* out;
  const double* weights;
  int64_t count;
  int m;
};

template <class T, class Out>
struct Shape {
  static constexpr int kVector = Source<T>::kElements == 4 && sizeof(Out) == 4 ? 4 : 8;
  static constexpr int64_t kBlockElements = int64_t(kVector) * kThreads * kVectorsPerThread;
};

template <class T>
__device__ __forceinline__ Source<T> row_of(const Job& job, int i) {
  Source<T> row;
  row.set(job.rows[i], job.dtypes[i]);
  return row;
}

template <class T, class Out>
__device__ __forceinline__ void element(const Job& job, const float* weights, int64_t k) {
  float sum = 0.0f;
  for (int i = 0; i < job.m; ++i) {
    if (weights[i] != 0.0f) sum = fmaf(weights[i], row_of<T>(job, i).at(k), sum);
  }
  narrow(sum, static_cast<Out*>(job.out)[k]);
}

template <class T, class Out, int N>
__device__ __forceinline__ void vector_pair(const Job& job, const float* weights, int64_t k,
                                            int64_t stride, bool second) {
  float a[N] = {};
  float b[N] = {};
  for (int i = 0; i < job.m; ++i) {
    const float weight = weights[i];
    if (weight == 0.0f) continue;
    const Source<T> row = row_of<T>(job, i);
    float x[N];
    float y[N] = {};
    load_vector<N>(row, k, x);
    if (second) load_vector<N>(row, k + stride, y);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      a[v] = fmaf(weight, x[v], a[v]);
      b[v] = fmaf(weight, y[v], b[v]);
    }
  }
  Out* out = static_cast<Out*>(job.out) + k;
  store_vector<N>(a, out);
  if (second) store_vector<N>(b, out + stride);
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 4) combine_kernel(Job job) {
  constexpr int N = Shape<T, Out>::kVector;
  __shared__ float weights[kMaxRows];
  if (threadIdx.x < job.m) weights[threadIdx.x] = static_cast<float>(job.weights[threadIdx.x]);
  __syncthreads();

  const int head = head_length<N>(static_cast<const Out*>(job.out));
  bool aligned = true;
  for (int i = 0; i < job.m; ++i)
    aligned = aligned && row_of<T>(job, i).template head<N>(0) == head;
  const int64_t low = blockIdx.x * Shape<T, Out>::kBlockElements;
  if (!aligned) {
    const int64_t high = min(job.count, low + Shape<T, Out>::kBlockElements);
    for (int64_t k = low + threadIdx.x; k < high; k += kThreads) element<T, Out>(job, weights, k);
    return;
  }
  const int64_t first = low + head;
  const int64_t high = min(job.count, first + Shape<T, Out>::kBlockElements);
  const int64_t whole = high > first ? first + (high - first) / N * N : first;
  if (blockIdx.x == 0 && threadIdx.x < head && threadIdx.x < job.count)
    element<T, Out>(job, weights, threadIdx.x);
  constexpr int64_t kStride = int64_t(N) * kThreads;
#pragma unroll 1
  for (int64_t k = first + threadIdx.x * N; k < whole; k += 2 * kStride)
    vector_pair<T, Out, N>(job, weights, k, kStride, k + kStride < whole);
  if (whole + threadIdx.x < high) element<T, Out>(job, weights, whole + threadIdx.x);
}

template <class T, class Out>
void launch_as(const Job& job, cudaStream_t stream) {
  const int64_t size = Shape<T, Out>::kBlockElements;
  const int64_t blocks = (job.count + size - 1) / size;
  launch("combine_", &combine_kernel<T, Out>, blocks, kThreads, stream, job);
}

template <class T>
void launch_to(DType out_dtype, const Job& job, cudaStream_t stream) {
  if (out_dtype == DType::kFloat32)
    launch_as<T, float>(job, stream);
  else if (out_dtype == DType::kBFloat16)
    launch_as<T, Bf16>(job, stream);
  else
    launch_as<T, Half>(job, stream);
}

}  // namespace

void combine(const Rows& rows, const double* weights, const std::vector<void*>& out,
             DType out_dtype, int device, void* stream_handle) {
  require_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Job job{};
  job.weights = weights;
  job.m = rows.m;
  for (int i = 0; i < rows.m; ++i) job.dtypes[i] = rows.dtypes[i];
  for (int64_t piece = 0; piece < rows.pieces(); ++piece) {
    job.count = rows.lengths[piece];
    if (job.count == 0) continue;
    job.out = out[piece];
    for (int i = 0; i < rows.m; ++i) job.rows[i] = rows.piece(i, piece);
    if (!alike(rows.m, rows.dtypes.data()))
      launch_to<Mixed>(out_dtype, job, stream);
    else if (rows.dtypes[0] == DType::kFloat32)
      launch_to<float>(out_dtype, job, stream);
    else if (rows.dtypes[0] == DType::kBFloat16)
      launch_to<Bf16>(out_dtype, job, stream);
    else
      launch_to<Half>(out_dtype, job, stream);
  }
}

}  // namespace cuda
}  // namespace gapo
