// The minimum-norm point of a simplex from its Gram matrix, support set by support set. The host
// solver uses it, and the CUDA kernel with one thread per support set. Both give equal bits unless
// rounding makes the matrix indefinite (denormals), which has several stationary points.
//
// Minimise w'Gw with w >= 0, sum w = 1. On a support set S the minimiser of the affine hull solves
//     [ C  -e ] [ v      ]   [ 0 ]        C_ij = G_ij / (d_i d_j),  e_i = 1 / d_i,  v_i = d_i w_i
//     [ e'  0 ] [ lambda ] = [ 1 ]
// with d_i the power of two next to sqrt(G_ii). This exact scaling to a unit diagonal treats rows
// alike whose norms differ by 1e8. A support set whose solution is positive everywhere is a
// candidate; its residual is the violation of the optimality conditions
//     (Gw)_i = w'Gw on S,  (Gw)_i >= w'Gw elsewhere
// relative to the size of the summands of (Gw)_i - w'Gw, row by row. The least residual wins, and
// residuals up to kGood are rounding and count as 0.
//
// Where several support sets have the least residual, there are several minimisers. They form a
// polytope, whose corners are the sets that contain no smaller one. The answer is the mean of the
// corners' weights: it does not depend on the order of the rows, and duplicated rows share alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"

namespace gapo {
namespace minnorm {

constexpr double kRejected = 2.0;  // above every residual: residuals are at most 1
constexpr double kGood = 1e-12;    // residuals of exact solutions stay a hundred times below
// A level of opposing rows is the rounding of the weights, 2^-53 of its summands, where it should
// be 0. With this floor it stays below kGood for a row that is orthogonal to them and has no
// summands of its own.
constexpr double kNoise = 1e-3;
// Inner products beyond Cauchy and Schwarz, and squares below 0, by this share of their summands
// are no rounding, not even that of fp32: there are no such vectors. Denormal products have no
// digits to tell it by.
constexpr double kIndefinite = 1e-5;
constexpr double kDenormal = 1e-290;
constexpr double kTied = 1e-9;  // a row this close to the level may be part of another set

// An unevaluated sum high + low: dot products with twice the precision (Dekker, Knuth).
struct Twofold {
  double high = 0.0;
  double low = 0.0;

  GAPO_HD void add_product(double a, double b) {
    const double product = a * b;
    const double product_error = fma(a, b, -product);
    const double sum = high + product;
    const double back = sum - high;
    low += ((high - (sum - back)) + (product - back)) + product_error;
    high = sum;
  }
  GAPO_HD double value() const { return high + low; }
};

template <int Max>
struct Scaled {
  int m;               // rows that take part
  int row[Max];        // their indices in the given matrix
  bool exact;          // no product is denormal
  uint32_t zero_rows;  // rows of norm zero that take part, by their indices in the given matrix
  int exponent[Max];   // d_i = 2^exponent
  double c[Max][Max];
};

// 2^exponent by its bits: the solver calls it often, and scalbn is slow.
GAPO_HD inline double power_of_two(int exponent) {
  const int limit = 1000;  // beyond, the other summands have long vanished
  const int cut = exponent > limit ? limit : (exponent < -limit ? -limit : exponent);
  const uint64_t bits = static_cast<uint64_t>(cut + 1023) << 52;
  double result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

GAPO_HD inline int exponent_of_root(double square) {
  const int half = ilogb(square);
  return half >= 0 ? half / 2 : -((1 - half) / 2);  // floor(half / 2)
}

// With `exclude_zero` rows of norm zero take no part; else each of them is the minimum.
template <int Max>
GAPO_HD Status scale(const double* gram, int m, bool exclude_zero, Scaled<Max>& s) {
  s.m = 0;
  s.zero_rows = 0;
  s.exact = true;
  for (int i = 0; i < m * m; ++i) {
    if (!(fabs(gram[i]) <= 1.7976931348623157e308)) return Status::kNotFinite;
  }
  for (int i = 0; i < m; ++i) {
    const double diagonal = gram[i * m + i];
    if (diagonal < 0.0) return Status::kNegativeDiagonal;
    if (diagonal == 0.0) {
      if (!exclude_zero) s.zero_rows |= 1u << i;
      continue;
    }
    if (diagonal < kDenormal) s.exact = false;
    s.row[s.m] = i;
    s.exponent[s.m++] = exponent_of_root(diagonal);
  }
  for (int i = 0; i < s.m; ++i) {
    for (int j = 0; j < s.m; ++j) {
      const int shift = -(s.exponent[i] + s.exponent[j]);
      const double there = gram[s.row[i] * m + s.row[j]];
      const double back = gram[s.row[j] * m + s.row[i]];
      s.c[i][j] = 0.5 * (scalbn(there, shift) + scalbn(back, shift));
      if (!(fabs(s.c[i][j]) <= 1e300)) return Status::kNotFinite;  // far beyond Cauchy and Schwarz
    }
  }
  for (int i = 0; i < s.m && s.exact; ++i) {
    for (int j = 0; j < i; ++j) {
      const double most = sqrt(s.c[i][i] * s.c[j][j]);
      const double size = fabs(s.c[i][j]);
      if (size > (1.0 + kIndefinite) * most) return Status::kNotConverged;
      // Parallel rows that rounding took further would be two minima, and which is found a matter
      // of order.
      if (size > (1.0 + 1e-15) * most) s.c[i][j] = s.c[j][i] = s.c[i][j] > 0.0 ? most : -most;
    }
  }
  return Status::kOk;
}

template <int Max>
struct Candidate {
  int size;
  int reference;       // exponent that e is relative to
  int8_t member[Max];  // rows of the support set, ascending
  double v[Max + 1];   // scaled weights of the members, then lambda
};

// Scratch memory of a solution. The caller chooses its memory: much local memory in one CUDA thread
// would make the driver reserve it for every thread that the device can hold.
template <int Max>
struct Workspace {
  double lu[Max + 1][Max + 1];
  double border[Max];  // e
  double b[Max + 1];
  int8_t order[Max + 1];
};

// Entry (i, j) of the bordered matrix of a support set.
template <int Max>
GAPO_HD double entry(const Scaled<Max>& s, const Candidate<Max>& c, const Workspace<Max>& work,
                     int i, int j) {
  if (i < c.size && j < c.size) return s.c[c.member[i]][c.member[j]];
  if (i == j) return 0.0;
  return i == c.size ? work.border[j] : -work.border[i];
}

// In-place LU factorisation with row exchanges. Returns the ratio of the least to the largest
// pivot, or 0 if one vanishes.
template <int Max>
GAPO_HD double factor(Workspace<Max>& work, int n) {
  double least = 1e300;
  double largest = 0.0;
  for (int i = 0; i < n; ++i) work.order[i] = static_cast<int8_t>(i);
  for (int k = 0; k < n; ++k) {
    int pivot = k;
    for (int i = k + 1; i < n; ++i) {
      if (fabs(work.lu[work.order[i]][k]) > fabs(work.lu[work.order[pivot]][k])) pivot = i;
    }
    const int8_t swapped = work.order[k];
    work.order[k] = work.order[pivot];
    work.order[pivot] = swapped;
    const double* top = work.lu[work.order[k]];
    if (top[k] == 0.0) return 0.0;
    const double size = fabs(top[k]);
    if (size < least) least = size;
    if (size > largest) largest = size;
    for (int i = k + 1; i < n; ++i) {
      double* row = work.lu[work.order[i]];
      row[k] /= top[k];
      for (int j = k + 1; j < n; ++j) row[j] -= row[k] * top[j];
    }
  }
  return least / largest;
}

// x += inverse(a) b
template <int Max>
GAPO_HD void add_solution(const Workspace<Max>& work, int n, double (&x)[Max + 1]) {
  double y[Max + 1];
  for (int i = 0; i < n; ++i) {
    const double* row = work.lu[work.order[i]];
    y[i] = work.b[work.order[i]];
    for (int j = 0; j < i; ++j) y[i] -= row[j] * y[j];
  }
  for (int i = n - 1; i >= 0; --i) {
    const double* row = work.lu[work.order[i]];
    for (int j = i + 1; j < n; ++j) y[i] -= row[j] * y[j];
    y[i] /= row[i];
  }
  for (int i = 0; i < n; ++i) x[i] += y[i];
}

// Whether, by more than the rounding of a well-conditioned system, some weight is negative or some
// row outside lies below the level of the support set.
template <int Max>
GAPO_HD bool is_clearly_wrong(const Scaled<Max>& s, uint32_t support, const Candidate<Max>& c) {
  double least = 0.0;
  double largest = 0.0;
  for (int i = 0; i < c.size; ++i) {
    if (c.v[i] < least) least = c.v[i];
    if (fabs(c.v[i]) > largest) largest = fabs(c.v[i]);
  }
  if (least < -1e-3 * largest) return true;
  // A row that is orthogonal to all members has no summands of its own: beside it, the rounding of
  // a level that should be 0 would decide. So that level is measured by the members' summands.
  double summands = 0.0;
  for (int j = 0; j < c.size; ++j) {
    for (int k = 0; k < c.size; ++k)
      summands += fabs(s.c[c.member[j]][c.member[k]] * c.v[j] * c.v[k]);
  }
  const double noise = kNoise * summands;
  for (int i = 0; i < s.m; ++i) {
    if (support >> i & 1u) continue;
    double y = 0.0;
    double size = 0.0;
    for (int j = 0; j < c.size; ++j) {
      const double product = s.c[i][c.member[j]] * c.v[j];
      y += product;
      size += fabs(product);
    }
    const double unit = power_of_two(c.reference - s.exponent[i]);
    const double share = c.v[c.size] * unit;
    if (y - share < -1e-3 * (size + fmax(fabs(share), noise * unit))) return true;
  }
  return false;
}

// Solves the bordered system of a support set, with iterative refinement to nearly full precision.
// Returns false if it is singular or, with `final_wanted`, clearly not that of the minimum.
template <int Max>
GAPO_HD bool solve(const Scaled<Max>& s, uint32_t support, bool final_wanted, Workspace<Max>& work,
                   Candidate<Max>& c) {
  c.size = 0;
  for (int i = 0; i < s.m; ++i) {
    if (support >> i & 1u) c.member[c.size++] = static_cast<int8_t>(i);
  }
  const int n = c.size + 1;
  c.reference = s.exponent[c.member[0]];
  for (int i = 1; i < c.size; ++i) {
    if (s.exponent[c.member[i]] < c.reference) c.reference = s.exponent[c.member[i]];
  }
  for (int i = 0; i < c.size; ++i)
    work.border[i] = power_of_two(c.reference - s.exponent[c.member[i]]);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) work.lu[i][j] = entry<Max>(s, c, work, i, j);
    work.b[i] = i == c.size ? 1.0 : 0.0;
    c.v[i] = 0.0;
  }
  const double pivots = factor<Max>(work, n);
  if (pivots == 0.0) return false;
  add_solution<Max>(work, n, c.v);
  if (final_wanted && pivots > 1e-8 && is_clearly_wrong<Max>(s, support, c)) return false;
  for (int refinement = 0; refinement < 2; ++refinement) {
    for (int i = 0; i < n; ++i) {
      Twofold residual;
      if (i == c.size) residual.high = 1.0;
      for (int j = 0; j < n; ++j) residual.add_product(-entry<Max>(s, c, work, i, j), c.v[j]);
      work.b[i] = residual.value();
    }
    add_solution<Max>(work, n, c.v);
  }
  return true;
}

template <int Max>
GAPO_HD bool is_positive(const Candidate<Max>& c) {
  for (int i = 0; i < c.size; ++i) {
    if (!(c.v[i] > 0.0) || !(c.v[i] < 1e300)) return false;
  }
  return true;
}

// The rows outside a support set.
struct Outside {
  int entering;   // the row that violates the optimality conditions most, or -1
  uint32_t tied;  // rows at the level of the support set, or below
};

// The largest relative violation of the optimality conditions by a positive candidate.
template <int Max>
GAPO_HD double residual(const Scaled<Max>& s, uint32_t support, const Candidate<Max>& c,
                        Outside& outside) {
  double y[Max];
  double size[Max];
  outside.entering = -1;
  outside.tied = 0;
  for (int i = 0; i < s.m; ++i) {
    Twofold sum;
    size[i] = 0.0;
    for (int j = 0; j < c.size; ++j) {
      sum.add_product(s.c[i][c.member[j]], c.v[j]);
      size[i] += fabs(s.c[i][c.member[j]]) * c.v[j];
    }
    y[i] = sum.value();
  }
  double quadratic = 0.0;
  double summands = 0.0;
  double total = 0.0;
  for (int j = 0; j < c.size; ++j) {
    quadratic += c.v[j] * y[c.member[j]];
    summands += c.v[j] * size[c.member[j]];
    total += c.v[j] * power_of_two(c.reference - s.exponent[c.member[j]]);
  }
  if (s.exact && quadratic < -kIndefinite * summands) return kRejected;
  const double level = quadratic / total;
  const double noise = kNoise * summands / total;
  double worst = 0.0;
  double worst_outside = 0.0;
  for (int i = 0; i < s.m; ++i) {
    const double unit = power_of_two(c.reference - s.exponent[i]);
    const double share = level * unit;
    const double scale = size[i] + fmax(fabs(share), noise * unit);
    const bool inside = (support >> i & 1u) != 0;
    const double excess = scale == 0.0 ? 0.0 : (y[i] - share) / scale;
    const double violation = inside ? fabs(excess) : -excess;
    if (violation != violation) return kRejected;
    if (violation > worst) worst = violation;
    if (inside) continue;
    if (!(excess > kTied)) outside.tied |= 1u << i;
    if (violation > worst_outside) {
      worst_outside = violation;
      outside.entering = i;
    }
  }
  return worst;
}

// Weights of a positive candidate, one per row that takes part; they sum to one.
template <int Max>
GAPO_HD void to_simplex(const Scaled<Max>& s, const Candidate<Max>& c, double (&weights)[Max]) {
  double total = 0.0;
  for (int i = 0; i < s.m; ++i) weights[i] = 0.0;
  for (int j = 0; j < c.size; ++j) {
    const int i = c.member[j];
    weights[i] = c.v[j] * power_of_two(c.reference - s.exponent[i]);
    total += weights[i];
  }
  for (int i = 0; i < s.m; ++i) weights[i] /= total;
}

// Writes the same weights at the rows' indices in the given matrix.
template <int Max>
GAPO_HD void write_weights(const Scaled<Max>& s, const Candidate<Max>& c, double* weights) {
  double mine[Max];
  to_simplex<Max>(s, c, mine);
  for (int i = 0; i < s.m; ++i) weights[s.row[i]] = mine[i];
}

// Residual of a support set: 0 up to rounding, kRejected if it has no positive solution.
template <int Max>
GAPO_HD double try_support(const Scaled<Max>& s, uint32_t support, Workspace<Max>& work,
                           Candidate<Max>& c) {
  if (!solve<Max>(s, support, true, work, c) || !is_positive<Max>(c)) return kRejected;
  Outside outside;
  const double found = residual<Max>(s, support, c, outside);
  if (found <= kGood) return 0.0;
  return found <= 1.0 ? found : kRejected;
}

GAPO_HD inline int bit_count(uint32_t bits) {
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
}

}  // namespace minnorm
}  // namespace gapo
