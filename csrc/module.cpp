// The Python module gumbel_ext._C: what the build is, and the noise functions that tests look at
// from outside. Loading it registers the ops.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "philox.h"

namespace {

namespace py = pybind11;
using gumbel_ext::cpu::KernelTable;

// None in a build without the CUDA kernels.
py::object cuda_info() {
#if defined(GUMBEL_EXT_CUDA_VERSION)
  // As TORCH_CUDA_ARCH_LIST has them: between semicolons or spaces.
  std::string list = GUMBEL_EXT_CUDA_ARCHITECTURES;
  std::replace(list.begin(), list.end(), ';', ' ');
  std::istringstream names(list);
  std::vector<std::string> architectures;
  for (std::string name; names >> name;) architectures.push_back(name);
  py::dict cuda;
  cuda["version"] = GUMBEL_EXT_CUDA_VERSION;
  cuda["architectures"] = architectures;
  return cuda;
#else
  return py::none();
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = GUMBEL_EXT_VERSION;
  info["torch"] = GUMBEL_EXT_TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["cxx_flags"] = GUMBEL_EXT_CXX_FLAGS;
  info["cuda"] = cuda_info();
#if defined(__x86_64__)
  info["cpu_capabilities"] = std::vector<std::string>{"avx512", "avx2", "generic"};
#else
  info["cpu_capabilities"] = std::vector<std::string>{gumbel_ext::cpu::kBaselineKernels.capability};
#endif
  return info;
}

std::vector<std::string> cpu_capabilities() {
  const KernelTable* tables[gumbel_ext::cpu::kMaxCapabilities];
  const int count = gumbel_ext::cpu::available_kernels(tables);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->capability);
  return names;
}

std::vector<std::uint32_t> philox(const std::vector<std::uint32_t>& counter,
                                  const std::vector<std::uint32_t>& key) {
  TORCH_CHECK_VALUE(counter.size() == 4, "philox4x32_10: counter must have 4 words, got ",
                    counter.size());
  TORCH_CHECK_VALUE(key.size() == 2, "philox4x32_10: key must have 2 words, got ", key.size());
  const auto b =
      gumbel_ext::philox4x32_10({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
  return {b.c0, b.c1, b.c2, b.c3};
}

// The kernels' own maths on given words, each an int64 in [0, 2^32).
at::Tensor noise_from_words(const char* name, const at::Tensor& hi, const at::Tensor& lo,
                            at::ScalarType type,
                            decltype(KernelTable::noise_from_words) from_words) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, name,
                   ": dtype must be float32 or float64, got ", c10::toString(type));
  TORCH_CHECK_VALUE(hi.dim() == 1 && hi.sizes() == lo.sizes(), name,
                    ": hi and lo must be one-dimensional and of one size, got ", hi.sizes(),
                    " and ", lo.sizes());
  const at::Tensor high = hi.to(at::kUInt32).contiguous(), low = lo.to(at::kUInt32).contiguous();
  at::Tensor out = at::empty(hi.sizes(), type);
  from_words(type == at::kDouble ? gumbel_ext::cpu::ElementType::kFloat64
                                 : gumbel_ext::cpu::ElementType::kFloat32,
             static_cast<const std::uint32_t*>(high.const_data_ptr()),
             static_cast<const std::uint32_t*>(low.const_data_ptr()), hi.numel(),
             out.mutable_data_ptr());
  return out;
}

at::Tensor gumbel_from_words(const at::Tensor& hi, const at::Tensor& lo, at::ScalarType dtype) {
  return noise_from_words("gumbel_from_words", hi, lo, dtype,
                          gumbel_ext::cpu::kernels().noise_from_words);
}

at::Tensor logistic_from_words(const at::Tensor& hi, const at::Tensor& lo, at::ScalarType dtype) {
  return noise_from_words("logistic_from_words", hi, lo, dtype,
                          gumbel_ext::cpu::kernels().logistic_from_words);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled part of gumbel_ext.";
  m.def("build_info", &build_info, "What this module was built from and for.");
  m.def(
      "cpu_capability", [] { return gumbel_ext::cpu::kernels().capability; },
      "The instruction set whose kernels are in use.");
  m.def("cpu_capabilities", &cpu_capabilities,
        "The instruction sets that this machine can run, best first.");
  m.def("philox4x32_10", &philox, py::arg("counter"), py::arg("key"),
        "One block of Philox4x32-10.");
  m.def("gumbel_from_words", &gumbel_from_words, py::arg("hi"), py::arg("lo"), py::arg("dtype"),
        "Gumbel noise of given Philox words, by the kernels' own arithmetic.");
  m.def("logistic_from_words", &logistic_from_words, py::arg("hi"), py::arg("lo"), py::arg("dtype"),
        "Logistic noise of given Philox words, by the kernels' own arithmetic.");
}
