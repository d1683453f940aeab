// What a GPU's memory gives at most, for benchmarks/kernels.py: kernels that read rows with 16-byte
// loads and add them up, one with combine_'s reads and writes, and a copy. Written without a line
// of the extension; compiled for the GPU at hand by ceilings.py. Every function returns a
// cudaError_t, 0 for success; rows start on 16-byte borders, and n, in floats, is a multiple of 4.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kMaxRows = 16;
constexpr int kThreads = 256;

struct Rows {
  const float4* rows[kMaxRows];
};

__device__ __forceinline__ float total(float4 x) { return (x.x + x.y) + (x.z + x.w); }

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// One number per block, so that the compiler leaves no load out.
__device__ void keep(float sum, float* sums) {
  __shared__ float warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float block = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) block += warps[warp];
  sums[blockIdx.x] = block;
}

// `count` vectors of every row, one row after the other.
template <int M>
__global__ void __launch_bounds__(kThreads) read_in_turn(Rows all, int64_t count, float* sums) {
  constexpr int kUnroll = 8;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float sum = 0;
  for (int i = 0; i < M; ++i) {
    int64_t k = first;
    for (; k + (kUnroll - 1) * step < count; k += kUnroll * step) {
      float4 x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) x[u] = __ldcs(all.rows[i] + k + u * step);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum += total(x[u]);
    }
    for (; k < count; k += step) sum += total(__ldcs(all.rows[i] + k));
  }
  keep(sum, sums);
}

// The same, a vector of every row in turn. About 8 loads of a thread are in flight.
template <int M>
__global__ void __launch_bounds__(kThreads)
    read_side_by_side(Rows all, int64_t count, float* sums) {
  constexpr int kUnroll = M >= 8 ? 1 : 8 / M;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float sum = 0;
  for (; k + (kUnroll - 1) * step < count; k += kUnroll * step) {
    float4 x[kUnroll][M];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < M; ++i) x[u][i] = __ldcs(all.rows[i] + k + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < M; ++i) sum += total(x[u][i]);
    }
  }
  for (; k < count; k += step) {
#pragma unroll
    for (int i = 0; i < M; ++i) sum += total(__ldcs(all.rows[i] + k));
  }
  keep(sum, sums);
}

// Reads M rows and writes their sum, which may lie on one of them: a thread reads before it writes.
template <int M>
__global__ void __launch_bounds__(kThreads) sum_rows(Rows all, int64_t count, float4* out) {
  constexpr int kUnroll = M >= 4 ? 1 : 4 / M;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  for (; k + (kUnroll - 1) * step < count; k += kUnroll * step) {
    float4 x[kUnroll][M];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < M; ++i) x[u][i] = __ldcs(all.rows[i] + k + u * step);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float4 sum = x[u][0];
#pragma unroll
      for (int i = 1; i < M; ++i) sum = sum + x[u][i];
      __stcs(out + k + u * step, sum);
    }
  }
  for (; k < count; k += step) {
    float4 sum = __ldcs(all.rows[0] + k);
#pragma unroll
    for (int i = 1; i < M; ++i) sum = sum + __ldcs(all.rows[i] + k);
    __stcs(out + k, sum);
  }
}

Rows collect(const float* const* rows, int m) {
  Rows all = {};
  for (int i = 0; i < m; ++i) all.rows[i] = reinterpret_cast<const float4*>(rows[i]);
  return all;
}

// Blocks that fill the device `waves` times, and no more than there is work for. 0: an error
// occurred.
template <class Kernel>
int grid_size(Kernel kernel, int64_t count, int waves) {
  int device = 0, processors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0) != cudaSuccess)
    return 0;
  const int64_t wanted = int64_t(processors) * blocks * waves;
  const int64_t most = (count + kThreads - 1) / kThreads;
  return int(wanted < most ? wanted : most);
}

template <class Kernel, class Out>
int launch(Kernel kernel, const Rows& all, int64_t count, int waves, Out* out, int most_blocks,
           cudaStream_t stream) {
  int blocks = grid_size(kernel, count, waves);
  if (blocks == 0) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorInvalidValue : error;
  }
  if (blocks > most_blocks) blocks = most_blocks;
  kernel<<<blocks, kThreads, 0, stream>>>(all, count, out);
  return cudaGetLastError();
}

template <int M>
int read(const Rows& all, int m, int64_t count, int side_by_side, int waves, float* sums, int most,
         cudaStream_t stream) {
  if constexpr (M > 1) {
    if (m != M) return read<M - 1>(all, m, count, side_by_side, waves, sums, most, stream);
  }
  return side_by_side ? launch(read_side_by_side<M>, all, count, waves, sums, most, stream)
                      : launch(read_in_turn<M>, all, count, waves, sums, most, stream);
}

template <int M>
int combine(const Rows& all, int m, float4* out, int64_t count, int waves, cudaStream_t stream) {
  if constexpr (M > 1) {
    if (m != M) return combine<M - 1>(all, m, out, count, waves, stream);
  }
  return launch(sum_rows<M>, all, count, waves, out, INT32_MAX, stream);
}

bool fits(int m, int64_t n) { return 1 <= m && m <= kMaxRows && n > 0 && n % 4 == 0; }

}  // namespace

extern "C" {

// Reads m rows of n floats: all rows at once (`side_by_side`), else one after the other. `waves`:
// how often the blocks fill the device. `sums` has room for `most_blocks` floats.
int ceiling_read(const float* const* rows, int m, int64_t n, int side_by_side, int waves,
                 float* sums, int most_blocks, void* stream) {
  if (!fits(m, n)) return cudaErrorInvalidValue;
  return read<kMaxRows>(collect(rows, m), m, n / 4, side_by_side, waves, sums, most_blocks,
                        static_cast<cudaStream_t>(stream));
}

// Reads m rows of n floats and writes their sum.
int ceiling_combine(const float* const* rows, int m, float* out, int64_t n, int waves,
                    void* stream) {
  if (!fits(m, n)) return cudaErrorInvalidValue;
  return combine<kMaxRows>(collect(rows, m), m, reinterpret_cast<float4*>(out), n / 4, waves,
                           static_cast<cudaStream_t>(stream));
}

// Copies n floats: the kernel above with one row.
int ceiling_copy(const float* from, float* to, int64_t n, int waves, void* stream) {
  if (!fits(1, n)) return cudaErrorInvalidValue;
  return combine<1>(collect(&from, 1), 1, reinterpret_cast<float4*>(to), n / 4, waves,
                    static_cast<cudaStream_t>(stream));
}

const char* ceiling_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
