#include "api.h"
#include "min_norm_corners.h"

namespace gapo {
namespace cpu {
namespace {

constexpr int kFewRows = 8;  // up to so many, small arrays will do

template <int Max>
Status solve(const double* gram, int m, bool exclude_zero, double* weights) {
  for (int i = 0; i < m; ++i) weights[i] = 0.0;
  minnorm::Scaled<Max> problem;
  const Status status = minnorm::scale<Max>(gram, m, exclude_zero, problem);
  if (status != Status::kOk) return status;
  if (problem.zero_rows != 0) {
    minnorm::write_zero_rows<Max>(problem, m, weights);
    return Status::kOk;
  }
  if (problem.m == 0) return Status::kOk;
  minnorm::Solver<Max> solver;
  return minnorm::solve_in_turn<Max>(problem, solver, weights) ? Status::kOk
                                                               : Status::kNotConverged;
}

}  // namespace

Status min_norm(const double* gram, int m, bool exclude_zero, double* weights) {
  if (m <= kFewRows) return solve<kFewRows>(gram, m, exclude_zero, weights);
  return solve<kMaxRows>(gram, m, exclude_zero, weights);
}

double duality_gap(const double* gram, int m, const double* weights) {
  minnorm::Twofold quadratic;
  double least = HUGE_VAL;
  for (int i = 0; i < m; ++i) {
    minnorm::Twofold change;
    for (int j = 0; j < m; ++j) {
      change.add_product(gram[i * m + j], weights[j]);
      quadratic.add_product(weights[i] * gram[i * m + j], weights[j]);
    }
    least = std::fmin(least, change.value());
  }
  return quadratic.value() - least;
}

}  // namespace cpu
}  // namespace gapo
