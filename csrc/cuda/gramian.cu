// Gram matrices on the device. As many blocks as the device runs at a time walk over the chunks of
// the selected runs and keep their sums in fp64 registers. Each block then sums over its threads
// and stores one partial sum per pair of rows. A second kernel adds the partial sums. The lengths
// and the device's size fix the order of both sums, and there are no atomics, so results repeat bit
// for bit.
//
// fp64 throughout, as on the CPU: products of fp32 elements are exact, and an H100 has two to four
// times the fp64 arithmetic that streaming 8 rows of fp32 needs (36 multiply-adds per element).
#include <algorithm>

#include "cuda/device.cuh"

namespace gapo {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kWholeTriangle = 8;  // up to so many rows take one pass
constexpr int kTile = 4;           // side of the tiles for more rows

// Blocks per multiprocessor. Registers limit them, and loads in flight fill the memory pipeline, so
// fewer rows get more of both.
__host__ __device__ constexpr int blocks_for(int rows) {
  return rows <= 2 ? 8 : (rows <= 4 ? 5 : (rows <= 6 ? 4 : 3));
}

struct Job {
  const void* rows[2 * kTile];  // a triangle's rows, or the rectangle's two sides
  DType dtypes[2 * kTile];
  const float* weight;  // of this piece; may be null
  FactorForm form;      // of the weight
  const int64_t* runs;  // [run_count, kRunFields] of this piece
  int64_t run_count;
  int64_t first_chunk;  // of this piece
  int64_t chunk_count;
  double* partials;  // [pairs, slots]
  int slots;
  int m;
  int top;     // first row of the triangle, or of the rectangle's left side
  int left;    // first row of the rectangle's other side
  int height;  // rows of the triangle
  int width;   // columns of the rectangle that are real
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

template <int R>
struct Occupancy {
  static constexpr int kRows = R;
  static constexpr int kBlocks = blocks_for(R);
  static constexpr int kUnroll = R <= 2 ? 4 : (R <= 4 ? 2 : 1);
};

// Sums of products of all pairs of R rows, i <= j.
template <int R>
struct Triangle : Occupancy<R> {
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
struct Rectangle : Occupancy<2 * kTile> {
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
    if (column >= job.width) return -1;  // padding
    return pair_index(job.m, job.top + i, job.left + column);
  }
};

__device__ __forceinline__ float factor_of(float value, const FactorForm& form) {
  if (!form.inverse_root) return value;
  return value <= 0.0f ? 0.0f : 1.0f / (sqrtf(value) * form.root_scale + form.epsilon);
}

template <class T, class Shape, bool kWeighted>
struct Accumulator {
  static constexpr int kVector = Source<T>::kElements;
  Source<T> rows[Shape::kRows];
  const float* weight;
  FactorForm form;
  double sums[Shape::kSums];

  __device__ __forceinline__ void add(const double (&x)[Shape::kRows], double factor) {
    Shape::for_each([&](int p, int i, int j) {
      sums[p] = fma(kWeighted ? factor * x[i] : x[i], x[j], sums[p]);
    });
  }

  __device__ __forceinline__ void add_element(int64_t k) {
    double x[Shape::kRows];
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) x[i] = rows[i].at(k);
    add(x, kWeighted ? factor_of(weight[k], form) : 1.0f);
  }

  __device__ __forceinline__ void add_vector(int64_t k) {
    decltype(rows[0].load(0)) x[Shape::kRows];
    float factors[kVector];
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) x[i] = rows[i].load(k);
    if (kWeighted) {  // all factors before the products, which needs fewer registers
      load_vector<kVector>(Source<float>{weight}, k, factors);
#pragma unroll
      for (int v = 0; v < kVector; ++v) factors[v] = factor_of(factors[v], form);
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      double column[Shape::kRows];
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) column[i] = x[i].element(v);
      add(column, kWeighted ? factors[v] : 1.0f);
    }
  }

  // Number of elements before the first one at which all rows are aligned, or -1 if there is none.
  __device__ int common_head(int64_t begin) const {
    const int head = rows[0].template head<kVector>(begin);
#pragma unroll
    for (int i = 1; i < Shape::kRows; ++i) {
      if (rows[i].template head<kVector>(begin) != head) return -1;
    }
    if (kWeighted && head_length<4>(weight + begin + head) != 0) return -1;
    return head;
  }

  __device__ __forceinline__ void add_chunk(const Stretch& run) {
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
    // Factors take registers, and add loads in flight.
    constexpr int kUnroll = kWeighted ? (Shape::kUnroll + 1) / 2 : Shape::kUnroll;
#pragma unroll kUnroll
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) add_vector(aligned + v * kVector);
    const int64_t in_tail = aligned + vectors * kVector + threadIdx.x;
    if (in_tail < high) add_element(in_tail);
  }
};

template <class T, class Shape, bool kWeighted>
__global__ void __launch_bounds__(kThreads, Shape::kBlocks) partial_sums(Job job) {
  Accumulator<T, Shape, kWeighted> accumulator;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) accumulator.rows[i].set(job.rows[i], job.dtypes[i]);
  accumulator.weight = job.weight;
  accumulator.form = job.form;
#pragma unroll
  for (int p = 0; p < Shape::kSums; ++p) accumulator.sums[p] = 0.0;
#pragma unroll 1
  for (int64_t chunk = blockIdx.x; chunk < job.chunk_count; chunk += gridDim.x)
    accumulator.add_chunk(find_run(job, job.first_chunk + chunk));

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
    // Launches for different pieces run one after the other on the stream and share the slots.
    job.partials[place * job.slots + blockIdx.x] += sum;
  });
}

__global__ void __launch_bounds__(kThreads)
    total_sums(const double* partials, int slots, int m, double* out) {
  __shared__ double sums[kThreads];
  const double* mine = partials + blockIdx.x * slots;
  double sum = 0.0;
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) sum += mine[slot];
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
void launch_shape(const Job& job, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(job.chunk_count, job.slots);
  const auto kernel =
      job.weight == nullptr ? &partial_sums<T, Shape, false> : &partial_sums<T, Shape, true>;
  launch("gramian", kernel, blocks, kThreads, stream, job);
}

template <class T, int R>
void launch_triangle(const Job& job, cudaStream_t stream) {
  if constexpr (R > 0) {
    if (job.height == R)
      launch_shape<T, Triangle<R>>(job, stream);
    else
      launch_triangle<T, R - 1>(job, stream);
  }
}

template <class T>
void launch_piece(const Rows& rows, int64_t piece, Job job, cudaStream_t stream) {
  const int side = rows.m <= kWholeTriangle ? kWholeTriangle : kTile;
  for (int top = 0; top < rows.m; top += side) {
    job.top = top;
    job.height = std::min(side, rows.m - top);
    for (int i = 0; i < job.height; ++i) {
      job.rows[i] = rows.piece(top + i, piece);
      job.dtypes[i] = rows.dtypes[top + i];
    }
    launch_triangle<T, kWholeTriangle>(job, stream);
    for (int left = top + side; left < rows.m; left += side) {
      job.left = left;
      job.width = std::min(side, rows.m - left);
      for (int j = 0; j < kTile;
           ++j) {  // past the last row take any valid one: its sums are dropped
        const int row = left + std::min(j, job.width - 1);
        job.rows[kTile + j] = rows.piece(row, piece);
        job.dtypes[kTile + j] = rows.dtypes[row];
      }
      launch_shape<T, Rectangle>(job, stream);
    }
  }
}

// Number of blocks that the device runs at a time, each with a partial sum per pair.
int slots_for(int m, int device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "gramian");
  return multiprocessors * blocks_for(m);
}

}  // namespace

int64_t workspace_size(int m, int device) {
  require_device(device);
  return int64_t(pair_count(m)) * slots_for(m, device);
}

void gramian(const Rows& rows, const std::vector<const float*>& weights, const FactorForm& form,
             const Plan& plan, const int64_t* device_table, double* workspace, double* out,
             int device, void* stream_handle) {
  require_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (plan.first_chunk.back() == 0) return;
  Job job{};
  job.m = rows.m;
  job.partials = workspace;
  job.slots = slots_for(rows.m, device);
  job.form = form;
  const size_t bytes = sizeof(double) * pair_count(rows.m) * job.slots;
  check(cudaMemsetAsync(workspace, 0, bytes, stream), "gramian");
  for (int64_t piece = 0; piece < rows.pieces(); ++piece) {
    job.first_chunk = plan.first_chunk[piece];
    job.chunk_count = plan.first_chunk[piece + 1] - job.first_chunk;
    if (job.chunk_count == 0) continue;
    job.weight = weights.empty() ? nullptr : weights[piece];
    job.runs = device_table + plan.first_run[piece] * kRunFields;
    job.run_count = plan.first_run[piece + 1] - plan.first_run[piece];
    if (!alike(rows.m, rows.dtypes.data()))
      launch_piece<Mixed>(rows, piece, job, stream);
    else if (rows.dtypes[0] == DType::kFloat32)
      launch_piece<float>(rows, piece, job, stream);
    else if (rows.dtypes[0] == DType::kBFloat16)
      launch_piece<Bf16>(rows, piece, job, stream);
    else
      launch_piece<Half>(rows, piece, job, stream);
  }
  launch("gramian", &total_sums, pair_count(rows.m), kThreads, stream,
         static_cast<const double*>(workspace), job.slots, rows.m, out);
}

}  // namespace cuda
}  // namespace gapo
