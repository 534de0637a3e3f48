// Tensors in other layouts than strided arrays of numbers.
#include "op.h"

#include <ATen/core/stack.h>

namespace gumbel_ext {
namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].isTensor()) continue;
    const at::Tensor& t = arguments[i].toTensor();
    if (!t.defined()) continue;
    const bool strided = t.layout() == at::kStrided;
    TORCH_CHECK_TYPE(strided && !t.is_nested() && !t.is_quantized(),
                     op.operator_name().name.substr(sizeof("gumbel_ext::") - 1), ": ",
                     schema.arguments()[i].name(), " must be a dense (strided) tensor, got ",
                     t.is_nested()      ? "a nested tensor"
                     : t.is_quantized() ? "a quantized tensor"
                                        : c10::str("layout ", t.layout()));
  }
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name(), " has no kernel for its arguments");
}

}  // namespace

void refuse_other_layouts(torch::Library& m, const char* op) {
  for (const auto key :
       {c10::DispatchKey::SparseCPU, c10::DispatchKey::SparseCUDA, c10::DispatchKey::SparseCsrCPU,
        c10::DispatchKey::SparseCsrCUDA, c10::DispatchKey::MkldnnCPU,
        c10::DispatchKey::QuantizedCPU, c10::DispatchKey::QuantizedCUDA,
        c10::DispatchKey::NestedTensorCPU, c10::DispatchKey::NestedTensorCUDA}) {
    m.impl(op, torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&refuse>()));
  }
}

}  // namespace gumbel_ext
