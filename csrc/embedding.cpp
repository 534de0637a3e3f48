// The codebook lookup on any device: arguments, tiles, shapes and derivatives, and its kernels in
// PyTorch's ops for devices without some of their own.
#include "embedding.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd_levels.h"
#include "gumbel_ext.h"

namespace gumbel_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Lookup = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kForward = "gumbel_embedding";
constexpr const char* kBackward = "gumbel_embedding_backward";

// ---- arguments ----------------------------------------------------------------------------------

int64_t check_lookup(const char* op, const at::Tensor& logits, const at::Tensor& weight, double tau,
                     const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                     const std::optional<at::Generator>& generator, const OptionalTensor& rng_state,
                     at::OptionalSymIntArrayRef positions) {
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  TORCH_CHECK_VALUE(logits.dim() > 0, op, ": logits must have a dimension, got shape []");
  const at::ScalarType type = weight.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
      ": weight must have dtype float16, bfloat16, float32 or float64, got ", c10::toString(type));
  TORCH_CHECK_TYPE(weight.layout() == at::kStrided, op,
                   ": weight must be a dense (strided) tensor, got layout ", weight.layout());
  TORCH_CHECK_VALUE(weight.device() == logits.device(), op,
                    ": weight must be on the device of logits (", logits.device(), "), got ",
                    weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 2 || weight.dim() == 3, op,
                    ": weight must be of shape [classes, D] or [groups, classes of a group, D], "
                    "got shape ",
                    weight.sym_sizes());
  const c10::SymInt classes =
      weight.dim() == 2 ? weight.sym_size(0) : weight.sym_size(0) * weight.sym_size(1);
  TORCH_CHECK_VALUE(classes == logits.sym_size(dim), op, ": weight must have ",
                    logits.sym_size(dim), " rows, one for each class of logits along dim ", dim,
                    ", got ", classes, " in shape ", weight.sym_sizes());
  return dim;
}

// logits' shape with another size in the place of dim.
c10::SymDimVector with_size(const at::Tensor& logits, int64_t dim, const c10::SymInt& size) {
  c10::SymDimVector shape(logits.sym_sizes().begin(), logits.sym_sizes().end());
  shape[dim] = size;
  return shape;
}

c10::SymInt groups_of(const at::Tensor& weight) {
  return weight.dim() == 3 ? weight.sym_size(0) : c10::SymInt(1);
}

c10::SymDimVector out_shape(const at::Tensor& logits, const at::Tensor& weight, int64_t dim) {
  return with_size(logits, dim, groups_of(weight) * weight.sym_size(-1));
}

c10::SymDimVector index_shape(const at::Tensor& logits, const at::Tensor& weight, int64_t dim) {
  return weight.dim() == 3 ? with_size(logits, dim, weight.sym_size(0))
                           : shape_without(logits, dim);
}

int64_t check_lookup_backward(const at::Tensor& grad, const at::Tensor& logits,
                              const at::Tensor& weight, const at::Tensor& index, double tau,
                              const OptionalTensor& tau_tensor, int64_t dim,
                              const OptionalTensor& mask, const at::Tensor& rng_state,
                              at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kBackward, logits, weight, tau, tau_tensor, dim, mask, std::nullopt, rng_state,
                     positions);
  const c10::SymDimVector shape = out_shape(logits, weight, dim),
                          of_index = index_shape(logits, weight, dim);
  TORCH_CHECK_TYPE(grad.scalar_type() == weight.scalar_type(), kBackward, ": grad must have dtype ",
                   c10::toString(weight.scalar_type()), ", got ",
                   c10::toString(grad.scalar_type()));
  TORCH_CHECK_VALUE(
      grad.sym_sizes() == c10::SymIntArrayRef(shape) && grad.device() == logits.device(), kBackward,
      ": grad must have shape ", c10::SymIntArrayRef(shape), " on ", logits.device(), ", got ",
      grad.sym_sizes(), " on ", grad.device());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, kBackward,
                   ": index must have dtype int64, got ", c10::toString(index.scalar_type()));
  TORCH_CHECK_VALUE(index.sym_sizes() == c10::SymIntArrayRef(of_index), kBackward,
                    ": index must have shape ", c10::SymIntArrayRef(of_index), ", got ",
                    index.sym_sizes());
  return dim;
}

// ---- groups -------------------------------------------------------------------------------------

// [*A, G * X, *B] -> [*A, G, X, *B]; what broadcasts to it keeps its dimensions of size 1.
at::Tensor split_groups(const at::Tensor& t, int64_t dims_behind, const c10::SymInt& groups,
                        const c10::SymInt& size) {
  const int64_t place = t.dim() - 1 - dims_behind;
  if (place < 0) return t;
  if (t.sym_size(place) == 1) return t.unsqueeze(place);
  const c10::SymInt sizes[] = {groups, size};
  return t.unflatten_symint(place, sizes);
}

// A lookup with its groups as a dimension, one if it has none.
struct Grouped {
  at::Tensor logits, weight;  // [*A, G, V, *B], [G, V, D]
  OptionalTensor tau, mask;
  int64_t dim;  // of the groups; the classes follow
  std::vector<c10::SymInt> positions;
  bool has_groups;

  Grouped(const at::Tensor& given, const at::Tensor& codebook, const OptionalTensor& tau_tensor,
          int64_t d, const OptionalTensor& given_mask, at::OptionalSymIntArrayRef given_positions)
      : weight(codebook.dim() == 3 ? codebook : codebook.unsqueeze(0)),
        dim(d),
        has_groups(codebook.dim() == 3) {
    const c10::SymInt groups = weight.sym_size(0), classes = weight.sym_size(1);
    const int64_t behind = given.dim() - 1 - dim;
    const c10::SymInt sizes[] = {groups, classes};
    logits = given.unflatten_symint(dim, sizes);
    if (tau_tensor) {
      const int64_t place = tau_tensor->dim() - 1 - behind;
      tau = place < 0 ? *tau_tensor : tau_tensor->unsqueeze(place);
    }
    if (given_mask) mask = split_groups(*given_mask, behind, groups, classes);
    if (given_positions) {
      positions.assign(given_positions->begin(), given_positions->end());
      const c10::SymInt stride = positions[static_cast<size_t>(dim) + 1];
      positions.insert(positions.begin() + dim + 1, stride * classes);
    }
  }

  at::OptionalSymIntArrayRef given_positions() const {
    return positions.empty() ? at::OptionalSymIntArrayRef() : at::OptionalSymIntArrayRef(positions);
  }
  at::Tensor grouped(const at::Tensor& out_or_grad) const {
    const c10::SymInt sizes[] = {weight.sym_size(0), weight.sym_size(2)};
    return out_or_grad.unflatten_symint(dim, sizes);
  }
  at::Tensor grouped_index(const at::Tensor& index) const {
    return has_groups ? index : index.unsqueeze(dim);
  }
};

// ---- tiles --------------------------------------------------------------------------------------

// Rows of one group that follow each other, as boxes of a tensor [*A, X, *B] whose X is in `dim`.
class Tiles {
 public:
  Tiles(at::IntArrayRef shape, int64_t dim, int64_t rows) : dim_(dim), start_(shape.size(), 0) {
    shape_.assign(shape.begin(), shape.end());
    size_ = shape_;
    for (int64_t d = static_cast<int64_t>(size_.size()); d-- > 0;) {
      if (d == dim) continue;
      size_[d] = std::min(size_[d], std::max<int64_t>(1, rows));
      rows = size_[d] < shape_[d] ? 1 : rows / std::max<int64_t>(1, size_[d]);
    }
  }

  // The tile of [*A, X, *B] for any X, or of [*A, *B].
  at::Tensor of(const at::Tensor& whole) const {
    const bool without = whole.dim() < static_cast<int64_t>(shape_.size());
    at::Tensor part = whole;
    for (int64_t d = 0; d < static_cast<int64_t>(shape_.size()); ++d) {
      if (d == dim_) continue;
      part = part.narrow(without && d > dim_ ? d - 1 : d, start_[d], size(d));
    }
    return part;
  }
  int64_t rows() const {
    int64_t count = 1;
    for (int64_t d = 0; d < static_cast<int64_t>(shape_.size()); ++d)
      count *= d == dim_ ? 1 : size(d);
    return count;
  }
  // Of the tile's first row, among all.
  int64_t first_row() const {
    int64_t row = 0;
    for (int64_t d = 0; d < static_cast<int64_t>(shape_.size()); ++d) {
      if (d != dim_) row = row * shape_[d] + start_[d];
    }
    return row;
  }
  int64_t first_position(const at::DimVector& strides) const {
    int64_t position = 0;
    for (size_t d = 0; d < start_.size(); ++d) position += start_[d] * strides[d];
    return position;
  }
  bool next() {
    for (int64_t d = static_cast<int64_t>(shape_.size()); d-- > 0;) {
      if (d == dim_) continue;
      start_[d] += size_[d];
      if (start_[d] < shape_[d]) return true;
      start_[d] = 0;
    }
    return false;
  }
  // A tensor of the shape of a tile with `classes` in the place of X, for a product to be written
  // into as the matrix that `matrix` becomes: [rows, classes], or its transpose where rows lie
  // together in the logits.
  at::Tensor empty(int64_t classes, const at::TensorOptions& options, at::Tensor* matrix) const {
    at::DimVector sizes;
    int64_t behind = 1;
    for (int64_t d = 0; d < static_cast<int64_t>(shape_.size()); ++d) {
      if (d == dim_) continue;
      sizes.push_back(size(d));
      if (d > dim_) behind *= shape_[d];
    }
    if (behind > 1) {
      const at::Tensor transposed = at::empty({classes, rows()}, options);
      *matrix = transposed.t();
      sizes.insert(sizes.begin(), classes);
      return transposed.view(sizes).movedim(0, dim_);
    }
    *matrix = at::empty({rows(), classes}, options);
    sizes.push_back(classes);
    return matrix->view(sizes).movedim(-1, dim_);
  }

 private:
  int64_t size(int64_t d) const { return std::min(size_[d], shape_[d] - start_[d]); }

  int64_t dim_;
  at::DimVector shape_, size_, start_;
};

// [*A, X, *B] -> [rows, X]
at::Tensor as_rows(const at::Tensor& t, int64_t dim) {
  const at::Tensor last = t.movedim(dim, -1);
  const auto outer = last.sizes().slice(0, static_cast<size_t>(last.dim() - 1));
  return last.reshape({c10::multiply_integers(outer), last.size(-1)});
}

// The tiles of all groups of a call, and their operands.
class Walk {
 public:
  Walk(const LookupKernels& kernels, const Grouped& call)
      : call_(call),
        groups(call.weight.size(0)),
        classes(call.weight.size(1)),
        width(call.weight.size(2)),
        product(kernels.product_type(call.logits.scalar_type(), call.weight.scalar_type())),
        tile_type(at::promote_types(call.logits.scalar_type(), product)),
        places_(call.logits.sizes(), call.given_positions()),
        tiles(call.logits.select(call.dim, 0).sizes(), call.dim, kernels.rows_of_tile(classes)) {
    if (call.tau) {
      const bool number = call.tau->is_cpu() && call.tau->dim() == 0;
      at::DimVector shape(call.logits.sizes());
      shape[call.dim + 1] = 1;
      taus_ = number ? *call.tau : call.tau->expand(shape);
    }
    if (call.mask) allowed_ = call.mask->expand(call.logits.sizes());
  }

  // Each of the functions below is of the current group and tile.
  at::Tensor logits() const {
    return tiles.of(call_.logits.select(call_.dim, group)).to(tile_type);
  }
  at::Tensor codebook() const { return call_.weight.select(0, group).to(product); }
  at::Tensor of(const at::Tensor& grouped) const {
    return tiles.of(grouped.select(call_.dim, group));
  }
  OptionalTensor tau() const {
    if (!taus_ || taus_->dim() == 0) return taus_;
    return tiles.of(taus_->select(call_.dim, group));
  }
  OptionalTensor mask() const {
    return allowed_ ? OptionalTensor(tiles.of(allowed_->select(call_.dim, group))) : std::nullopt;
  }
  std::vector<c10::SymInt> positions() const {
    at::DimVector strides = places_.strides;
    const int64_t of_group = strides[call_.dim];
    strides.erase(strides.begin() + call_.dim);
    std::vector<c10::SymInt> out{places_.base + group * of_group + tiles.first_position(strides)};
    out.insert(out.end(), strides.begin(), strides.end());
    return out;
  }

 private:
  const Grouped& call_;

 public:
  const int64_t groups, classes, width;
  const at::ScalarType product, tile_type;
  int64_t group = 0;

 private:
  const Positions places_;
  OptionalTensor taus_, allowed_;

 public:
  Tiles tiles;
};

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
  const at::Tensor one = at::zeros({1}, logits.options().dtype(at::kFloat));
  return std::get<2>(gumbel_softmax(one, 1.0, std::nullopt, /*hard=*/false, 0, std::nullopt,
                                    /*return_index=*/false, generator));
}

}  // namespace

Lookup lookup(const LookupKernels& kernels, const at::Tensor& logits, const at::Tensor& weight,
              double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
              const OptionalTensor& mask, const std::optional<at::Generator>& generator,
              const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kForward, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(kForward, tau_tensor->to(at::kDouble));
  const auto integers = logits.options().dtype(at::kLong);
  if (logits.numel() == 0) {
    return {at::zeros_symint(out_shape(logits, weight, dim), weight.options()),
            at::full_symint(index_shape(logits, weight, dim), -1, integers),
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
             grad_tau = tau_grad ? at::empty_symint(with_size(logits, dim, groups_of(weight)),
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

// ---- in PyTorch's ops ---------------------------------------------------------------------------

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

at::ScalarType widest_type(at::ScalarType logits, at::ScalarType codebook) {
  return compute_dtype(at::promote_types(logits, codebook));
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

// ---- shapes -------------------------------------------------------------------------------------

Lookup gumbel_embedding_meta(const at::Tensor& logits, const at::Tensor& weight, double tau,
                             const OptionalTensor& tau_tensor, bool /*hard*/, int64_t dim,
                             const OptionalTensor& mask, std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kForward, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  const auto integers = logits.options().dtype(at::kLong);
  return {at::empty_symint(out_shape(logits, weight, dim), weight.options()),
          at::empty_symint(index_shape(logits, weight, dim), integers), at::empty({2}, integers)};
}

Lookup gumbel_embedding_backward_meta(const at::Tensor& grad, const at::Tensor& logits,
                                      const at::Tensor& weight, const at::Tensor& index, double tau,
                                      const OptionalTensor& tau_tensor, bool /*hard*/, int64_t dim,
                                      const OptionalTensor& mask, const at::Tensor& rng_state,
                                      bool logits_grad, bool weight_grad, bool tau_grad,
                                      at::OptionalSymIntArrayRef positions) {
  dim = check_lookup_backward(grad, logits, weight, index, tau, tau_tensor, dim, mask, rng_state,
                              positions);
  const auto of_tau = logits.options().dtype(compute_dtype(logits.scalar_type()));
  return {logits_grad ? at::empty_like(logits) : at::empty({0}, logits.options()),
          weight_grad ? at::empty_symint(weight.sym_sizes(), weight.options())
                      : at::empty({0}, weight.options()),
          tau_grad ? at::empty_symint(with_size(logits, dim, groups_of(weight)), of_tau)
                   : at::empty({0}, of_tau)};
}

// ---- derivatives --------------------------------------------------------------------------------

Lookup gumbel_embedding(const at::Tensor& logits, const at::Tensor& weight, double tau,
                        const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                        const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                        const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  using Function = Lookup(const at::Tensor&, const at::Tensor&, double, const OptionalTensor&, bool,
                          int64_t, const OptionalTensor&, std::optional<at::Generator>,
                          const OptionalTensor&, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::gumbel_embedding", "")
                             .typed<Function>();
  return op.call(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state, positions);
}

Lookup gumbel_embedding_backward(const at::Tensor& grad, const at::Tensor& logits,
                                 const at::Tensor& weight, const at::Tensor& index, double tau,
                                 const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                                 const OptionalTensor& mask, const at::Tensor& rng_state,
                                 bool logits_grad, bool weight_grad, bool tau_grad,
                                 at::OptionalSymIntArrayRef positions) {
  using Function =
      Lookup(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double,
             const OptionalTensor&, bool, int64_t, const OptionalTensor&, const at::Tensor&, bool,
             bool, bool, at::OptionalSymIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("gumbel_ext::gumbel_embedding_backward", "")
                             .typed<Function>();
  return op.call(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask, rng_state,
                 logits_grad, weight_grad, tau_grad, positions);
}

// [*A, G, X, *B] <-> [G, rows, X]
at::Tensor rows_of_groups(const at::Tensor& t, int64_t dim) {
  const at::Tensor last = t.movedim(at::IntArrayRef{dim, dim + 1}, {0, -1});
  const c10::SymInt rows = c10::multiply_integers(last.sym_sizes().slice(1, last.dim() - 2));
  const c10::SymInt shape[] = {last.sym_size(0), rows, last.sym_size(-1)};
  return last.reshape_symint(shape);
}

at::Tensor from_rows_of_groups(const at::Tensor& rows, const at::Tensor& like, int64_t dim) {
  c10::SymDimVector shape{rows.sym_size(0)};
  for (int64_t d = 0; d < like.dim(); ++d) {
    if (d != dim && d != dim + 1) shape.push_back(like.sym_size(d));
  }
  shape.push_back(rows.sym_size(2));
  return rows.reshape_symint(shape).movedim(at::IntArrayRef{0, -1}, {dim, dim + 1});
}

// The products with the sample itself, differentiable any number of times.
Lookup lookup_of_sample(const at::Tensor& logits, const at::Tensor& weight, double tau,
                        const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                        const OptionalTensor& mask, const std::optional<at::Generator>& generator,
                        const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup(kForward, logits, weight, tau, tau_tensor, dim, mask, generator, rng_state,
                     positions);
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  const at::ScalarType type = widest_type(logits.scalar_type(), weight.scalar_type());
  const auto [y, index, state] =
      gumbel_softmax(call.logits.to(type), tau, call.tau, hard, dim + 1, call.mask,
                     /*return_index=*/true, generator, rng_state, call.given_positions());
  const at::Tensor rows = at::bmm(rows_of_groups(y, dim), call.weight.to(type));
  const at::Tensor out =
      from_rows_of_groups(rows, y, dim).reshape_symint(out_shape(logits, weight, dim));
  return {out.to(weight.scalar_type()), call.has_groups ? index : index.squeeze(dim), state};
}

Lookup backward_of_sample(const at::Tensor& grad, const at::Tensor& logits,
                          const at::Tensor& weight, const at::Tensor& index, double tau,
                          const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                          const OptionalTensor& mask, const at::Tensor& rng_state, bool logits_grad,
                          bool weight_grad, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  dim = check_lookup_backward(grad, logits, weight, index, tau, tau_tensor, dim, mask, rng_state,
                              positions);
  const Grouped call(logits, weight, tau_tensor, dim, mask, positions);
  const at::ScalarType type = widest_type(logits.scalar_type(), weight.scalar_type());
  const at::Tensor dout = rows_of_groups(call.grouped(grad), dim).to(type),
                   z = call.logits.to(type);
  at::Tensor of_logits = at::empty({0}, logits.options()),
             of_weight = at::empty({0}, weight.options()),
             of_tau = at::empty({0}, logits.options().dtype(compute_dtype(logits.scalar_type())));
  if (logits_grad || tau_grad) {
    const at::Tensor dy =
        from_rows_of_groups(at::bmm(dout, call.weight.to(type).transpose(1, 2)), z, dim);
    const auto [dz, dtau] =
        gumbel_softmax_hard_backward(dy, z, call.grouped_index(index), tau, call.tau, dim + 1,
                                     call.mask, rng_state, tau_grad, call.given_positions());
    if (logits_grad) of_logits = dz.to(logits.scalar_type()).reshape_symint(logits.sym_sizes());
    if (tau_grad) of_tau = dtau.squeeze(dim + 1).to(of_tau.scalar_type());
  }
  if (weight_grad) {
    const at::Tensor y = std::get<0>(gumbel_softmax(z, tau, call.tau, hard, dim + 1, call.mask,
                                                    /*return_index=*/false, std::nullopt, rng_state,
                                                    call.given_positions()));
    of_weight = at::bmm(rows_of_groups(y, dim).transpose(1, 2), dout)
                    .to(weight.scalar_type())
                    .reshape_symint(weight.sym_sizes());
  }
  return {of_logits, of_weight, of_tau};
}

class GumbelEmbedding : public torch::autograd::Function<GumbelEmbedding> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits,
                               const at::Tensor& weight, double tau,
                               const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                               const OptionalTensor& mask,
                               const std::optional<at::Generator>& generator,
                               const OptionalTensor& rng_state,
                               at::OptionalSymIntArrayRef positions) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, index, state] = gumbel_embedding(logits, weight, tau, tau_tensor, hard, dim, mask,
                                                generator, rng_state, positions);
    ctx->mark_non_differentiable({index, state});
    ctx->set_materialize_grads(false);
    ctx->saved_data["tau"] = tau;
    ctx->saved_data["hard"] = hard;
    ctx->saved_data["dim"] = dim < 0 ? dim + logits.dim() : dim;
    if (positions) ctx->saved_data["positions"] = *positions;
    ctx->saved_data["tau_grad"] = requires_grad(tau_tensor);
    // The sample is recomputed from the noise.
    ctx->save_for_backward({logits, weight, index, state, tau_tensor.value_or(at::Tensor()),
                            mask.value_or(at::Tensor())});
    return {out, index, state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(10);
    if (!grads[0].defined()) return out;
    const variable_list saved = ctx->get_saved_variables();
    const bool logits_grad = ctx->needs_input_grad(0), weight_grad = ctx->needs_input_grad(1),
               tau_grad = ctx->saved_data["tau_grad"].toBool();
    std::vector<c10::SymInt> positions_saved;
    at::OptionalSymIntArrayRef positions;
    if (ctx->saved_data.count("positions") > 0) {
      positions_saved = ctx->saved_data["positions"].toSymIntVector();
      positions = positions_saved;
    }
    const auto [of_logits, of_weight, of_tau] = gumbel_embedding_backward(
        grads[0], saved[0], saved[1], saved[2], ctx->saved_data["tau"].toDouble(),
        optional(saved[4]), ctx->saved_data["hard"].toBool(), ctx->saved_data["dim"].toInt(),
        optional(saved[5]), saved[3], logits_grad, weight_grad, tau_grad, positions);
    if (logits_grad) out[0] = of_logits;
    if (weight_grad) out[1] = of_weight;
    if (tau_grad) out[3] = reduced_to(of_tau, saved[4]);
    return out;
  }
};

Lookup gumbel_embedding_autograd(const at::Tensor& logits, const at::Tensor& weight, double tau,
                                 const OptionalTensor& tau_tensor, bool hard, int64_t dim,
                                 const OptionalTensor& mask, std::optional<at::Generator> generator,
                                 const OptionalTensor& rng_state,
                                 at::OptionalSymIntArrayRef positions) {
  const bool recorded = records(logits, weight, tau_tensor),
             tangent = has_tangent(logits, weight, tau_tensor);
  if (!recorded && !tangent) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return gumbel_embedding(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                            positions);
  }
  if (tangent || under_transform()) {
    // Under a transform the sample is not recomputed from the noise: below this level a vmap may
    // give each example its own, which the one state that was drawn does not tell.
    return lookup_of_sample(logits, weight, tau, tau_tensor, hard, dim, mask, generator, rng_state,
                            positions);
  }
  const variable_list out = GumbelEmbedding::apply(logits, weight, tau, tau_tensor, hard, dim, mask,
                                                   generator, rng_state, positions);
  return {out[0], out[1], out[2]};
}

Lookup gumbel_embedding_backward_autograd(const at::Tensor& grad, const at::Tensor& logits,
                                          const at::Tensor& weight, const at::Tensor& index,
                                          double tau, const OptionalTensor& tau_tensor, bool hard,
                                          int64_t dim, const OptionalTensor& mask,
                                          const at::Tensor& rng_state, bool logits_grad,
                                          bool weight_grad, bool tau_grad,
                                          at::OptionalSymIntArrayRef positions) {
  if (records(grad, logits, weight, tau_tensor) || has_tangent(grad, logits, weight, tau_tensor)) {
    return backward_of_sample(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                              rng_state, logits_grad, weight_grad, tau_grad, positions);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return gumbel_embedding_backward(grad, logits, weight, index, tau, tau_tensor, hard, dim, mask,
                                   rng_state, logits_grad, weight_grad, tau_grad, positions);
}

}  // namespace
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CompositeExplicitAutograd, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_of_ops);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_of_ops);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Meta, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_meta);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_meta);
}

TORCH_LIBRARY_IMPL(gumbel_ext, Autograd, m) {
  m.impl("gumbel_embedding", &gumbel_ext::gumbel_embedding_autograd);
  m.impl("gumbel_embedding_backward", &gumbel_ext::gumbel_embedding_backward_autograd);
}
