// The minimum-norm point in one small block. For up to 8 rows it has one thread per support set;
// for more rows one thread runs Wolfe's algorithm.
#include "cuda/device.cuh"
#include "min_norm_search.h"

namespace gapo {
namespace cuda {
namespace {

constexpr int kEnumerated = 8;
constexpr int kThreads = 1 << kEnumerated;
// The largest residual that the search may return; it aims at minnorm::kGood.
constexpr double kAccepted = 1e-9;

// Common start of both kernels, on one thread. Returns whether there is something left to solve.
template <int Max>
__device__ bool prepare(const double* gram, int m, bool exclude_zero, minnorm::Scaled<Max>& problem,
                        double* weights, int32_t* status) {
  for (int i = 0; i < m; ++i) weights[i] = 0.0;
  const Status found = minnorm::scale<Max>(gram, m, exclude_zero, problem);
  *status = static_cast<int32_t>(found);
  if (found != Status::kOk) return false;
  if (problem.zero_row >= 0) weights[problem.zero_row] = 1.0;
  return problem.zero_row < 0 && problem.m > 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    enumerate_kernel(const double* gram, int m, bool exclude_zero, double* weights,
                     int32_t* status) {
  __shared__ minnorm::Scaled<kEnumerated> problem;
  __shared__ double residuals[kThreads];
  __shared__ uint32_t supports[kThreads];
  __shared__ bool open;
  const uint32_t mine = threadIdx.x;
  if (mine == 0) open = prepare<kEnumerated>(gram, m, exclude_zero, problem, weights, status);
  __syncthreads();
  if (!open) return;
  minnorm::Workspace<kEnumerated> work;
  minnorm::Candidate<kEnumerated> candidate;
  residuals[mine] = minnorm::kRejected;
  supports[mine] = mine;
  if (mine != 0 && mine < 1u << problem.m)
    residuals[mine] = minnorm::try_support<kEnumerated>(problem, mine, work, candidate);
  for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (mine >= half) continue;
    const uint32_t other = mine + half;
    if (!minnorm::better(residuals[other], supports[other], residuals[mine], supports[mine]))
      continue;
    residuals[mine] = residuals[other];
    supports[mine] = supports[other];
  }
  __syncthreads();
  if (mine != supports[0]) return;
  if (residuals[0] < minnorm::kRejected)
    minnorm::write_weights<kEnumerated>(problem, candidate, weights);
  else
    *status = static_cast<int32_t>(Status::kNotConverged);  // not positive semidefinite
}

__global__ void search_kernel(const double* gram, int m, bool exclude_zero, double* weights,
                              int32_t* status) {
  __shared__ minnorm::Scaled<kMaxRows> problem;
  __shared__ minnorm::SearchSpace<kMaxRows> space;
  __shared__ minnorm::Found<kMaxRows> best;
  if (!prepare<kMaxRows>(gram, m, exclude_zero, problem, weights, status)) return;
  minnorm::search<kMaxRows>(problem, space, best);
  if (best.residual <= kAccepted)
    minnorm::write_weights<kMaxRows>(problem, best.solution, weights);
  else
    *status = static_cast<int32_t>(Status::kNotConverged);
}

}  // namespace

void require_device(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, which later calls must not see again
    throw std::runtime_error(std::string("no CUDA device: ") + cudaGetErrorString(error));
  }
  if (device < 0 || device >= count)
    throw std::runtime_error("no CUDA device " + std::to_string(device) + ": found " +
                             std::to_string(count));
}

void min_norm(const double* gram, int m, bool exclude_zero, double* weights, int32_t* status,
              int device, void* stream_handle) {
  const OnDevice scope(device);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (m <= kEnumerated)
    launch("min_norm", &enumerate_kernel, 1, kThreads, stream, gram, m, exclude_zero, weights,
           status);
  else
    launch("min_norm", &search_kernel, 1, 1, stream, gram, m, exclude_zero, weights, status);
}

}  // namespace cuda
}  // namespace gapo
