// xformer_fast._build: states what was built and what this CPU has, and measures the CPU's arithmetic ceiling.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/ceiling.h"
#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_build, m) {
  m.doc() = "What the C++ kernels were built with, and what this CPU has.";
  m.def("isa_levels", [] { return std::vector<std::string>(std::begin(xformer_fast::kIsaNames), std::end(xformer_fast::kIsaNames)); },
        "Instruction sets in the binary, lowest first.");
  m.def("cpu_isa", [] { return std::string(xformer_fast::kIsaNames[static_cast<int>(xformer_fast::cpu_isa())]); },
        "The best of them that this CPU has.");
  m.def("selected_isa", [] { return std::string(xformer_fast::kIsaNames[static_cast<int>(xformer_fast::selected_isa())]); },
        "The one the kernels run on: the CPU's best, or a lower one forced by XFORMER_FAST_ISA.");
  m.def("compiler", [] { return std::string("g++ " __VERSION__); });
  m.def("fma_gflops", &xformer_fast::fma_gflops, py::arg("element"), py::arg("threads"), py::arg("seconds") = 0.2,
        py::call_guard<py::gil_scoped_release>(),
        "Measured multiply-add rate in GFLOP/s of `threads` threads for \"float32\" or \"bfloat16\": the kernels' ceiling.");
}
