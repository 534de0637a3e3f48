// Every schema, and the C++ functions that call them through the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "gumbel_ext.h"

TORCH_LIBRARY(gumbel_ext, m) {
  // Ops that may draw from a generator must say so, or compiled activation checkpointing replays
  // them with other noise.
  const std::vector<at::Tag> random = {at::Tag::nondeterministic_seeded,
                                       at::Tag::pt2_compliant_tag};
  const std::vector<at::Tag> deterministic = {at::Tag::pt2_compliant_tag};

  m.def(
      "gumbel_softmax(Tensor logits, float tau, Tensor? tau_tensor, bool hard, int dim, Tensor? "
      "mask, "
      "bool return_index, Generator? generator, Tensor? rng_state, SymInt[]? positions=None) -> "
      "(Tensor y, Tensor index, "
      "Tensor used_rng_state)",
      random);
  m.def(
      "decoupled_gumbel_softmax(Tensor logits, float tau_forward, Tensor? tau_forward_tensor, "
      "float tau_backward, Tensor? tau_backward_tensor, bool hard, int dim, Tensor? mask, bool "
      "return_index, Generator? generator, Tensor? rng_state) -> (Tensor y, Tensor index)",
      random);
  m.def(
      "gumbel_argmax(Tensor logits, int dim, bool keepdim, Tensor? mask, Generator? generator, "
      "Tensor? rng_state, SymInt[]? positions=None) "
      "-> Tensor",
      random);
  m.def(
      "gumbel_topk(Tensor logits, SymInt k, int dim, Tensor? mask, Generator? generator, "
      "Tensor? rng_state, SymInt[]? positions=None) -> Tensor index",
      random);
  m.def(
      "gumbel_noise(Tensor like, SymInt[] size, Generator? generator, Tensor? rng_state, SymInt[]? "
      "positions=None) -> Tensor",
      random);

  // The state of one call. In a traced graph `after` is the draw before it, which keeps their order
  // and tells two draws apart; see gumbel_ext/_random_ops.py.
  m.def("draw_rng_state(Tensor like, Generator? generator, Tensor? after=None) -> Tensor rng_state",
        random);

  m.def(
      "gumbel_softmax_backward(Tensor grad, Tensor y, Tensor index, float tau, Tensor? tau_tensor, "
      "int dim, "
      "bool tau_grad) -> (Tensor grad_logits, Tensor grad_tau)",
      deterministic);
  m.def(
      "gumbel_softmax_hard_backward(Tensor grad, Tensor logits, Tensor index, float tau, Tensor? "
      "tau_tensor, int dim, "
      "Tensor? mask, Tensor rng_state, bool tau_grad, SymInt[]? positions=None) -> (Tensor "
      "grad_logits, Tensor grad_tau)",
      deterministic);

  m.def(
      "binary_concrete(Tensor logits, float tau, Tensor? tau_tensor, bool hard, Generator? "
      "generator, Tensor? rng_state, SymInt[]? positions=None) -> (Tensor y, Tensor "
      "used_rng_state)",
      random);
  m.def(
      "logistic_noise(Tensor like, SymInt[] size, Generator? generator, Tensor? rng_state, "
      "SymInt[]? positions=None) -> (Tensor noise, Tensor used_rng_state)",
      random);
  // The gradient of the soft sample; grad_tau is what each element adds to that of tau.
  m.def(
      "binary_concrete_backward(Tensor grad, Tensor logits, float tau, Tensor? tau_tensor, Tensor "
      "rng_state, bool tau_grad, SymInt[]? positions=None) -> (Tensor grad_logits, Tensor "
      "grad_tau)",
      deterministic);
  m.def(
      "gumbel_log_softmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, Tensor? mask, "
      "Generator? generator, Tensor? rng_state, SymInt[]? positions=None) -> (Tensor log_y, Tensor "
      "used_rng_state)",
      random);
  m.def(
      "gumbel_log_softmax_backward(Tensor grad, Tensor log_y, float tau, Tensor? tau_tensor, int "
      "dim, bool tau_grad) -> (Tensor grad_logits, Tensor grad_tau)",
      deterministic);
  m.def(
      "concrete_log_prob(Tensor value, Tensor logits, float tau, Tensor? tau_tensor, int dim, bool "
      "log_space) -> Tensor",
      deterministic);
  m.def(
      "concrete_log_prob_backward(Tensor grad, Tensor value, Tensor logits, float tau, Tensor? "
      "tau_tensor, int dim, bool log_space, bool value_grad, bool logits_grad, bool tau_grad) -> "
      "(Tensor grad_value, Tensor grad_logits, Tensor grad_tau)",
      deterministic);

  // Rows of a codebook by the index of hard samples, or their mean under soft ones; see
  // embedding.h. Gradients that are not wanted are empty.
  m.def(
      "gumbel_embedding(Tensor logits, Tensor weight, float tau, Tensor? tau_tensor, bool hard, "
      "int dim, Tensor? mask, Generator? generator, Tensor? rng_state, SymInt[]? positions=None) "
      "-> (Tensor out, Tensor index, Tensor used_rng_state)",
      random);
  m.def(
      "gumbel_embedding_backward(Tensor grad, Tensor logits, Tensor weight, Tensor index, float "
      "tau, Tensor? tau_tensor, bool hard, int dim, Tensor? mask, Tensor rng_state, bool "
      "logits_grad, bool weight_grad, bool tau_grad, SymInt[]? positions=None) -> (Tensor "
      "grad_logits, Tensor grad_weight, Tensor grad_tau)",
      deterministic);

  // Deterministic: the one-hot vector of the largest logit with the gradient of softmax(logits /
  // tau), and the expected position softmax(beta logits) . positions.
  m.def(
      "straight_through_softmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, Tensor? "
      "mask, bool return_index) -> (Tensor y, Tensor index)",
      deterministic);
  m.def(
      "straight_through_softmax_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, int dim, Tensor? mask, bool tau_grad) -> (Tensor grad_logits, Tensor "
      "grad_tau)",
      deterministic);
  // Estimators of the straight-through family: the hard sample of gumbel_softmax with other
  // gradients. Each backward is a symmetric matrix of the row times grad. Conditional draw number n
  // of gumbel_rao_backward has the noise positions (1 + n) * numel + row * classes + class, rows
  // counted with dim moved last.
  m.def(
      "gumbel_rao(Tensor logits, float tau, Tensor? tau_tensor, SymInt k, int dim, Tensor? mask, "
      "bool return_index, Generator? generator, Tensor? rng_state) -> (Tensor y, Tensor index, "
      "Tensor used_rng_state)",
      random);
  m.def(
      "gumbel_rao_backward(Tensor grad, Tensor logits, Tensor index, float tau, Tensor? "
      "tau_tensor, SymInt k, int dim, Tensor? mask, Tensor rng_state) -> Tensor grad_logits",
      deterministic);
  m.def(
      "zgr(Tensor logits, int dim, Tensor? mask, bool return_index, Generator? generator, Tensor? "
      "rng_state, SymInt[]? positions=None) -> (Tensor y, Tensor index)",
      random);
  m.def(
      "zgr_backward(Tensor grad, Tensor logits, Tensor index, int dim, Tensor? mask) -> Tensor "
      "grad_logits",
      deterministic);
  m.def(
      "reinmax(Tensor logits, float tau, Tensor? tau_tensor, int dim, Tensor? mask, bool "
      "return_index, Generator? generator, Tensor? rng_state, SymInt[]? positions=None) -> (Tensor "
      "y, Tensor index)",
      random);
  m.def(
      "reinmax_backward(Tensor grad, Tensor logits, Tensor index, float tau, Tensor? tau_tensor, "
      "int dim, Tensor? mask) -> Tensor grad_logits",
      deterministic);
  m.def(
      "gapped_straight_through(Tensor logits, float tau, Tensor? tau_tensor, float? gap, int dim, "
      "Tensor? mask, bool return_index, Generator? generator, Tensor? rng_state, SymInt[]? "
      "positions=None, Tensor? gap_tensor=None) -> (Tensor y, Tensor index)",
      random);
  m.def(
      "gapped_straight_through_backward(Tensor grad, Tensor logits, Tensor index, float tau, "
      "Tensor? tau_tensor, float? gap, int dim, Tensor? mask, Tensor? gap_tensor=None) -> Tensor "
      "grad_logits",
      deterministic);

  m.def(
      "soft_argmax(Tensor logits, float beta, Tensor? beta_tensor, int dim, Tensor positions) -> "
      "(Tensor expected, Tensor row_state)",
      deterministic);
  m.def(
      "soft_argmax_backward(Tensor grad, Tensor logits, Tensor row_state, float beta, Tensor? "
      "beta_tensor, int dim, Tensor positions, bool beta_grad) -> (Tensor grad_logits, Tensor "
      "grad_beta)",
      deterministic);

  // What rows that are sharded over processes need besides: gumbel_ext/_sharded_rows.py calls them.
  m.def("noise_at(Tensor like, Tensor position, Tensor rng_state) -> Tensor", deterministic);
  m.def(
      "exponentiate_chunks(Tensor scores, Tensor largest, float tau, Tensor? tau_tensor, int dim) "
      "-> (Tensor exponentials, Tensor sums)",
      deterministic);
  m.def("dot_chunks(Tensor grad, Tensor y, Tensor shift, Tensor? dot, int dim) -> Tensor sums",
        deterministic);
}

namespace gumbel_ext {

namespace {

template <class Function>
c10::TypedOperatorHandle<Function> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax(
    const at::Tensor& logits, double tau, const std::optional<at::Tensor>& tau_tensor, bool hard,
    int64_t dim, const std::optional<at::Tensor>& mask, bool return_index,
    std::optional<at::Generator> generator, const std::optional<at::Tensor>& rng_state,
    at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, double, const std::optional<at::Tensor>&, bool, int64_t,
      const std::optional<at::Tensor>&, bool, std::optional<at::Generator>,
      const std::optional<at::Tensor>&, at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_softmax");
  return op.call(logits, tau, tau_tensor, hard, dim, mask, return_index, generator, rng_state,
                 positions);
}

at::Tensor gumbel_argmax(const at::Tensor& logits, int64_t dim, bool keepdim,
                         const std::optional<at::Tensor>& mask,
                         std::optional<at::Generator> generator,
                         const std::optional<at::Tensor>& rng_state,
                         at::OptionalSymIntArrayRef positions) {
  using Function = at::Tensor(const at::Tensor&, int64_t, bool, const std::optional<at::Tensor>&,
                              std::optional<at::Generator>, const std::optional<at::Tensor>&,
                              at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_argmax");
  return op.call(logits, dim, keepdim, mask, generator, rng_state, positions);
}

at::Tensor gumbel_topk(const at::Tensor& logits, c10::SymInt k, int64_t dim,
                       const std::optional<at::Tensor>& mask,
                       std::optional<at::Generator> generator,
                       const std::optional<at::Tensor>& rng_state,
                       at::OptionalSymIntArrayRef positions) {
  using Function = at::Tensor(const at::Tensor&, c10::SymInt, int64_t,
                              const std::optional<at::Tensor>&, std::optional<at::Generator>,
                              const std::optional<at::Tensor>&, at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_topk");
  return op.call(logits, std::move(k), dim, mask, generator, rng_state, positions);
}

at::Tensor draw_rng_state(const at::Tensor& like, std::optional<at::Generator> generator) {
  using Function =
      at::Tensor(const at::Tensor&, std::optional<at::Generator>, const std::optional<at::Tensor>&);
  static const auto op = find_op<Function>("gumbel_ext::draw_rng_state");
  return op.call(like, generator, std::nullopt);
}

at::Tensor gumbel_noise(const at::Tensor& like, at::IntArrayRef size,
                        std::optional<at::Generator> generator,
                        const std::optional<at::Tensor>& rng_state,
                        at::OptionalSymIntArrayRef positions) {
  using Function = at::Tensor(const at::Tensor&, c10::SymIntArrayRef, std::optional<at::Generator>,
                              const std::optional<at::Tensor>&, at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_noise");
  return op.call(like, c10::fromIntArrayRefSlow(size), generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> straight_through_softmax(
    const at::Tensor& logits, double tau, const std::optional<at::Tensor>& tau_tensor, int64_t dim,
    const std::optional<at::Tensor>& mask, bool return_index) {
  using Function = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, double,
                                                      const std::optional<at::Tensor>&, int64_t,
                                                      const std::optional<at::Tensor>&, bool);
  static const auto op = find_op<Function>("gumbel_ext::straight_through_softmax");
  return op.call(logits, tau, tau_tensor, dim, mask, return_index);
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& index, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool tau_grad) {
  using Function =
      std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         double, const std::optional<at::Tensor>&, int64_t, bool);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_softmax_backward");
  return op.call(grad, y, index, tau, tau_tensor, dim, tau_grad);
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, const std::optional<at::Tensor>& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
      const std::optional<at::Tensor>&, int64_t, const std::optional<at::Tensor>&,
      const at::Tensor&, bool, at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_softmax_hard_backward");
  return op.call(grad, logits, index, tau, tau_tensor, dim, mask, rng_state, tau_grad, positions);
}

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax(
    const at::Tensor& logits, double tau, const std::optional<at::Tensor>& tau_tensor, int64_t dim,
    const std::optional<at::Tensor>& mask, std::optional<at::Generator> generator,
    const std::optional<at::Tensor>& rng_state, at::OptionalSymIntArrayRef positions) {
  using Function = std::tuple<at::Tensor, at::Tensor>(
      const at::Tensor&, double, const std::optional<at::Tensor>&, int64_t,
      const std::optional<at::Tensor>&, std::optional<at::Generator>,
      const std::optional<at::Tensor>&, at::OptionalSymIntArrayRef);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_log_softmax");
  return op.call(logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
}

std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_backward(
    const at::Tensor& grad, const at::Tensor& log_y, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool tau_grad) {
  using Function =
      std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, double,
                                         const std::optional<at::Tensor>&, int64_t, bool);
  static const auto op = find_op<Function>("gumbel_ext::gumbel_log_softmax_backward");
  return op.call(grad, log_y, tau, tau_tensor, dim, tau_grad);
}

at::Tensor concrete_log_prob(const at::Tensor& value, const at::Tensor& logits, double tau,
                             const std::optional<at::Tensor>& tau_tensor, int64_t dim,
                             bool log_space) {
  using Function = at::Tensor(const at::Tensor&, const at::Tensor&, double,
                              const std::optional<at::Tensor>&, int64_t, bool);
  static const auto op = find_op<Function>("gumbel_ext::concrete_log_prob");
  return op.call(value, logits, tau, tau_tensor, dim, log_space);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> concrete_log_prob_backward(
    const at::Tensor& grad, const at::Tensor& value, const at::Tensor& logits, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool log_space, bool value_grad,
    bool logits_grad, bool tau_grad) {
  using Function = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
      const std::optional<at::Tensor>&, int64_t, bool, bool, bool, bool);
  static const auto op = find_op<Function>("gumbel_ext::concrete_log_prob_backward");
  return op.call(grad, value, logits, tau, tau_tensor, dim, log_space, value_grad, logits_grad,
                 tau_grad);
}

}  // namespace gumbel_ext
