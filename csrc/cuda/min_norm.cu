// The minimum-norm point in one small block. For up to 8 rows it has one thread per support set;
// for more rows one thread runs Wolfe's algorithm, and where up to 8 rows are tied, tries their
// sets.
#include "cuda/device.cuh"
#include "min_norm_corners.h"

namespace gapo {
namespace cuda {
namespace {

constexpr int kEnumerated = 8;
constexpr int kThreads = 1 << kEnumerated;

// Common start of both kernels, on one thread. Returns whether there is something left to solve.
template <int Max>
__device__ bool prepare(const double* gram, int m, bool exclude_zero, minnorm::Scaled<Max>& problem,
                        double* weights, int32_t* status) {
  for (int i = 0; i < m; ++i) weights[i] = 0.0;
  const Status found = minnorm::scale<Max>(gram, m, exclude_zero, problem);
  *status = static_cast<int32_t>(found);
  if (found != Status::kOk) return false;
  if (problem.zero_rows != 0) minnorm::write_zero_rows<Max>(problem, m, weights);
  return problem.zero_rows == 0 && problem.m > 0;
}

// Writes the mean over the corners, added up in the host's order: smaller sets first.
__device__ void write_corners(const minnorm::Scaled<kEnumerated>& problem,
                              const bool (&corner)[kThreads], const double (&residuals)[kThreads],
                              const double (&shares)[kThreads][kEnumerated],
                              minnorm::Candidate<kEnumerated>& scratch, double* weights) {
  double sum[kEnumerated] = {};
  uint32_t first = 0;
  int count = 0;
  for (int size = 1; size <= problem.m; ++size) {
    for (uint32_t set = 1; set < 1u << problem.m; ++set) {
      if (minnorm::bit_count(set) != size) continue;
      if (residuals[set] < residuals[first]) first = set;
      if (!corner[set]) continue;
      for (int i = 0; i < problem.m; ++i) sum[i] += shares[set][i];
      ++count;
    }
  }
  minnorm::write_mean<kEnumerated>(problem, sum, count, shares[first], scratch, weights);
}

__global__ void __launch_bounds__(kThreads, 1)
    enumerate_kernel(const double* gram, int m, bool exclude_zero, double* weights,
                     int32_t* status) {
  __shared__ minnorm::Scaled<kEnumerated> problem;
  __shared__ double residuals[kThreads];
  __shared__ double least[kThreads];
  __shared__ double shares[kThreads][kEnumerated];
  __shared__ bool corner[kThreads];
  __shared__ bool open;
  const uint32_t mine = threadIdx.x;
  if (mine == 0) open = prepare<kEnumerated>(gram, m, exclude_zero, problem, weights, status);
  __syncthreads();
  if (!open) return;
  minnorm::Workspace<kEnumerated> work;
  minnorm::Candidate<kEnumerated> candidate;
  residuals[mine] = minnorm::kRejected;
  if (mine != 0 && mine < 1u << problem.m)
    residuals[mine] = minnorm::try_support<kEnumerated>(problem, mine, work, candidate);
  least[mine] = residuals[mine];
  for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (mine < half) least[mine] = fmin(least[mine], least[mine + half]);
  }
  __syncthreads();
  if (least[0] >= minnorm::kRejected) {
    if (mine == 0) *status = static_cast<int32_t>(Status::kNotConverged);  // not semidefinite
    return;
  }
  const double accepted = minnorm::as_good_as(least[0]);
  corner[mine] = residuals[mine] <= accepted;
  for (uint32_t part = (mine - 1) & mine; part != 0 && corner[mine]; part = (part - 1) & mine)
    corner[mine] = !(residuals[part] <= accepted);
  if (residuals[mine] < minnorm::kRejected)
    minnorm::to_simplex<kEnumerated>(problem, candidate, shares[mine]);
  __syncthreads();
  if (mine == 0) write_corners(problem, corner, residuals, shares, candidate, weights);
}

__global__ void search_kernel(const double* gram, int m, bool exclude_zero, double* weights,
                              int32_t* status) {
  __shared__ minnorm::Scaled<kMaxRows> problem;
  __shared__ minnorm::Solver<kMaxRows> solver;
  if (!prepare<kMaxRows>(gram, m, exclude_zero, problem, weights, status)) return;
  if (!minnorm::solve_in_turn<kMaxRows>(problem, solver, weights))
    *status = static_cast<int32_t>(Status::kNotConverged);  // not positive semidefinite
}

}  // namespace

void min_norm(const double* gram, int m, bool exclude_zero, double* weights, int32_t* status,
              int device, void* stream_handle) {
  require_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (m <= kEnumerated)
    launch("min_norm", &enumerate_kernel, 1, kThreads, stream, gram, m, exclude_zero, weights,
           status);
  else
    launch("min_norm", &search_kernel, 1, 1, stream, gram, m, exclude_zero, weights, status);
}

}  // namespace cuda
}  // namespace gapo
