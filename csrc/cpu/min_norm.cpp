#include "min_norm.h"

#include "api.h"

namespace gapo {
namespace cpu {
namespace {

using minnorm::Candidate;
using minnorm::Scaled;
using Problem = Scaled<kMaxRows>;
using Solution = Candidate<kMaxRows>;

constexpr int kEnumerated = 8;         // up to here every support set is tried
constexpr double kGoodEnough = 1e-12;  // relative residual at which an active-set search may stop

struct Best {
  double residual = minnorm::kRejected;
  uint32_t support = 0;
  Solution solution{};

  void offer(double found, uint32_t found_support, const Solution& candidate) {
    if (!minnorm::better(found, found_support, residual, support)) return;
    residual = found;
    support = found_support;
    solution = candidate;
  }
};

void enumerate(const Problem& problem, Best& best) {
  Solution candidate{};
  for (uint32_t support = 1; support < 1u << problem.m; ++support)
    best.offer(minnorm::try_support<kMaxRows>(problem, support, candidate), support, candidate);
}

// Moves the weights `w` towards the affine minimiser of their support set until the first of them
// vanishes. Returns the support set that is left.
uint32_t step_to_boundary(const Problem& problem, const Solution& target, uint32_t support,
                          double (&w)[kMaxRows]) {
  double goal[kMaxRows];
  double step = 1.0;
  int leaving = -1;
  for (int j = 0; j < target.size; ++j) {
    const int i = target.member[j];
    goal[j] = target.v[j] * minnorm::power_of_two(target.reference - problem.exponent[i]);
    if (goal[j] > 0.0) continue;
    const double reach = w[i] / (w[i] - goal[j]);
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

int smallest_row(const Problem& problem) {
  int least = 0;
  for (int i = 1; i < problem.m; ++i) {
    const int shift = 2 * (problem.exponent[i] - problem.exponent[least]);
    if (problem.c[i][i] * minnorm::power_of_two(shift) < problem.c[least][least]) least = i;
  }
  return least;
}

// Wolfe's algorithm (Finding the nearest point in a polytope, 1976): the support set gains the row
// that violates optimality most and loses rows whose weight would turn negative.
void search(const Problem& problem, Best& best) {
  double w[kMaxRows] = {};
  uint32_t support = 1u << smallest_row(problem);
  w[smallest_row(problem)] = 1.0;
  Solution target{};
  for (int round = 0; round < 40 * problem.m && support != 0; ++round) {
    if (!minnorm::solve<kMaxRows>(problem, support, target)) return;
    if (!minnorm::is_positive<kMaxRows>(target)) {
      support = step_to_boundary(problem, target, support, w);
      continue;
    }
    minnorm::write_weights<kMaxRows>(problem, target, w);
    int entering = -1;
    const double found = minnorm::residual<kMaxRows>(problem, support, target, &entering);
    best.offer(found, support, target);
    if (entering < 0 || found == 0.0) return;
    support |= 1u << entering;
  }
}

}  // namespace

Status min_norm(const double* gram, int m, double* weights) {
  for (int i = 0; i < m; ++i) weights[i] = 0.0;
  Problem problem{};
  const auto status = static_cast<Status>(minnorm::scale<kMaxRows>(gram, m, problem));
  if (status != Status::kOk) return status;
  if (problem.zero_row >= 0) {
    weights[problem.zero_row] = 1.0;
    return Status::kOk;
  }
  Best best;
  if (m > kEnumerated) search(problem, best);
  if (!(best.residual <= kGoodEnough)) enumerate(problem, best);
  // A vertex always solves its own system, so there is a candidate.
  minnorm::write_weights<kMaxRows>(problem, best.solution, weights);
  return Status::kOk;
}

}  // namespace cpu
}  // namespace gapo
