// The streaming kernels of one instruction set. Each set has its own translation unit.
#pragma once

#include "api.h"

namespace gapo {
namespace cpu {

// One factor per element; with null values every element counts once.
struct Factors {
  const float* values;
  FactorForm form;
};

struct Kernels {
  const char* name;
  // Adds the Gram matrix of `count` elements of m rows to `sums`, the pair_count(m) entries of its
  // upper triangle.
  void (*gramian)(int m, const void* const* rows, const DType* dtypes, const Factors& factors,
                  int64_t count, double* sums);
  // out[k] = sum_i weights[i] row_i[k], m >= 1, in fp32.
  void (*combine)(int m, const void* const* rows, const DType* dtypes, const float* weights,
                  void* out, DType out_dtype, int64_t count);
  // Adds sum_b coefficients[i * terms.count + b] terms_b[k] to `length` elements of each of m rows.
  void (*accumulate)(int m, float* const* rows, const float* coefficients, const Terms& terms,
                     int64_t length, bool overwrite);
};

extern const Kernels kBaseline;
#ifdef GAPO_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// The set called `name`; nullptr or "" picks the best. Throws std::invalid_argument.
const Kernels& kernels(const char* name);

}  // namespace cpu
}  // namespace gapo
