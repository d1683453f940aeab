// Wolfe's algorithm, for host and device: it finds the support set of the minimum-norm point
// without trying all sets. min_norm.h defines the notation.
#pragma once

#include "min_norm.h"

namespace gapo {
namespace minnorm {

template <int Max>
struct SearchSpace {
  Workspace<Max> work;
  Candidate<Max> target;
  double w[Max];
};

template <int Max>
struct Found {
  double residual;
  uint32_t support;
  uint32_t tied;  // rows outside at the support's level
  Candidate<Max> solution;
};

// Moves the weights `w` towards the affine minimiser of their support set until the first of them
// vanishes. Returns the remaining support set.
template <int Max>
GAPO_HD uint32_t step_to_boundary(const Scaled<Max>& s, const Candidate<Max>& target,
                                  uint32_t support, double (&w)[Max]) {
  double goal[Max];
  double step = 1.0;
  int leaving = -1;
  for (int j = 0; j < target.size; ++j) {
    const int i = target.member[j];
    goal[j] = target.v[j] * power_of_two(target.reference - s.exponent[i]);
    if (goal[j] > 0.0) continue;
    const double reach = w[i] > 0.0 ? w[i] / (w[i] - goal[j]) : 0.0;
    if (leaving < 0 || reach < step) {
      step = reach;
      leaving = i;
    }
  }
  for (int j = 0; j < target.size; ++j) {
    const int i = target.member[j];
    w[i] += step * (goal[j] - w[i]);
    if (i == leaving || !(w[i] > 0.0)) {
      w[i] = 0.0;
      support &= ~(1u << i);
    }
  }
  return support;
}

template <int Max>
GAPO_HD int smallest_row(const Scaled<Max>& s) {
  int least = 0;
  for (int i = 1; i < s.m; ++i) {
    const int shift = 2 * (s.exponent[i] - s.exponent[least]);
    if (s.c[i][i] * power_of_two(shift) < s.c[least][least]) least = i;
  }
  return least;
}

// "Finding the nearest point in a polytope" (Wolfe 1976): the support set gains the row that
// violates optimality most and loses rows whose weight would become negative. `best` is the best
// candidate seen; a residual above kGood means that rounding stopped the search early.
template <int Max>
GAPO_HD void search(const Scaled<Max>& s, SearchSpace<Max>& space, Found<Max>& best) {
  Candidate<Max>& target = space.target;
  best.residual = kRejected;
  uint32_t support = 1u << smallest_row<Max>(s);
  for (int i = 0; i < s.m; ++i) space.w[i] = support >> i & 1u ? 1.0 : 0.0;
  for (int round = 0; round < 8 * s.m && support != 0; ++round) {
    if (!solve<Max>(s, support, false, space.work, target)) return;
    if (!is_positive<Max>(target)) {
      support = step_to_boundary<Max>(s, target, support, space.w);
      continue;
    }
    to_simplex<Max>(s, target, space.w);
    Outside outside;
    const double found = residual<Max>(s, support, target, outside);
    if (found < best.residual) {
      best.residual = found;
      best.support = support;
      best.tied = outside.tied;
      best.solution = target;
    }
    if (outside.entering < 0 || found <= kGood) return;
    support |= 1u << outside.entering;
  }
}

}  // namespace minnorm
}  // namespace gapo
