// Sends calls with tensors of the CPU to the kernels for CUDA, which this library brings in
// emulation.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace {

void as_on_cuda(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CUDA, *stack);
}

std::vector<c10::RegistrationHandleRAII>& registrations() {
  static std::vector<c10::RegistrationHandleRAII> all;
  return all;
}

// Returns the names of the operators. What the module has for the CPU is covered, not lost.
std::vector<std::string> take_over() {
  std::vector<std::string> names;
  registrations().clear();
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("gumbel_ext::", 0) != 0) continue;
    const auto op = dispatcher.findOp(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    registrations().push_back(dispatcher.registerImpl(
        name, c10::DispatchKey::CPU, c10::KernelFunction::makeFromBoxedFunction<&as_on_cuda>(),
        std::nullopt, nullptr, "emulated CUDA"));
    names.push_back(name.name);
  }
  return names;
}

void give_back() { registrations().clear(); }

}  // namespace

TORCH_LIBRARY(gumbel_ext_emulated, m) {
  m.def("take_over", &take_over);
  m.def("give_back", &give_back);
}
