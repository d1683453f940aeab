#include "min_norm.h"

#include "api.h"
#include "min_norm_search.h"

namespace gapo {
namespace cpu {
namespace {

using minnorm::Candidate;
using minnorm::Found;
using minnorm::Scaled;

constexpr int kEnumerated = 8;  // up to so many tied rows, try all their subsets

// The next larger number with as many bits set.
uint32_t next_of_equal_size(uint32_t bits) {
  const uint32_t lowest = bits & -bits;
  const uint32_t carried = bits + lowest;
  return carried | ((bits ^ carried) >> 2) / lowest;
}

// Tries every support set of some `rows`, smaller ones first, until one solves the problem.
template <int Max>
void enumerate(const Scaled<Max>& problem, uint32_t rows, Found<Max>& best) {
  int members[Max];
  int count = 0;
  for (int i = 0; i < problem.m; ++i) {
    if (rows >> i & 1u) members[count++] = i;
  }
  best.residual = minnorm::kRejected;
  best.support = 0;
  Candidate<Max> candidate;
  minnorm::Workspace<Max> work;
  for (int size = 1; size <= count; ++size) {
    for (uint32_t subset = (1u << size) - 1; subset < 1u << count;
         subset = next_of_equal_size(subset)) {
      uint32_t support = 0;
      for (int i = 0; i < count; ++i) support |= (subset >> i & 1u) << members[i];
      const double residual = minnorm::try_support<Max>(problem, support, work, candidate);
      if (!minnorm::better(residual, support, best.residual, best.support)) continue;
      best.residual = residual;
      best.support = support;
      best.solution = candidate;
      if (residual == 0.0) return;
    }
  }
}

// Whether, to rounding, only this support set can be the solution: no row outside is at its level,
// and the solution needs every row inside.
template <int Max>
bool is_unique(const Scaled<Max>& problem, const Found<Max>& found) {
  if (found.tied != 0) return false;
  if (found.solution.size == 1) return true;
  Candidate<Max> candidate;
  minnorm::Workspace<Max> work;
  for (int i = 0; i < found.solution.size; ++i) {
    const uint32_t without = found.support & ~(1u << found.solution.member[i]);
    if (minnorm::try_support<Max>(problem, without, work, candidate) == 0.0) return false;
  }
  return true;
}

template <int Max>
Status solve(const double* gram, int m, bool exclude_zero, double* weights) {
  for (int i = 0; i < m; ++i) weights[i] = 0.0;
  Scaled<Max> problem;
  const Status status = minnorm::scale<Max>(gram, m, exclude_zero, problem);
  if (status != Status::kOk) return status;
  if (problem.zero_row >= 0) {
    weights[problem.zero_row] = 1.0;
    return Status::kOk;
  }
  if (problem.m == 0) return Status::kOk;
  Found<Max> best;
  minnorm::SearchSpace<Max> space;
  minnorm::search<Max>(problem, space, best);
  if (best.residual > minnorm::kGood)
    enumerate<Max>(problem, (1u << problem.m) - 1, best);
  else if (!is_unique(problem, best) && minnorm::bit_count(best.support | best.tied) <= kEnumerated)
    enumerate<Max>(problem, best.support | best.tied, best);
  if (best.support == 0) return Status::kNotConverged;  // not positive semidefinite
  minnorm::write_weights<Max>(problem, best.solution, weights);
  return Status::kOk;
}

}  // namespace

Status min_norm(const double* gram, int m, bool exclude_zero, double* weights) {
  if (m <= kEnumerated) return solve<kEnumerated>(gram, m, exclude_zero, weights);
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
