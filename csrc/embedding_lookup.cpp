// The codebook lookup in tiles of rows, forward and backward, on any device; and the kernels that
// it needs in PyTorch's ops, for devices without some of their own.
#include <torch/library.h>

#include <limits>

#include "embedding_tiles.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using Lookup = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// What gather() is told: the index, or -2 for a row without a largest logit, whose sample is NaN.
at::Tensor codes_of(const at::Tensor& index, const at::Tensor& chosen) {
  const at::Tensor lost =
      chosen.isnan().logical_or_(chosen.eq(-std::numeric_limits<double>::infinity()));
  return at::where(index.ge(0).logical_and_(lost), -2, index);
}

// [*A, G, *B] -> [N, G]
at::Tensor code_rows(const at::Tensor& codes, int64_t dim) {
  const at::Tensor last = codes.movedim(dim, -1);
  return last.reshape({-1, last.size(-1)}).contiguous();
}

at::Tensor state_of_call(const at::Tensor& logits, const std::optional<at::Generator>& generator,
                         const OptionalTensor& rng_state) {
  if (rng_state) return rng_state->to(logits.options().dtype(at::kLong), false, /*copy=*/true);
  return draw_rng_state(logits, generator);
}

}  // namespace

Lookup lookup(const LookupKernels& kernels, const at::Tensor& logits, const at::Tensor& weight,
              double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
              const OptionalTensor& mask, const std::optional<at::Generator>& generator,
              const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kLookup, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(kLookup, tau_tensor->to(at::kDouble));
  const auto integers = logits.options().dtype(at::kLong);
  if (logits.numel() == 0) {
    return {at::zeros_symint(lookup_shape(logits, weight, dim), weight.options()),
            at::full_symint(lookup_index_shape(logits, weight, dim), -1, integers),
            at::zeros({2}, integers)};
  }
  const at::Tensor state = state_of_call(logits, generator, rng_state);
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  at::Tensor rows, index;
  if (hard) {
    index = gumbel_argmax(call.logits, dim + 1, /*keepdim=*/false, call.mask, std::nullopt, state,
                          call.given_positions());
    const at::Tensor chosen =
        call.logits.gather(dim + 1, index.clamp_min(0).unsqueeze(dim + 1)).squeeze(dim + 1);
    rows = kernels.gather(call.weight, code_rows(codes_of(index, chosen), dim));
  } else {
    Walk walk(kernels, call);
    index = at::empty_symint(shape_without(call.logits, dim + 1), integers);
    rows = at::empty({index.numel() / walk.groups, walk.groups, walk.width}, weight.options());
    for (; walk.group < walk.groups; ++walk.group) {
      const at::Tensor codebook = walk.codebook();
      do {
        const std::vector<c10::SymInt> places = walk.positions();
        const auto [y, of_rows, used] =
            gumbel_softmax(walk.logits(), tau, walk.tau(), hard, dim, walk.mask(),
                           /*return_index=*/true, std::nullopt, state, places);
        walk.of(index).copy_(of_rows);
        const at::Tensor out =
            rows.select(1, walk.group).narrow(0, walk.tiles.first_row(), walk.tiles.rows());
        const at::Tensor y_rows = as_rows(y, dim).to(walk.product);
        if (walk.product == weight.scalar_type()) {
          at::Tensor into = out;
          at::mm_out(into, y_rows, codebook);
        } else {
          out.copy_(at::mm(y_rows, codebook));
        }
      } while (walk.tiles.next());
    }
  }
  at::DimVector shape(logits.sizes());
  shape.erase(shape.begin() + dim);
  shape.push_back(rows.size(1) * rows.size(2));
  return {rows.view(shape).movedim(-1, dim).contiguous(),
          call.has_groups ? index : index.squeeze(dim), state};
}

Lookup lookup_backward(const LookupKernels& kernels, const at::Tensor& grad,
                       const at::Tensor& logits, const at::Tensor& weight, const at::Tensor& index,
                       double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                       const OptionalTensor& mask, const at::Tensor& rng_state, bool logits_grad,
                       bool weight_grad, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup_backward(grad, logits, weight, index, tau, tau_tensor, dim, mask, rng_state,
                              positions);
  const at::ScalarType computed = compute_dtype(logits.scalar_type());
  const auto nothing = logits.options();
  at::Tensor grad_logits = logits_grad ? at::empty_like(logits) : at::empty({0}, nothing),
             grad_tau = tau_grad ? at::empty_symint(shape_with(logits, dim, lookup_groups(weight)),
                                                    nothing.dtype(computed))
                                 : at::empty({0}, nothing.dtype(computed)),
             grad_weight = at::empty({0}, weight.options());
  if (logits.numel() == 0) {
    if (weight_grad) grad_weight = at::zeros_symint(weight.sym_sizes(), weight.options());
    return {grad_logits, grad_weight, grad_tau.zero_()};
  }
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  const at::Tensor index_rows = call.grouped_index(index), grad_rows = call.grouped(grad);
  const at::Tensor grad_classes =
      logits_grad ? grad_logits.unflatten(dim, {call.weight.size(0), call.weight.size(1)})
                  : at::Tensor();
  at::Tensor sums;
  if (weight_grad && hard) {
    const at::Tensor last = grad_rows.movedim(at::IntArrayRef{dim, dim + 1}, {-2, -1});
    sums = kernels.sum_by_code(
        last.reshape({index.numel() / last.size(-2), last.size(-2), last.size(-1)})
            .to(compute_dtype(weight.scalar_type())),
        code_rows(index_rows, dim), call.weight.size(1));
  }

  const bool soft_sums = weight_grad && !hard, through_y = logits_grad || tau_grad;
  if (soft_sums || through_y) {
    Walk walk(kernels, call);
    const at::ScalarType summed = compute_dtype(at::promote_types(walk.product, computed));
    if (soft_sums) sums = at::zeros(call.weight.sizes(), weight.options().dtype(summed));
    for (; walk.group < walk.groups; ++walk.group) {
      const at::Tensor codebook = walk.codebook();
      do {
        const std::vector<c10::SymInt> places = walk.positions();
        const at::Tensor dout = as_rows(walk.of(grad_rows), dim).to(walk.product),
                         z = walk.logits(), of_rows = walk.of(index_rows);
        at::Tensor y;
        if (soft_sums) {
          y = std::get<0>(gumbel_softmax(z, tau, walk.tau(), /*hard=*/false, dim, walk.mask(),
                                         /*return_index=*/false, std::nullopt, rng_state, places));
          at::Tensor total = sums.select(0, walk.group);
          const at::Tensor y_rows = as_rows(y, dim).to(walk.product);
          if (walk.product == summed) {
            total.addmm_(y_rows.t(), dout);
          } else {
            total.add_(at::mm(y_rows.t(), dout));
          }
        }
        if (!through_y) continue;
        at::Tensor matrix, dy = walk.tiles.empty(walk.classes, dout.options(), &matrix);
        at::mm_out(matrix, dout, codebook.t());
        dy = dy.to(walk.tile_type);
        const at::Tensor wanted = logits_grad ? walk.of(grad_classes) : at::Tensor();
        const bool direct = logits_grad && logits.scalar_type() == walk.tile_type;
        const at::Tensor out = direct ? wanted : at::empty_like(dy);
        const at::Tensor of_tau = kernels.backward_into(
            y.defined(), dy, y.defined() ? y : z, of_rows, tau, walk.tau(), dim,
            y.defined() ? std::nullopt : walk.mask(), rng_state, tau_grad, places, out);
        if (logits_grad && !direct) wanted.copy_(out);
        if (tau_grad) walk.of(grad_tau.unsqueeze(dim + 1)).copy_(of_tau);
      } while (walk.tiles.next());
    }
  }
  if (weight_grad) grad_weight = sums.to(weight.scalar_type()).view(weight.sizes());
  return {grad_logits, grad_weight, grad_tau};
}

namespace {

// Codes as rows of the codebooks of all groups one after the other.
at::Tensor flat_codes(const at::Tensor& codes, int64_t classes) {
  const at::Tensor group = at::arange(codes.size(1), codes.options());
  return (codes.clamp_min(0) + group * classes).view({-1});
}

}  // namespace

at::Tensor gather_of_ops(const at::Tensor& codebook, const at::Tensor& codes) {
  const int64_t groups = codebook.size(0), classes = codebook.size(1), width = codebook.size(2);
  const at::Tensor rows = codebook.reshape({groups * classes, width})
                              .index_select(0, flat_codes(codes, classes))
                              .view({codes.size(0), groups, width});
  const at::Tensor filling =
      at::where(codes.eq(-2), std::numeric_limits<double>::quiet_NaN(), 0.0).to(rows.scalar_type());
  return at::where(codes.lt(0).unsqueeze(-1), filling.unsqueeze(-1), rows);
}

// index_put_ with accumulate sorts on CUDA, and is deterministic there whatever the mode;
// index_add_ is not, nor the backward of embedding since it has a path with atomics.
at::Tensor sum_by_code_of_ops(const at::Tensor& rows, const at::Tensor& codes, int64_t classes) {
  const int64_t groups = rows.size(1), width = rows.size(2);
  at::Tensor sums = at::zeros({groups * classes, width}, rows.options());
  const at::Tensor counted = rows.masked_fill(codes.lt(0).unsqueeze(-1), 0);
  sums.index_put_({flat_codes(codes, classes)}, counted.reshape({codes.numel(), width}),
                  /*accumulate=*/true);
  return sums.view({groups, classes, width});
}

at::ScalarType widest_type(at::ScalarType logits, at::ScalarType codebook) {
  return compute_dtype(at::promote_types(logits, codebook));
}

namespace {

at::Tensor backward_into_of_ops(bool from_y, const at::Tensor& grad, const at::Tensor& logits_or_y,
                                const at::Tensor& index, double tau,
                                const OptionalTensor& tau_tensor, int64_t dim,
                                const OptionalTensor& mask, const at::Tensor& rng_state,
                                bool tau_grad, at::OptionalSymIntArrayRef positions,
                                const at::Tensor& grad_logits) {
  const auto [of_logits, of_tau] =
      from_y ? gumbel_softmax_backward(grad, logits_or_y, index, tau, tau_tensor, dim, tau_grad)
             : gumbel_softmax_hard_backward(grad, logits_or_y, index, tau, tau_tensor, dim, mask,
                                            rng_state, tau_grad, positions);
  grad_logits.copy_(of_logits);
  return of_tau;
}

constexpr LookupKernels kOfOps{&gather_of_ops,
                               &sum_by_code_of_ops,
                               &backward_into_of_ops,
                               &widest_type,
                               int64_t{1} << 24,
                               1,
                               1};

Lookup gumbel_embedding_of_ops(const at::Tensor& logits, const at::Tensor& weight, double tau,
                               const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                               const OptionalTensor& mask, std::optional<at::Generator> generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
  return lookup(kOfOps, logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                positions);
}

Lookup gumbel_embedding_backward_of_ops(const at::Tensor& grad, const at::Tensor& logits,
                                        const at::Tensor& weight, const at::Tensor& index,
                                        double tau, const OptionalTensor& tau_tensor, bool hard,
                                        int64_t dim, const OptionalTensor& mask,
                                        const at::Tensor& rng_state, bool logits_grad,
                                        bool weight_grad, bool tau_grad,
                                        at::OptionalSymIntArrayRef positions) {
  return lookup_backward(kOfOps, grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                         rng_state, logits_grad, weight_grad, tau_grad, positions);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_of_ops);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_of_ops);
}
