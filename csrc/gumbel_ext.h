// gumbel_ext for libtorch programs: the ops as C++ functions. Python callers use the package's
// functional.py instead.
//
// All functions go through the dispatcher, so autograd, autocast and every device that has kernels
// work as they do from Python. docs/noise.md defines the noise as a function of (seed, offset,
// position).
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace gumbel_ext {

// y = softmax((logits + Gumbel noise) / tau) along dim, or with `hard` the one-hot of its argmax
// with the gradient of the soft sample (straight-through). Jang et al., arXiv 1611.01144; Maddison
// et al., arXiv 1611.00712.
//
// tau_tensor, if given, takes the place of tau: broadcastable to the shape of logits with dim
// reduced to 1. mask: bool, true = may be chosen. rng_state: int64 [seed, offset]; without it a
// seed is drawn from `generator`, or from the default generator of the device. positions: [base,
// one stride per dimension of logits]; the element with indices i then has the noise position base
// + sum(i * stride), for logits that are part of a larger tensor. Without it, its place in
// row-major order.
//
// Returns y; the int64 index of the chosen classes (shape of logits without dim, -1 for a row that
// the mask forbids; empty unless return_index); and the rng_state that was used.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, bool hard = false, int64_t dim = -1,
    const std::optional<at::Tensor>& mask = std::nullopt, bool return_index = false,
    std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// The index alone: a sample from softmax(logits), by argmax(logits + Gumbel noise).
at::Tensor gumbel_argmax(const at::Tensor& logits, int64_t dim = -1, bool keepdim = false,
                         const std::optional<at::Tensor>& mask = std::nullopt,
                         std::optional<at::Generator> generator = std::nullopt,
                         const std::optional<at::Tensor>& rng_state = std::nullopt,
                         at::OptionalSymIntArrayRef positions = std::nullopt);

// The k largest of logits + Gumbel noise, in descending order: k classes sampled without
// replacement. Shape of logits with dim of size k; -1 where there are no more classes above -inf.
at::Tensor gumbel_topk(const at::Tensor& logits, c10::SymInt k, int64_t dim = -1,
                       const std::optional<at::Tensor>& mask = std::nullopt,
                       std::optional<at::Generator> generator = std::nullopt,
                       const std::optional<at::Tensor>& rng_state = std::nullopt,
                       at::OptionalSymIntArrayRef positions = std::nullopt);

// The noise itself, with the dtype and device of `like`.
at::Tensor gumbel_noise(const at::Tensor& like, at::IntArrayRef size,
                        std::optional<at::Generator> generator = std::nullopt,
                        const std::optional<at::Tensor>& rng_state = std::nullopt,
                        at::OptionalSymIntArrayRef positions = std::nullopt);

// The rng_state of one call, on the device of `like`: the generator advances as by that call.
at::Tensor draw_rng_state(const at::Tensor& like,
                          std::optional<at::Generator> generator = std::nullopt);

// y = sigmoid((logits + logistic noise) / tau), elementwise; with `hard` 1 where logits + noise >
// 0, else 0, with the gradient of the soft sample. Maddison et al., appendix B. A tau_tensor
// broadcasts to the shape of logits. Returns y and the rng_state that was used.
std::tuple<at::Tensor, at::Tensor> binary_concrete(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, bool hard = false,
    std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// Its noise, with the dtype and device of `like`, and the rng_state that was used.
std::tuple<at::Tensor, at::Tensor> logistic_noise(
    const at::Tensor& like, c10::SymIntArrayRef size,
    std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// No noise: the one-hot vector of the largest logit, with the gradient of softmax(logits / tau).
// Returns it and its index, as gumbel_softmax does.
std::tuple<at::Tensor, at::Tensor> straight_through_softmax(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, int64_t dim = -1,
    const std::optional<at::Tensor>& mask = std::nullopt, bool return_index = false);

// The backward ops; autograd calls them. y is what the soft forward returned, index its index.
std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& index, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool tau_grad);

// The same without y: regenerates the noise from rng_state and recomputes it.
std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, const std::optional<at::Tensor>& mask,
    const at::Tensor& rng_state, bool tau_grad,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// From the state alone, soft or hard. grad_tau is what each element adds to the gradient of tau.
std::tuple<at::Tensor, at::Tensor> binary_concrete_backward(
    const at::Tensor& grad, const at::Tensor& logits, double tau,
    const std::optional<at::Tensor>& tau_tensor, const at::Tensor& rng_state, bool tau_grad,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// The logarithm of the soft sample: (logits + Gumbel noise) / tau less its logsumexp along dim.
// Finite where y itself is too small for a number. Returns log y and the rng_state that was used.
std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, int64_t dim = -1,
    const std::optional<at::Tensor>& mask = std::nullopt,
    std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// Its backward op. log_y is in the dtype that grad is computed in.
std::tuple<at::Tensor, at::Tensor> gumbel_log_softmax_backward(
    const at::Tensor& grad, const at::Tensor& log_y, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool tau_grad);

// The log density of the Concrete (Gumbel-softmax) distribution at a value on the simplex, or with
// log_space that of its logarithm. value and logits have one dtype and broadcast together; the
// result is without dim, in float32 for 16-bit arguments.
at::Tensor concrete_log_prob(const at::Tensor& value, const at::Tensor& logits, double tau = 1.0,
                             const std::optional<at::Tensor>& tau_tensor = std::nullopt,
                             int64_t dim = -1, bool log_space = false);

// Its backward op. Gradients have the broadcast shape, that of tau with dim reduced to 1.
std::tuple<at::Tensor, at::Tensor, at::Tensor> concrete_log_prob_backward(
    const at::Tensor& grad, const at::Tensor& value, const at::Tensor& logits, double tau,
    const std::optional<at::Tensor>& tau_tensor, int64_t dim, bool log_space, bool value_grad,
    bool logits_grad, bool tau_grad);

// The hard sample of gumbel_softmax, bit for bit that of the same state, with other gradients
// (docs/estimators.md); tau receives none. Each returns y and its index as gumbel_softmax does.
//
// Gumbel-Rao: the straight-through gradient averaged over k draws of the noise given the sample.
// Paulus, Maddison, Krause, arXiv 2010.04838. Also returns the rng_state that was used.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_rao(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, c10::SymInt k = 10,
    int64_t dim = -1, const std::optional<at::Tensor>& mask = std::nullopt,
    bool return_index = false, std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt);

// Its limit for tau -> 0. Shekhovtsov, ICML 2023.
std::tuple<at::Tensor, at::Tensor> zgr(const at::Tensor& logits, int64_t dim = -1,
                                       const std::optional<at::Tensor>& mask = std::nullopt,
                                       bool return_index = false,
                                       std::optional<at::Generator> generator = std::nullopt,
                                       const std::optional<at::Tensor>& rng_state = std::nullopt,
                                       at::OptionalSymIntArrayRef positions = std::nullopt);

// ReinMax: exact to second order. Liu et al., arXiv 2304.08612.
std::tuple<at::Tensor, at::Tensor> reinmax(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, int64_t dim = -1,
    const std::optional<at::Tensor>& mask = std::nullopt, bool return_index = false,
    std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt);

// Gapped straight-through; without a gap, that of the probability p of the sample, -log(1 - p) / p.
// A gap_tensor, float64 without dimensions, takes the place of gap. Fan et al., arXiv 2206.07235.
std::tuple<at::Tensor, at::Tensor> gapped_straight_through(
    const at::Tensor& logits, double tau = 1.0,
    const std::optional<at::Tensor>& tau_tensor = std::nullopt, std::optional<double> gap = 1.0,
    int64_t dim = -1, const std::optional<at::Tensor>& mask = std::nullopt,
    bool return_index = false, std::optional<at::Generator> generator = std::nullopt,
    const std::optional<at::Tensor>& rng_state = std::nullopt,
    at::OptionalSymIntArrayRef positions = std::nullopt,
    const std::optional<at::Tensor>& gap_tensor = std::nullopt);

// Their backward ops.
at::Tensor gumbel_rao_backward(const at::Tensor& grad, const at::Tensor& logits,
                               const at::Tensor& index, double tau,
                               const std::optional<at::Tensor>& tau_tensor, c10::SymInt k,
                               int64_t dim, const std::optional<at::Tensor>& mask,
                               const at::Tensor& rng_state);
at::Tensor zgr_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index,
                        int64_t dim, const std::optional<at::Tensor>& mask);
at::Tensor reinmax_backward(const at::Tensor& grad, const at::Tensor& logits,
                            const at::Tensor& index, double tau,
                            const std::optional<at::Tensor>& tau_tensor, int64_t dim,
                            const std::optional<at::Tensor>& mask);
at::Tensor gapped_straight_through_backward(const at::Tensor& grad, const at::Tensor& logits,
                                            const at::Tensor& index, double tau,
                                            const std::optional<at::Tensor>& tau_tensor,
                                            std::optional<double> gap, int64_t dim,
                                            const std::optional<at::Tensor>& mask,
                                            const std::optional<at::Tensor>& gap_tensor);

}  // namespace gumbel_ext
