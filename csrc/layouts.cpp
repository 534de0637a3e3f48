// Tensors that are not strided arrays of numbers are refused in one line that names the argument.
// Without this the dispatcher would answer with a page about backends.
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <vector>

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

std::vector<torch::Library> register_refusals() {
  std::vector<torch::Library> libraries;
  for (const auto key :
       {c10::DispatchKey::SparseCPU, c10::DispatchKey::SparseCUDA, c10::DispatchKey::SparseCsrCPU,
        c10::DispatchKey::SparseCsrCUDA, c10::DispatchKey::MkldnnCPU,
        c10::DispatchKey::QuantizedCPU, c10::DispatchKey::QuantizedCUDA,
        c10::DispatchKey::NestedTensorCPU, c10::DispatchKey::NestedTensorCUDA}) {
    torch::Library& library =
        libraries.emplace_back(torch::Library::IMPL, "gumbel_ext", key, __FILE__, __LINE__);
    for (const char* op : {
             "gumbel_softmax",
             "gumbel_argmax",
             "gumbel_topk",
             "gumbel_noise",
             "draw_rng_state",
             "gumbel_softmax_backward",
             "gumbel_softmax_hard_backward",
             "gumbel_embedding",
             "gumbel_embedding_backward",
             "binary_concrete",
             "binary_concrete_backward",
             "logistic_noise",
             "gumbel_log_softmax",
             "gumbel_log_softmax_backward",
             "concrete_log_prob",
             "concrete_log_prob_backward",
             "gumbel_rao",
             "gumbel_rao_backward",
             "zgr",
             "zgr_backward",
             "reinmax",
             "reinmax_backward",
             "gapped_straight_through",
             "gapped_straight_through_backward",
             "straight_through_softmax",
             "straight_through_softmax_backward",
             "soft_argmax",
             "soft_argmax_backward",
         }) {
      library.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
    }
  }
  return libraries;
}

const std::vector<torch::Library> refusals = register_refusals();

}  // namespace
}  // namespace gumbel_ext
