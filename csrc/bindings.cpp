#include <pybind11/pybind11.h>
PYBIND11_MODULE(_native, m) { m.attr("has_cuda") = bool(GAPO_HAS_CUDA); }
