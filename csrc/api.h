// The interface between the Python bindings and the CPU and CUDA back ends. No Python, no torch.
//
// A "row" is one objective's flat gradient. All rows have the same length, and each has one element
// type. A row may consist of several pieces; piece p of every row has lengths[p] elements.
// Positions count through the pieces as if they were concatenated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define GAPO_HD __host__ __device__
#else
#define GAPO_HD
#endif

namespace gapo {

constexpr int kMaxRows = 16;

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Internal linkage: the linker must not merge code of units for different instruction sets.
static inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
static inline const void* advance(const void* row, int64_t elements, DType dtype) {
  return static_cast<const char*>(row) + elements * element_size(dtype);
}
static inline bool alike(int count, const DType* dtypes) {
  for (int i = 1; i < count; ++i) {
    if (dtypes[i] != dtypes[0]) return false;
  }
  return true;
}

struct Range {
  int64_t begin;
  int64_t end;
};

struct Rows {
  int m = 0;
  std::vector<DType> dtypes;          // [m]
  std::vector<int64_t> lengths;       // [pieces]
  std::vector<const void*> pointers;  // [m * pieces], row by row
  int64_t pieces() const { return static_cast<int64_t>(lengths.size()); }
  const void* piece(int row, int64_t piece) const { return pointers[row * pieces() + piece]; }
};

// How a stored value becomes the factor of an element: unchanged, or with `inverse_root` as
// 1 / (sqrt(value) * root_scale + epsilon), and as 0 if the value is 0 or below.
struct FactorForm {
  bool inverse_root = false;
  float root_scale = 1.0f;
  float epsilon = 0.0f;
};

// Which elements of the rows count, and with which factor.
struct Selection {
  bool everything = true;             // false: only `segments` count
  std::vector<Range> segments;        // sorted, disjoint
  std::vector<const float*> weights;  // [pieces], or empty: every element counts once
  FactorForm form;                    // of the weights
};

// Summands of the elements of rows: `count` of them an element, `stride` elements apart.
struct Terms {
  const void* data;
  DType dtype;
  int64_t count;
  int64_t stride;
};

// Number of entries in the upper triangle of an m x m matrix, and the index of (i, j), i <= j.
GAPO_HD static constexpr int pair_count(int m) { return m * (m + 1) / 2; }
GAPO_HD static constexpr int pair_index(int m, int i, int j) {
  return i * m - i * (i - 1) / 2 + j - i;
}

// A contiguous part of one piece that counts.
struct Run {
  int64_t piece;
  int64_t begin;  // within the piece
  int64_t end;
};

// The selected positions within [begin, end), cut at piece boundaries.
std::vector<Run> selected_runs(const std::vector<int64_t>& lengths, const Selection& selection,
                               int64_t begin, int64_t end);

// How min_norm ended. All weights are zero unless it is kOk. kNotConverged: the matrix is not
// positive semidefinite.
enum class Status : int { kOk = 0, kNotFinite = 1, kNegativeDiagonal = 2, kNotConverged = 3 };

namespace cpu {

// Names of the instruction sets that this processor supports, best first.
std::vector<const char*> instruction_sets();

// out[i * m + j] += sum over the selected k of weight_k row_i[k] row_j[k]. The result is the same
// for any number of threads.
void gramian(const Rows& rows, const Selection& selection, double* out, int threads,
             const char* isa);

// out[k] = sum_i weights[i] row_i[k] in fp32, without reading rows of weight zero. `out` has one
// pointer per piece and may be exactly one of the rows.
void combine(const Rows& rows, const double* weights, const std::vector<void*>& out,
             DType out_dtype, int threads, const char* isa);

// row_i[k] += sum_b coefficients[i * terms.count + b] terms_b[k] in fp32, for k < length; with
// `overwrite` the old elements do not count. The result is the same for any number of threads.
void accumulate(const std::vector<float*>& rows, const float* coefficients, const Terms& terms,
                int64_t length, bool overwrite, int threads, const char* isa);

// argmin over the simplex of w' gram w, for m <= kMaxRows. With `exclude_zero` rows of norm zero
// get weight zero; if there are no others, all weights are zero.
Status min_norm(const double* gram, int m, bool exclude_zero, double* weights);

// w' gram w - min_i (gram w)_i: at least the square of the distance from the minimum-norm point.
double duality_gap(const double* gram, int m, const double* weights);

}  // namespace cpu

// Each call enqueues work on `stream` (a cudaStream_t) of `device` and returns, without
// synchronising with the host or allocating. `device` is the calling thread's current one: to
// change it here, and back, would make a context of the other device where it had none. All throw
// std::runtime_error, "no CUDA device" if there is none.
namespace cuda {

// Why the kernels cannot run on a device that is there. kDriver: the driver does not support this
// CUDA runtime. kImage: nothing was compiled that this device, or its driver, takes.
enum class Obstacle : int { kNone = 0, kDriver = 1, kImage = 2 };
struct Probe {
  Obstacle obstacle;
  int driver;         // the newest CUDA version that the driver supports, 1000 major + 10 minor
  int runtime;        // the CUDA version that this was compiled with, likewise
  std::string error;  // the runtime's words, empty with kNone
};
// Loads one kernel for `device` without running it.
Probe probe(int device);

// The runs of the selected positions for the gramian kernel, which reads `table` on the device.
struct Plan {
  std::vector<int64_t> table;        // [runs, 3]: begin, end (within the piece), first chunk
  std::vector<int64_t> first_run;    // [pieces + 1]
  std::vector<int64_t> first_chunk;  // [pieces + 1]
};
Plan make_plan(const std::vector<int64_t>& lengths, const Selection& selection);

// Doubles of device memory that gramian needs for its partial sums, for rows of any length.
int64_t workspace_size(int m, int device);

void gramian(const Rows& rows, const std::vector<const float*>& weights, const FactorForm& form,
             const Plan& plan, const int64_t* device_table, double* workspace, double* out,
             int device, void* stream);
void combine(const Rows& rows, const double* weights, const std::vector<void*>& out,
             DType out_dtype, int device, void* stream);
void min_norm(const double* gram, int m, bool exclude_zero, double* weights, int32_t* status,
              int device, void* stream);

}  // namespace cuda
}  // namespace gapo
