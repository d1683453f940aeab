// Gram matrices on the device. Stage one: a block takes one chunk of a run, accumulates the
// products of its elements in fp32 registers (at most 64 vectors a thread), adds its threads up in
// fp64 and stores one partial sum per pair of rows. Stage two: a block per pair adds the partial
// sums. Both orders are fixed and there are no atomics, so results repeat bit for bit.
#include <algorithm>

#include "cuda/device.cuh"

namespace gapo {
namespace cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kWholeTriangle = 8;  // rows up to here take one pass
constexpr int kTile = 4;           // more are taken in tiles of this side

struct Job {
  const void* rows[2 * kTile];  // a triangle's rows, or the rectangle's two sides
  const float* weight;          // of this piece; may be null
  const int64_t* runs;          // [run_count, kRunFields] of this piece
  int64_t run_count;
  int64_t first_chunk;
  int64_t chunk_count;  // of all pieces
  double* partials;     // [pairs, chunk_count]
  int m;
  int top;     // first row of the triangle, or of the rectangle's left side
  int left;    // first row of the rectangle's other side
  int height;  // how many rows of either side are real
  int width;
};

struct Stretch {
  int64_t begin;
  int64_t end;
  int64_t chunk;  // which chunk of the run
};

__device__ Stretch find_run(const Job& job, int64_t chunk) {
  int64_t low = 0;
  int64_t high = job.run_count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (job.runs[middle * kRunFields + 2] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t* run = job.runs + low * kRunFields;
  return {run[0], run[1], chunk - run[2]};
}

// Sums of products of all pairs of R rows, i <= j.
template <int R>
struct Triangle {
  static constexpr int kRows = R;
  static constexpr int kSums = pair_count(R);
  template <class F>
  static __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = i; j < R; ++j) f(pair_index(R, i, j), i, j);
    }
  }
  static __device__ int place(const Job& job, int i, int j) {
    return pair_index(job.m, job.top + i, job.top + j);
  }
};

// Sums of products of kTile rows with kTile others.
struct Rectangle {
  static constexpr int kRows = 2 * kTile;
  static constexpr int kSums = kTile * kTile;
  template <class F>
  static __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) f(i * kTile + j, i, kTile + j);
    }
  }
  static __device__ int place(const Job& job, int i, int j) {
    const int column = j - kTile;
    if (i >= job.height || column >= job.width) return -1;  // padding
    return pair_index(job.m, job.top + i, job.left + column);
  }
};

template <class T, class Shape>
struct Accumulator {
  static constexpr int kVector = 16 / sizeof(T);
  const T* rows[Shape::kRows];
  const float* weight;
  float sums[Shape::kSums];

  __device__ __forceinline__ void add(const float (&x)[Shape::kRows], float factor) {
    Shape::for_each([&](int p, int i, int j) { sums[p] = fmaf(factor * x[i], x[j], sums[p]); });
  }

  __device__ __forceinline__ void add_element(int64_t k) {
    float x[Shape::kRows];
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) x[i] = widen(rows[i][k]);
    add(x, weight == nullptr ? 1.0f : weight[k]);
  }

  __device__ __forceinline__ void add_vector(int64_t k) {
    float x[Shape::kRows][kVector];
    float factors[kVector];
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) load_vector<kVector>(rows[i] + k, x[i]);
    if (weight != nullptr) {
      load_vector<kVector>(weight + k, factors);
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v) factors[v] = 1.0f;
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float column[Shape::kRows];
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) column[i] = x[i][v];
      add(column, factors[v]);
    }
  }

  // Elements before the rows' common 16-byte border, or -1 where they have none.
  __device__ int common_head(int64_t begin) const {
    const int head = head_length<kVector>(rows[0] + begin);
#pragma unroll
    for (int i = 1; i < Shape::kRows; ++i) {
      if (head_length<kVector>(rows[i] + begin) != head) return -1;
    }
    if (weight != nullptr && head_length<4>(weight + begin + head) != 0) return -1;
    return head;
  }

  __device__ void add_chunk(const Stretch& run) {
    const int head = common_head(run.begin);
    const int64_t low = run.begin + run.chunk * kChunk;
    if (head < 0) {
      const int64_t high = min(run.end, low + kChunk);
#pragma unroll 4
      for (int64_t k = low + threadIdx.x; k < high; k += kThreads) add_element(k);
      return;
    }
    const int64_t aligned = low + head;
    const int64_t high = min(run.end, aligned + kChunk);
    const int64_t vectors = high > aligned ? (high - aligned) / kVector : 0;
    const int64_t in_head = run.begin + threadIdx.x;
    if (run.chunk == 0 && threadIdx.x < head && in_head < run.end) add_element(in_head);
    constexpr int kUnroll = Shape::kRows <= 2 ? 4 : (Shape::kRows <= 4 ? 2 : 1);
#pragma unroll kUnroll
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) add_vector(aligned + v * kVector);
    const int64_t in_tail = aligned + vectors * kVector + threadIdx.x;
    if (in_tail < high) add_element(in_tail);
  }
};

// Two blocks a multiprocessor: left alone, ptxas aims at more of them and spills.
template <class T, class Shape>
__global__ void __launch_bounds__(kThreads, 2) partial_sums(Job job) {
  const int64_t chunk = job.first_chunk + blockIdx.x;
  Accumulator<T, Shape> accumulator;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) accumulator.rows[i] = static_cast<const T*>(job.rows[i]);
  accumulator.weight = job.weight;
#pragma unroll
  for (int p = 0; p < Shape::kSums; ++p) accumulator.sums[p] = 0.0f;
  accumulator.add_chunk(find_run(job, chunk));

  __shared__ double warp_sums[kWarps][Shape::kSums];
#pragma unroll
  for (int p = 0; p < Shape::kSums; ++p) {
    double sum = accumulator.sums[p];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][p] = sum;
  }
  __syncthreads();
  Shape::for_each([&](int p, int i, int j) {
    if (threadIdx.x != p) return;
    const int place = Shape::place(job, i, j);
    if (place < 0) return;
    double sum = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][p];
    job.partials[place * job.chunk_count + chunk] = sum;
  });
}

__global__ void __launch_bounds__(kThreads)
    total_sums(const double* partials, int64_t chunk_count, int m, double* out) {
  __shared__ double sums[kThreads];
  const double* mine = partials + blockIdx.x * chunk_count;
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunk_count; chunk += kThreads) sum += mine[chunk];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  int i = 0;
  int j = blockIdx.x;
  for (; j >= m - i; ++i) j -= m - i;
  j += i;
  out[i * m + j] += sums[0];
  if (i != j) out[j * m + i] += sums[0];
}

template <class T, class Shape>
void launch(const Job& job, int64_t blocks, cudaStream_t stream) {
  partial_sums<T, Shape><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(job);
  check(cudaGetLastError(), "gramian");
}

template <class T, int R>
void launch_triangle(int rows_here, const Job& job, int64_t blocks, cudaStream_t stream) {
  if constexpr (R > 0) {
    if (rows_here == R)
      launch<T, Triangle<R>>(job, blocks, stream);
    else
      launch_triangle<T, R - 1>(rows_here, job, blocks, stream);
  }
}

template <class T>
void launch_piece(const Rows& rows, int64_t piece, Job job, int64_t blocks, cudaStream_t stream) {
  const int side = rows.m <= kWholeTriangle ? kWholeTriangle : kTile;
  for (int top = 0; top < rows.m; top += side) {
    job.top = top;
    job.height = std::min(side, rows.m - top);
    for (int i = 0; i < job.height; ++i) job.rows[i] = rows.piece(top + i, piece);
    launch_triangle<T, kWholeTriangle>(job.height, job, blocks, stream);
    for (int left = top + side; left < rows.m; left += side) {
      job.left = left;
      job.width = std::min(side, rows.m - left);
      for (int j = 0; j < kTile; ++j)  // beyond the last row: any valid one, its sums are dropped
        job.rows[kTile + j] = rows.piece(left + std::min(j, job.width - 1), piece);
      launch<T, Rectangle>(job, blocks, stream);
    }
  }
}

}  // namespace

void gramian(const Rows& rows, const std::vector<const float*>& weights, const Plan& plan,
             const int64_t* device_table, double* workspace, double* out, int device,
             void* stream_handle) {
  const OnDevice scope(device);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Job job{};
  job.m = rows.m;
  job.partials = workspace;
  job.chunk_count = plan.first_chunk.back();
  if (job.chunk_count == 0) return;
  for (int64_t piece = 0; piece < rows.pieces(); ++piece) {
    const int64_t blocks = plan.first_chunk[piece + 1] - plan.first_chunk[piece];
    if (blocks == 0) continue;
    job.weight = weights.empty() ? nullptr : weights[piece];
    job.runs = device_table + plan.first_run[piece] * kRunFields;
    job.run_count = plan.first_run[piece + 1] - plan.first_run[piece];
    job.first_chunk = plan.first_chunk[piece];
    if (rows.dtype == DType::kFloat32)
      launch_piece<float>(rows, piece, job, blocks, stream);
    else if (rows.dtype == DType::kBFloat16)
      launch_piece<Bf16>(rows, piece, job, blocks, stream);
    else
      launch_piece<Half>(rows, piece, job, blocks, stream);
  }
  total_sums<<<pair_count(rows.m), kThreads, 0, stream>>>(workspace, job.chunk_count, rows.m, out);
  check(cudaGetLastError(), "gramian");
}

}  // namespace cuda
}  // namespace gapo
