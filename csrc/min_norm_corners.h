// The solver on one thread, for host and device: a search, and where there are several minimisers
// the mean of the corners of their polytope. min_norm.h defines the notation.
#pragma once

#include "min_norm_search.h"

namespace gapo {
namespace minnorm {

constexpr double kMean = 1e-9;  // the largest residual of a mean of corners

// The largest residual that is as good as the least one, `best`.
GAPO_HD inline double as_good_as(double best) { return best * (1.0 + 1e-3); }

// Shares the weight among the rows of norm zero, in the given matrix.
template <int Max>
GAPO_HD void write_zero_rows(const Scaled<Max>& s, int m, double* weights) {
  const double share = 1.0 / bit_count(s.zero_rows);
  for (int i = 0; i < m; ++i) {
    if (s.zero_rows >> i & 1u) weights[i] = share;
  }
}

// The next larger number with as many bits set.
GAPO_HD inline uint32_t next_of_equal_size(uint32_t bits) {
  const uint32_t lowest = bits & (~bits + 1);
  const uint32_t carried = bits + lowest;
  return carried | ((bits ^ carried) >> 2) / lowest;
}

// The corners found so far, and their weights added up.
template <int Max>
struct Corners {
  Workspace<Max> work;
  Candidate<Max> candidate;
  // A bit for every set of the rows tried: whether it is a corner or contains one.
  uint32_t above[(1u << Max) / 32];
  double sum[Max];    // one per row that takes part
  double first[Max];  // weights of the first set with the least residual
  double best;        // that residual
  int count;
};

template <int Max>
GAPO_HD bool contains_corner(const Corners<Max>& corners, uint32_t subset) {
  for (uint32_t rest = subset; rest != 0; rest &= rest - 1) {
    const uint32_t part = subset & ~(rest & (~rest + 1));
    if (corners.above[part / 32] >> part % 32 & 1u) return true;
  }
  return false;
}

// Tries every support set of some `rows`, smaller ones first. Those with a residual of at most
// `accepted` that contain no smaller one are corners.
template <int Max>
GAPO_HD void find_corners(const Scaled<Max>& s, uint32_t rows, double accepted,
                          Corners<Max>& corners) {
  int members[Max];
  int count = 0;
  for (int i = 0; i < s.m; ++i) {
    if (rows >> i & 1u) members[count++] = i;
    corners.sum[i] = 0.0;
  }
  for (uint32_t& word : corners.above) word = 0;
  corners.best = kRejected;
  corners.count = 0;
  for (int size = 1; size <= count; ++size) {
    for (uint32_t subset = (1u << size) - 1; subset < 1u << count;
         subset = next_of_equal_size(subset)) {
      bool above = contains_corner<Max>(corners, subset);
      if (!above) {
        uint32_t support = 0;
        for (int i = 0; i < count; ++i) support |= (subset >> i & 1u) << members[i];
        const double residual = try_support<Max>(s, support, corners.work, corners.candidate);
        if (residual >= kRejected) continue;
        double mine[Max];
        to_simplex<Max>(s, corners.candidate, mine);
        above = residual <= accepted;
        for (int i = 0; i < s.m; ++i) {
          if (above) corners.sum[i] += mine[i];
          if (residual < corners.best) corners.first[i] = mine[i];
        }
        if (above) ++corners.count;
        if (residual < corners.best) corners.best = residual;
      }
      if (above) corners.above[subset / 32] |= 1u << subset % 32;
    }
  }
}

// The violation of the optimality conditions by any weights, one per row that takes part.
template <int Max>
GAPO_HD double residual_of(const Scaled<Max>& s, const double (&weights)[Max],
                           Candidate<Max>& candidate) {
  candidate.size = 0;
  uint32_t support = 0;
  for (int i = 0; i < s.m; ++i) {
    if (!(weights[i] > 0.0)) continue;
    if (candidate.size == 0 || s.exponent[i] < candidate.reference)
      candidate.reference = s.exponent[i];
    candidate.member[candidate.size++] = static_cast<int8_t>(i);
    support |= 1u << i;
  }
  for (int j = 0; j < candidate.size; ++j) {
    const int i = candidate.member[j];
    candidate.v[j] = weights[i] * power_of_two(s.exponent[i] - candidate.reference);
  }
  Outside outside;
  return residual<Max>(s, support, candidate, outside);
}

// Writes the mean of the corners, if it is a minimum: it is not where rounding made the matrix
// indefinite. Then the first of the best sets is taken.
template <int Max>
GAPO_HD void write_mean(const Scaled<Max>& s, const double (&sum)[Max], int count,
                        const double (&first)[Max], Candidate<Max>& scratch, double* weights) {
  double mean[Max];
  for (int i = 0; i < s.m; ++i) mean[i] = sum[i] / count;
  const bool minimum = count == 1 || residual_of<Max>(s, mean, scratch) <= kMean;
  for (int i = 0; i < s.m; ++i) weights[s.row[i]] = minimum ? mean[i] : first[i];
}

// Whether, to rounding, only this support set can be the solution: no row outside is at its level,
// and the solution needs every row inside.
template <int Max>
GAPO_HD bool is_unique(const Scaled<Max>& s, const Found<Max>& found, Corners<Max>& scratch) {
  if (found.tied != 0) return false;
  if (found.solution.size == 1) return true;
  for (int i = 0; i < found.solution.size; ++i) {
    const uint32_t without = found.support & ~(1u << found.solution.member[i]);
    if (try_support<Max>(s, without, scratch.work, scratch.candidate) == 0.0) return false;
  }
  return true;
}

template <int Max>
struct Solver {
  SearchSpace<Max> space;
  Found<Max> found;
  Corners<Max> corners;
};

// Searches, and where the minimiser is not unique, or rounding stopped the search, tries sets.
// Returns false if there is no solution: the matrix is not positive semidefinite.
template <int Max>
GAPO_HD bool solve_in_turn(const Scaled<Max>& s, Solver<Max>& solver, double* weights) {
  Found<Max>& found = solver.found;
  Corners<Max>& corners = solver.corners;
  search<Max>(s, solver.space, found);
  const bool solved = found.residual <= kGood;
  if (solved && is_unique<Max>(s, found, corners)) {
    write_weights<Max>(s, found.solution, weights);
    return true;
  }
  const uint32_t rows = solved ? found.support | found.tied : (1u << s.m) - 1;
  find_corners<Max>(s, rows, 0.0, corners);
  if (corners.best >= kRejected) return false;
  if (corners.count == 0) find_corners<Max>(s, rows, as_good_as(corners.best), corners);
  write_mean<Max>(s, corners.sum, corners.count, corners.first, corners.candidate, weights);
  return true;
}

}  // namespace minnorm
}  // namespace gapo
