// The minimum-norm point in one small block, a thread for every support set of at most 8 rows.
#include "cuda/device.cuh"
#include "min_norm.h"

namespace gapo {
namespace cuda {
namespace {

constexpr int kRows = kMaxRowsMinNorm;
static_assert(1 << kRows == kThreads, "a thread for every support set");

__global__ void __launch_bounds__(kThreads, 1)
    min_norm_kernel(const double* gram, int m, double* weights, int32_t* status) {
  __shared__ minnorm::Scaled<kRows> problem;
  __shared__ double residuals[kThreads];
  __shared__ int found;
  __shared__ uint32_t best;
  const uint32_t support = threadIdx.x;
  if (support < m) weights[support] = 0.0;
  if (support == 0) {
    found = minnorm::scale<kRows>(gram, m, problem);
    *status = found;
  }
  __syncthreads();
  if (found != 0) return;
  if (problem.zero_row >= 0) {
    if (support == 0) weights[problem.zero_row] = 1.0;
    return;
  }
  minnorm::Candidate<kRows> candidate;
  residuals[support] = minnorm::kRejected;
  if (support != 0 && support < 1u << m)
    residuals[support] = minnorm::try_support<kRows>(problem, support, candidate);
  __syncthreads();
  if (support == 0) {
    best = 1;
    for (uint32_t other = 2; other < 1u << m; ++other) {
      if (minnorm::better(residuals[other], other, residuals[best], best)) best = other;
    }
  }
  __syncthreads();
  if (support == best) minnorm::write_weights<kRows>(problem, candidate, weights);
}

}  // namespace

void require_device(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it was told; later calls must not see it again
    throw std::runtime_error(std::string("no CUDA device: ") + cudaGetErrorString(error));
  }
  if (device < 0 || device >= count)
    throw std::runtime_error("no CUDA device " + std::to_string(device) + ": found " +
                             std::to_string(count));
}

void min_norm(const double* gram, int m, double* weights, int32_t* status, int device,
              void* stream) {
  const OnDevice scope(device);
  min_norm_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(gram, m, weights, status);
  check(cudaGetLastError(), "min_norm");
}

}  // namespace cuda
}  // namespace gapo
