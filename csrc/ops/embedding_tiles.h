// The groups of a codebook lookup, and the tiles of rows that it is made in.
#pragma once

#include "embedding.h"

namespace gumbel_ext {

// [*A, G * X, *B] -> [*A, G, X, *B]; what broadcasts to it keeps its dimensions of size 1.
inline at::Tensor split_groups(const at::Tensor& t, int64_t dims_behind, const c10::SymInt& groups,
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

  // Of the op or of its backward.
  template <class Op>
  explicit Grouped(const Op& a)
      : weight(a.weight.dim() == 3 ? a.weight : a.weight.unsqueeze(0)),
        dim(a.dim),
        has_groups(a.weight.dim() == 3) {
    const c10::SymInt groups = weight.sym_size(0), classes = weight.sym_size(1);
    const int64_t behind = a.logits.dim() - 1 - dim;
    const c10::SymInt sizes[] = {groups, classes};
    logits = a.logits.unflatten_symint(dim, sizes);
    if (a.tau_tensor) {
      const int64_t place = a.tau_tensor->dim() - 1 - behind;
      tau = place < 0 ? *a.tau_tensor : a.tau_tensor->unsqueeze(place);
    }
    if (a.mask) mask = split_groups(*a.mask, behind, groups, classes);
    if (a.positions) {
      positions.assign(a.positions->begin(), a.positions->end());
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
inline at::Tensor as_rows(const at::Tensor& t, int64_t dim) {
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

}  // namespace gumbel_ext
