// The codebook lookup in tiles of rows, forward and backward, by the kernels of a device.
#include <limits>

#include "embedding_tiles.h"

namespace gumbel_ext {
namespace {

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

}  // namespace

GumbelEmbedding::Result lookup(const LookupKernels& kernels, GumbelEmbedding& a) {
  constexpr const char* op = name_of<GumbelEmbedding>();
  a.check();
  if (a.tau_tensor && a.tau_tensor->is_cpu()) {
    check_tau_values(op, a.tau_tensor->to(at::kDouble));
  }
  if (a.logits.numel() == 0) {
    const auto [out, index, state] = a.prepare();
    return {out.zero_(), index.fill_(-1), state.zero_()};
  }
  const int64_t dim = a.dim;
  const auto integers = a.logits.options().dtype(at::kLong);
  const at::Tensor state = a.rng_state ? a.rng_state->to(integers, /*non_blocking=*/false,
                                                         /*copy=*/true)
                                       : kernels.draw_rng_state(a.logits, a.generator);
  const Grouped call(a);
  at::Tensor rows, index;
  if (a.hard) {
    GumbelArgmax search{call.logits, dim + 1, /*keepdim=*/false, call.mask};
    search.rng_state = state;
    search.positions = call.given_positions();
    index = kernels.argmax(search);
    const at::Tensor chosen =
        call.logits.gather(dim + 1, index.clamp_min(0).unsqueeze(dim + 1)).squeeze(dim + 1);
    rows = kernels.gather(call.weight, code_rows(codes_of(index, chosen), dim));
  } else {
    Walk walk(kernels, call);
    index = at::empty_symint(shape_without(call.logits, dim + 1), integers);
    rows = at::empty({index.numel() / walk.groups, walk.groups, walk.width}, a.weight.options());
    for (; walk.group < walk.groups; ++walk.group) {
      const at::Tensor codebook = walk.codebook();
      do {
        const std::vector<c10::SymInt> places = walk.positions();
        GumbelSoftmax sample{walk.logits(),        a.tau, walk.tau(),
                             /*hard=*/false,       dim,   walk.mask(),
                             /*return_index=*/true};
        sample.rng_state = state;
        sample.positions = places;
        const auto [y, of_rows, used] = kernels.sample(sample);
        walk.of(index).copy_(of_rows);
        const at::Tensor out =
            rows.select(1, walk.group).narrow(0, walk.tiles.first_row(), walk.tiles.rows());
        const at::Tensor y_rows = as_rows(y, dim).to(walk.product);
        if (walk.product == a.weight.scalar_type()) {
          at::Tensor into = out;
          at::mm_out(into, y_rows, codebook);
        } else {
          out.copy_(at::mm(y_rows, codebook));
        }
      } while (walk.tiles.next());
    }
  }
  at::DimVector shape(a.logits.sizes());
  shape.erase(shape.begin() + dim);
  shape.push_back(rows.size(1) * rows.size(2));
  return {rows.view(shape).movedim(-1, dim).contiguous(),
          call.has_groups ? index : index.squeeze(dim), state};
}

GumbelEmbeddingBackward::Result lookup_backward(const LookupKernels& kernels,
                                                GumbelEmbeddingBackward& a) {
  auto [grad_logits, grad_weight, grad_tau] = a.prepare();
  if (a.logits.numel() == 0) return {grad_logits, grad_weight.zero_(), grad_tau.zero_()};
  if (a.weight_grad) grad_weight.reset();  // made last, of the sums
  const int64_t dim = a.dim;
  const Grouped call(a);
  const at::Tensor index_rows = call.grouped_index(a.index), grad_rows = call.grouped(a.grad);
  const at::Tensor grad_classes =
      a.logits_grad ? grad_logits.unflatten(dim, {call.weight.size(0), call.weight.size(1)})
                    : at::Tensor();
  at::Tensor sums;
  if (a.weight_grad && a.hard) {
    const at::Tensor last = grad_rows.movedim(at::IntArrayRef{dim, dim + 1}, {-2, -1});
    sums = kernels.sum_by_code(
        last.reshape({a.index.numel() / last.size(-2), last.size(-2), last.size(-1)})
            .to(compute_dtype(a.weight.scalar_type())),
        code_rows(index_rows, dim), call.weight.size(1));
  }

  const bool soft_sums = a.weight_grad && !a.hard, through_y = a.logits_grad || a.tau_grad;
  if (soft_sums || through_y) {
    Walk walk(kernels, call);
    const at::ScalarType summed =
        compute_dtype(at::promote_types(walk.product, a.logits.scalar_type()));
    if (soft_sums) sums = at::zeros(call.weight.sizes(), a.weight.options().dtype(summed));
    for (; walk.group < walk.groups; ++walk.group) {
      const at::Tensor codebook = walk.codebook();
      do {
        const std::vector<c10::SymInt> places = walk.positions();
        const at::Tensor dout = as_rows(walk.of(grad_rows), dim).to(walk.product);
        GumbelSoftmaxHardBackward tile{
            at::Tensor(), walk.logits(), walk.of(index_rows), a.tau,      walk.tau(),
            dim,          walk.mask(),   a.rng_state,         a.tau_grad, places};
        if (soft_sums) {
          GumbelSoftmax sample{tile.logits, a.tau, tile.tau_tensor, /*hard=*/false, dim, tile.mask};
          sample.rng_state = a.rng_state;
          sample.positions = places;
          tile.logits = std::get<0>(kernels.sample(sample));
          tile.mask = std::nullopt;
          tile.positions = at::OptionalSymIntArrayRef();
          at::Tensor total = sums.select(0, walk.group);
          const at::Tensor y_rows = as_rows(tile.logits, dim).to(walk.product);
          if (walk.product == summed) {
            total.addmm_(y_rows.t(), dout);
          } else {
            total.add_(at::mm(y_rows.t(), dout));
          }
        }
        if (!through_y) continue;
        at::Tensor matrix, dy = walk.tiles.empty(walk.classes, dout.options(), &matrix);
        at::mm_out(matrix, dout, codebook.t());
        tile.grad = dy.to(walk.tile_type);
        const at::Tensor wanted = a.logits_grad ? walk.of(grad_classes) : at::Tensor();
        const bool direct = a.logits_grad && a.logits.scalar_type() == walk.tile_type;
        const at::Tensor out = direct ? wanted : at::empty_like(tile.grad);
        const at::Tensor of_tau = kernels.backward_into(/*from_y=*/soft_sums, tile, out);
        if (a.logits_grad && !direct) wanted.copy_(out);
        if (a.tau_grad) walk.of(grad_tau.unsqueeze(dim + 1)).copy_(of_tau);
      } while (walk.tiles.next());
    }
  }
  if (a.weight_grad) grad_weight = sums.to(a.weight.scalar_type()).view(a.weight.sizes());
  return {grad_logits, grad_weight, grad_tau};
}

at::ScalarType widest_type(at::ScalarType logits, at::ScalarType codebook) {
  return compute_dtype(at::promote_types(logits, codebook));
}

}  // namespace gumbel_ext
