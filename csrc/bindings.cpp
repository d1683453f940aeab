// The Python bindings of api.h. Addresses, element types and the stream are integers, so the module
// needs no torch headers and works with every torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace py = pybind11;
using gapo::DType;

namespace {

using Address = std::uintptr_t;
// [segments, 2]: begin and end, sorted and disjoint.
using Segments = py::array_t<int64_t, py::array::c_style>;

template <class T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
  std::vector<T*> result;
  for (Address address : addresses) result.push_back(reinterpret_cast<T*>(address));
  return result;
}

void require_count(size_t rows, size_t pieces, size_t found) {
  if (rows < 1 || rows > gapo::kMaxRows || found != rows * pieces)
    throw std::invalid_argument("rows: found " + std::to_string(rows) + " rows with " +
                                std::to_string(found) + " pieces in all, accepted: 1 to " +
                                std::to_string(gapo::kMaxRows) + " rows with one address a piece");
}

// `dtypes` has one code per row.
gapo::Rows make_rows(const std::vector<Address>& addresses, std::vector<int64_t> lengths,
                     const std::vector<int>& dtypes) {
  const size_t m = dtypes.size();
  require_count(m, lengths.size(), addresses.size());
  gapo::Rows rows;
  rows.m = static_cast<int>(m);
  for (int dtype : dtypes) rows.dtypes.push_back(static_cast<DType>(dtype));
  rows.lengths = std::move(lengths);
  rows.pointers = pointers<const void>(addresses);
  return rows;
}

// None: the values are the factors. Else root_scale and epsilon of their inverse root.
gapo::FactorForm make_form(const std::optional<std::pair<float, float>>& inverse_root) {
  if (!inverse_root) return {};
  return {true, inverse_root->first, inverse_root->second};
}

gapo::Selection make_selection(const py::object& segments) {
  gapo::Selection selection;
  if (!segments.is_none()) {
    selection.everything = false;
    const auto pairs = segments.cast<Segments>();
    const auto view = pairs.unchecked<2>();
    for (py::ssize_t i = 0; i < view.shape(0); ++i)
      selection.segments.push_back({view(i, 0), view(i, 1)});
  }
  return selection;
}

void gramian(const std::vector<Address>& rows, const std::vector<int64_t>& lengths,
             const std::vector<int>& dtypes, const py::object& segments,
             const std::vector<Address>& weights,
             const std::optional<std::pair<float, float>>& inverse_root, Address out, int threads,
             const std::string& isa) {
  const auto all = make_rows(rows, lengths, dtypes);
  auto selection = make_selection(segments);
  selection.weights = pointers<const float>(weights);
  selection.form = make_form(inverse_root);
  const py::gil_scoped_release unlocked;
  gapo::cpu::gramian(all, selection, reinterpret_cast<double*>(out), threads, isa.c_str());
}

void combine(const std::vector<Address>& rows, const std::vector<int64_t>& lengths,
             const std::vector<int>& dtypes, const std::vector<double>& weights,
             const std::vector<Address>& out, int out_dtype, int threads, const std::string& isa) {
  const auto all = make_rows(rows, lengths, dtypes);
  const py::gil_scoped_release unlocked;
  gapo::cpu::combine(all, weights.data(), pointers<void>(out), static_cast<DType>(out_dtype),
                     threads, isa.c_str());
}

void accumulate(const std::vector<Address>& rows, Address coefficients, Address terms, int dtype,
                int64_t count, int64_t stride, int64_t length, bool overwrite, int threads,
                const std::string& isa) {
  require_count(rows.size(), 1, rows.size());
  const gapo::Terms summands = {reinterpret_cast<const void*>(terms), static_cast<DType>(dtype),
                                count, stride};
  const auto targets = pointers<float>(rows);
  const py::gil_scoped_release unlocked;
  gapo::cpu::accumulate(targets, reinterpret_cast<const float*>(coefficients), summands, length,
                        overwrite, threads, isa.c_str());
}

int min_norm(Address gram, int m, bool exclude_zero, Address weights) {
  const py::gil_scoped_release unlocked;
  return static_cast<int>(gapo::cpu::min_norm(reinterpret_cast<const double*>(gram), m,
                                              exclude_zero, reinterpret_cast<double*>(weights)));
}

double duality_gap(Address gram, int m, Address weights) {
  const py::gil_scoped_release unlocked;
  return gapo::cpu::duality_gap(reinterpret_cast<const double*>(gram), m,
                                reinterpret_cast<const double*>(weights));
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  const std::string listed = GAPO_CUDA_ARCHS;
  for (size_t begin = 0; begin < listed.size();) {
    const size_t end = std::min(listed.find(',', begin), listed.size());
    archs.push_back("sm_" + listed.substr(begin, end - begin));
    begin = end + 1;
  }
  return archs;
}

#if GAPO_HAS_CUDA
void* stream_of(Address stream) { return reinterpret_cast<void*>(stream); }

void cuda_gramian(const std::vector<Address>& rows, const std::vector<int64_t>& lengths,
                  const std::vector<int>& dtypes, const std::vector<Address>& weights,
                  const std::optional<std::pair<float, float>>& inverse_root,
                  const gapo::cuda::Plan& plan, Address table, Address workspace, Address out,
                  int device, Address stream) {
  const auto all = make_rows(rows, lengths, dtypes);
  const py::gil_scoped_release unlocked;
  gapo::cuda::gramian(all, pointers<const float>(weights), make_form(inverse_root), plan,
                      reinterpret_cast<const int64_t*>(table), reinterpret_cast<double*>(workspace),
                      reinterpret_cast<double*>(out), device, stream_of(stream));
}

void cuda_combine(const std::vector<Address>& rows, const std::vector<int64_t>& lengths,
                  const std::vector<int>& dtypes, Address weights, const std::vector<Address>& out,
                  int out_dtype, int device, Address stream) {
  const auto all = make_rows(rows, lengths, dtypes);
  const py::gil_scoped_release unlocked;
  gapo::cuda::combine(all, reinterpret_cast<const double*>(weights), pointers<void>(out),
                      static_cast<DType>(out_dtype), device, stream_of(stream));
}

void cuda_min_norm(Address gram, int m, bool exclude_zero, Address weights, Address status,
                   int device, Address stream) {
  const py::gil_scoped_release unlocked;
  gapo::cuda::min_norm(reinterpret_cast<const double*>(gram), m, exclude_zero,
                       reinterpret_cast<double*>(weights), reinterpret_cast<int32_t*>(status),
                       device, stream_of(stream));
}

int64_t cuda_workspace_size(int m, int device) {
  const py::gil_scoped_release unlocked;
  return gapo::cuda::workspace_size(m, device);
}

gapo::cuda::Probe cuda_probe(int device) {
  const py::gil_scoped_release unlocked;
  return gapo::cuda::probe(device);
}

void bind_cuda(py::module_& module) {
  using gapo::cuda::Plan;
  using gapo::cuda::Probe;
  py::class_<Probe>(module, "Probe")
      .def_property_readonly("obstacle",
                             [](const Probe& found) { return static_cast<int>(found.obstacle); })
      .def_readonly("driver", &Probe::driver)
      .def_readonly("runtime", &Probe::runtime)
      .def_readonly("error", &Probe::error);
  module.def("cuda_probe", &cuda_probe);
  py::class_<Plan>(module, "Plan").def_readonly("table", &Plan::table);
  module.def("cuda_plan", [](const std::vector<int64_t>& lengths, const py::object& segments) {
    return gapo::cuda::make_plan(lengths, make_selection(segments));
  });
  module.def("cuda_workspace_size", &cuda_workspace_size);
  module.def("cuda_gramian", &cuda_gramian);
  module.def("cuda_combine", &cuda_combine);
  module.def("cuda_min_norm", &cuda_min_norm);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.attr("max_rows") = gapo::kMaxRows;
  module.attr("has_cuda") = static_cast<bool>(GAPO_HAS_CUDA);
  module.def("cuda_archs", &cuda_archs);
  module.def("instruction_sets", &gapo::cpu::instruction_sets);
  module.def("gramian", &gramian);
  module.def("combine", &combine);
  module.def("accumulate", &accumulate);
  module.def("min_norm", &min_norm);
  module.def("duality_gap", &duality_gap);
#if GAPO_HAS_CUDA
  bind_cuda(module);
#endif
}
