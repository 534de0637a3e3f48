// The CUDA implementations of the ops: tensors in, launches out.
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "backward_into.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cuda {
namespace {

const char* launch(Op op, ElementType type, const Params& params, const Plan& plan, void* stream) {
  switch (type) {
    case ElementType::kFloat64:
      return launch_float64(op, params, plan, stream);
    case ElementType::kFloat32:
      return launch_float32(op, params, plan, stream);
    case ElementType::kBFloat16:
      return launch_bfloat16(op, params, plan, stream);
    default:
      return launch_float16(op, params, plan, stream);
  }
}

Device current_device() {
  const auto index = c10::cuda::current_device();
  int multiprocessors = 1, major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  return Device{multiprocessors, major >= 9};
}

// Strides of the logical [outer, classes, inner] that a tensor is seen as.
struct Layout {
  int64_t outer, classes, inner;
  int64_t outer_stride, class_stride, inner_stride;
};

Layout sizes_of(const at::Tensor& t, int64_t dim) {
  Layout l{1, 1, 1, 0, 1, 0};
  if (t.dim() == 0) return l;
  l.classes = t.size(dim);
  for (int64_t d = 0; d < dim; ++d) l.outer *= t.size(d);
  for (int64_t d = dim + 1; d < t.dim(); ++d) l.inner *= t.size(d);
  return l;
}

bool find_strides(const at::Tensor& t, int64_t dim, Layout* l) {
  if (t.dim() == 0) return true;
  l->class_stride = t.size(dim) == 1 ? 1 : t.stride(dim);
  return merges(t, 0, dim, &l->outer_stride) && merges(t, dim + 1, t.dim(), &l->inner_stride);
}

// The memory layout of a call: that of the output, which empty_like() keeps for dense logits. One
// that is not three strides, or in which neither the classes of a row nor rows that follow each
// other in noise positions are adjacent, is made contiguous.
struct CallLayout {
  Layout layout;
  bool contiguous;  // operands must be made contiguous
};

CallLayout choose_layout(const at::Tensor& logits, int64_t dim) {
  CallLayout c{sizes_of(logits, dim), false};
  const bool usable = logits.is_non_overlapping_and_dense() &&
                      find_strides(logits, dim, &c.layout) &&
                      (c.layout.class_stride == 1 || c.layout.inner_stride == 1);
  if (!usable || c.layout.class_stride < 0) {
    c.contiguous = true;
    c.layout = sizes_of(logits, dim);
    c.layout.class_stride = c.layout.inner;
    c.layout.inner_stride = 1;
    c.layout.outer_stride = c.layout.classes * c.layout.inner;
  }
  return c;
}

bool lie_alike(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

at::Tensor in_layout(const at::Tensor& t, const at::Tensor& like, const CallLayout& c) {
  if (c.contiguous) return t.contiguous();
  if (lie_alike(t, like)) return t;
  at::Tensor copy = at::empty_strided(like.sizes(), like.strides(), t.options());
  copy.copy_(t);
  return copy;
}

void settle(const at::Tensor& part, const at::Tensor& output) {
  if (!output.is_same(part)) part.copy_(output);
}

at::Tensor empty_in_layout(const at::Tensor& like, const CallLayout& c) {
  return c.contiguous ? at::empty(like.sizes(), like.options())
                      : at::empty_strided(like.sizes(), like.strides(), like.options());
}

// Leading dimensions of stride 0 before dim: samples of logits that were expanded, not repeated.
// The kernels read tensors without gaps, so that a call takes them in pieces, of which it copies as
// many samples as stay small; a single sample is read where it lies.
constexpr int64_t kMostCopied = 1 << 22;

class Pieces {
 public:
  Pieces(const at::Tensor& logits, int64_t dim, at::OptionalSymIntArrayRef positions)
      : shape_(logits.sizes()), places_(shape_, positions) {
    int64_t leading = 0;
    while (leading < dim && logits.stride(leading) == 0 && logits.numel() > 0) ++leading;
    at::Tensor one = logits;
    for (int64_t d = 0; d < leading; ++d) one = one.narrow(d, 0, 1);
    logits_ = leading == 0 ? logits : one.contiguous().expand(shape_);
    const int64_t sample = one.numel();
    int64_t room = std::max<int64_t>(1, kMostCopied / std::max<int64_t>(1, sample));
    size_.assign(shape_.begin(), shape_.begin() + leading);
    for (int64_t d = leading; d-- > 0; room = size_[d] < shape_[d] ? 1 : room / size_[d]) {
      size_[d] = std::min(size_[d], std::max<int64_t>(1, room));
    }
    start_.assign(size_.size(), 0);
  }

  // The part of a tensor of the shape of logits, or of that with dim reduced or removed.
  at::Tensor of(const at::Tensor& whole) const {
    at::Tensor part = whole;
    for (size_t d = 0; d < size_.size(); ++d) {
      const auto at = static_cast<int64_t>(d);
      part = part.narrow(at, start_[d], std::min(size_[d], shape_[d] - start_[d]));
    }
    return part;
  }
  at::Tensor logits() const { return of(logits_); }
  // Sets the noise positions of the part, or of all.
  bool set_part(Params& p, const at::Tensor& part, int64_t dim, PositionGrid* rows) const {
    int64_t base = places_.base;
    for (size_t d = 0; d < start_.size(); ++d) base += start_[d] * places_.strides[d];
    return set(p, base, part.sizes(), dim, rows);
  }
  bool set_all(Params& p, int64_t dim, PositionGrid* rows) const {
    return set(p, places_.base, shape_, dim, rows);
  }
  at::IntArrayRef shape() const { return shape_; }
  bool first() const {
    return std::all_of(start_.begin(), start_.end(), [](int64_t at) { return at == 0; });
  }
  // Moves on to the next; false after the last.
  bool next() {
    for (size_t d = size_.size(); d-- > 0;) {
      start_[d] += size_[d];
      if (start_[d] < shape_[d]) return true;
      start_[d] = 0;
    }
    return false;
  }

 private:
  bool set(Params& p, int64_t base, at::IntArrayRef sizes, int64_t dim, PositionGrid* rows) const {
    return set_positions(p, static_cast<uint64_t>(base), static_cast<int>(sizes.size()),
                         sizes.data(), places_.strides.data(), static_cast<int>(dim), rows);
  }

  const at::IntArrayRef shape_;
  const Positions places_;
  at::Tensor logits_;
  at::DimVector size_, start_;
};

OptionalTensor expanded(const OptionalTensor& t, c10::SymIntArrayRef shape) {
  return t ? OptionalTensor(t->expand_symint(shape)) : std::nullopt;
}
OptionalTensor part_of(const Pieces& pieces, const OptionalTensor& whole) {
  return whole ? OptionalTensor(pieces.of(*whole)) : std::nullopt;
}
// A number on the CPU stays one.
OptionalTensor tau_of_rows(const OptionalTensor& tau, const at::Tensor& logits, int64_t dim) {
  return tau && on_host(*tau) ? tau
                              : expanded(tau, c10::SymIntArrayRef(shape_reduced(logits, dim)));
}
OptionalTensor tau_of(const Pieces& pieces, const OptionalTensor& tau) {
  return tau && on_host(*tau) ? tau : part_of(pieces, tau);
}

class Call {
 public:
  // `like` is the current one of the pieces.
  Call(const char* op, const at::Tensor& like, int64_t dim, const Pieces& pieces)
      : op_(op),
        guard_(like.device()),
        like_(like),
        dim_(dim),
        layout_(choose_layout(like, dim)),
        type_(element_type(like.scalar_type())) {
    const Layout& l = layout_.layout;
    check_classes(op, l.classes);
    p.outer = l.outer;
    p.classes = l.classes;
    p.inner = l.inner;
    p.outer_stride = l.outer_stride;
    p.class_stride = l.class_stride;
    p.inner_stride = l.inner_stride;
    // The sums of every piece are cut as those of the whole would be, and so give the same bits.
    planned_ = p;
    for (int64_t d = 0; d < dim && d < like.dim(); ++d) {
      planned_.outer = planned_.outer / like.size(d) * pieces.shape()[d];
    }
    if (pieces.set_all(planned_, dim, &row_positions_)) planned_.row_positions = &kSomeTable;
    rows_need_positions_ = pieces.set_part(p, like, dim, &row_positions_);
  }

  at::Tensor input(const at::Tensor& t) {
    kept_.push_back(in_layout(t, like_, layout_));
    return kept_.back();
  }
  // Where to write what belongs into `part` of the result: there, if it lies as the call wants it.
  at::Tensor output(const at::Tensor& part) {
    const bool usable = layout_.contiguous ? part.is_contiguous() : lie_alike(part, like_);
    return usable ? part : empty_in_layout(like_, layout_);
  }

  void set_tau(double tau, const OptionalTensor& tau_tensor) {
    kept_.push_back(gumbel_ext::cuda::set_tau(p, tau, tau_tensor, like_, dim_));
  }

  void set_mask(const OptionalTensor& mask) {
    if (!mask) return;
    at::Tensor wide = mask->expand(like_.sizes());
    Layout l = sizes_of(wide, dim_);
    if (!find_strides(wide, dim_, &l)) {
      wide = wide.contiguous();
      l = sizes_of(wide, dim_);
      find_strides(wide, dim_, &l);
    }
    kept_.push_back(wide);
    p.mask = static_cast<const std::uint8_t*>(wide.const_data_ptr());
    p.mask_outer_stride = l.outer_stride;
    p.mask_class_stride = l.class_stride;
    p.mask_inner_stride = l.inner_stride;
  }

  void set_no_noise() {
    gumbel_ext::cuda::set_no_noise(p);
    gumbel_ext::cuda::set_no_noise(planned_);
    rows_need_positions_ = false;
  }

  void run(Op op) {
    if (rows_need_positions_) write_row_positions();
    Device device = current_device();
    // An index is the same however it is found.
    const Params& planned = op == Op::kHard || op == Op::kIndexOnly ? p : planned_;
    const Plan plan = make_plan(op, type_, planned, device);
    const char* error = run(op, plan);
    if (error != nullptr && plan.regime == Regime::kClusters) {
      // Part of a GPU may have no room for so many blocks together.
      device.clusters = false;
      error = run(op, make_plan(op, type_, planned, device));
    }
    check_launch(op_, error);
  }

  Params p{};

 private:
  void write_row_positions() {
    const int64_t rows = p.outer * p.inner;
    kept_.push_back(at::empty({rows}, like_.options().dtype(at::kLong)));
    int64_t* table = kept_.back().mutable_data_ptr<int64_t>();
    p.row_positions = table;
    check_launch(op_, launch_positions(row_positions_, rows, table,
                                       c10::cuda::getCurrentCUDAStream().stream()));
  }

  const char* run(Op op, const Plan& plan) {
    const int64_t bytes = partial_bytes(plan, p);
    if (bytes > 0) {
      kept_.push_back(at::empty({bytes}, like_.options().dtype(at::kByte)));
      p.partials = kept_.back().mutable_data_ptr();
    }
    return launch(op, type_, p, plan, c10::cuda::getCurrentCUDAStream().stream());
  }

  const char* op_;
  c10::cuda::CUDAGuard guard_;
  const at::Tensor& like_;
  const int64_t dim_;
  const CallLayout layout_;
  const ElementType type_;
  static constexpr std::int64_t kSomeTable = 0;
  Params planned_{};  // what the plan is made from
  bool rows_need_positions_ = false;
  PositionGrid row_positions_{};
  // What the kernels read must outlive the launch; the stream orders its memory's next use.
  std::vector<at::Tensor> kept_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> gumbel_softmax_cuda(
    const at::Tensor& logits, double tau, const OptionalTensor& tau_tensor, bool hard, int64_t dim,
    const OptionalTensor& mask, bool return_index, std::optional<at::Generator> generator,
    const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_softmax";
  dim = check_forward(op, logits, tau, tau_tensor, dim, mask, generator, rng_state, positions);
  if (tau_tensor && tau_tensor->is_cpu()) check_tau_values(op, tau_tensor->to(at::kDouble));

  const auto integers = logits.options().dtype(at::kLong);
  at::Tensor index = return_index ? at::empty_symint(shape_without(logits, dim), integers)
                                  : at::empty({0}, integers);
  if (logits.numel() == 0) {
    if (return_index) index.fill_(-1);
    return {at::empty_like(logits), index, at::zeros({2}, integers)};
  }
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor used = at::empty({2}, integers), y = at::empty_like(logits), on_device;
  const RandomSource random = random_source(generator, rng_state, on_device);
  forward_into(op, hard ? Op::kHard : Op::kSoft, logits, tau, tau_tensor, dim, mask, &random,
               positions, y, return_index ? OptionalTensor(index) : std::nullopt, used);
  return {y, index, used};
}

at::Tensor gumbel_argmax_cuda(const at::Tensor& logits, int64_t dim, bool keepdim,
                              const OptionalTensor& mask, std::optional<at::Generator> generator,
                              const OptionalTensor& rng_state,
                              at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_argmax";
  dim = check_forward(op, logits, 1.0, std::nullopt, dim, mask, generator, rng_state, positions);

  at::Tensor index =
      at::empty_symint(shape_without(logits, dim), logits.options().dtype(at::kLong));
  if (logits.numel() == 0) {
    index.fill_(-1);
  } else {
    const c10::cuda::CUDAGuard guard(logits.device());
    at::Tensor on_device;
    const RandomSource random = random_source(generator, rng_state, on_device);
    forward_into(op, Op::kIndexOnly, logits, 1.0, std::nullopt, dim, mask, &random, positions,
                 std::nullopt, index, std::nullopt);
  }
  return keepdim && logits.dim() > 0 ? index.unsqueeze_(dim) : index;
}

at::Tensor gumbel_topk_cuda(const at::Tensor& logits, c10::SymInt number, int64_t dim,
                            const OptionalTensor& mask, std::optional<at::Generator> generator,
                            const OptionalTensor& rng_state, at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_topk";
  const int64_t k = number.expect_int();
  dim = check_topk(op, logits, k, dim, mask, generator, rng_state, positions);
  const auto integers = logits.options().dtype(at::kLong);
  at::Tensor index = at::empty_symint(shape_with(logits, dim, k), integers);
  if (index.numel() == 0) return index;
  const c10::cuda::CUDAGuard guard(logits.device());

  // The kernels take rows of adjacent classes; positions stay those of the logits as they are.
  const bool flat = logits.dim() == 0;
  const at::Tensor x = flat ? logits.unsqueeze(0) : logits.movedim(dim, -1).contiguous();
  const int64_t last = x.dim() - 1, classes = x.size(last), rows = x.numel() / classes;
  TORCH_CHECK_VALUE(classes < std::numeric_limits<int32_t>::max() - 16, op,
                    ": logits may have at most 2^31 - 17 classes on CUDA, got ", classes);
  Positions places(logits.sizes(), positions);
  if (flat) places.strides.push_back(1);
  const int64_t class_places = places.strides[dim];
  places.strides.erase(places.strides.begin() + dim);
  places.strides.push_back(class_places);

  Params p{};
  p.k = k;
  p.outer = rows;
  p.classes = classes;
  p.inner = 1;
  p.outer_stride = classes;
  p.class_stride = 1;
  p.logits = x.const_data_ptr();
  PositionGrid row_positions{};
  const bool needs_table = set_positions(
      p, static_cast<uint64_t>(places.base), static_cast<int>(x.dim()), x.sizes().data(),
      places.strides.data(), static_cast<int>(last), &row_positions);
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  at::Tensor table, allowed, on_device;
  if (needs_table) {
    table = at::empty({rows}, integers);
    p.row_positions = table.const_data_ptr<int64_t>();
    check_launch(op,
                 launch_positions(row_positions, rows, table.mutable_data_ptr<int64_t>(), stream));
  }
  if (mask) {
    allowed = mask->expand(logits.sizes());
    allowed = (flat ? allowed.unsqueeze(0) : allowed.movedim(dim, -1)).contiguous();
    p.mask = static_cast<const std::uint8_t*>(allowed.const_data_ptr());
    p.mask_outer_stride = classes;
    p.mask_class_stride = 1;
  }
  p.random = random_source(generator, rng_state, on_device);

  const ElementType type = element_type(logits.scalar_type());
  const TopKPlan plan = make_topk_plan(type, p, current_device());
  const at::Tensor scores = at::empty({plan.bytes}, logits.options().dtype(at::kByte));
  p.partials = scores.mutable_data_ptr();
  at::DimVector shape(x.sizes());
  shape[last] = k;
  at::Tensor chosen;
  if (plan.sorts) {
    check_launch(op, launch_topk(type, p, plan, stream));
    const auto [values, order] = scores.view(compute_dtype(logits.scalar_type()))
                                     .view(x.sizes())
                                     .sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
    const double infinity = std::numeric_limits<double>::infinity();
    chosen = order.narrow(-1, 0, k).masked_fill(values.narrow(-1, 0, k).eq(-infinity), -1);
  } else {
    chosen = at::empty(shape, integers);
    p.index = chosen.mutable_data_ptr<int64_t>();
    check_launch(op, launch_topk(type, p, plan, stream));
  }
  return index.copy_(flat ? chosen : chosen.movedim(-1, dim));
}

at::Tensor gumbel_noise_cuda(const at::Tensor& like, c10::SymIntArrayRef size,
                             std::optional<at::Generator> generator,
                             const OptionalTensor& rng_state,
                             at::OptionalSymIntArrayRef positions) {
  constexpr const char* op = "gumbel_noise";
  check_noise(op, like, size, generator, rng_state, positions);
  const c10::cuda::CUDAGuard guard(like.device());
  at::Tensor noise = at::empty_symint(size, like.options());
  if (noise.numel() == 0) return noise;
  at::Tensor on_device;
  const RandomSource random = random_source(generator, rng_state, on_device);
  const Positions places(noise.sizes(), positions);
  const PositionGrid grid =
      merged_positions(static_cast<uint64_t>(places.base), static_cast<int>(noise.dim()),
                       noise.sizes().data(), places.strides.data());
  check_launch(op,
               launch_noise(element_type(like.scalar_type()), random, grid, noise.numel(),
                            noise.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return noise;
}

at::Tensor draw_rng_state_cuda(const at::Tensor& like, std::optional<at::Generator> generator,
                               const OptionalTensor& /*after*/) {
  // While a graph is captured only a kernel can read the generator.
  const at::Tensor one = at::zeros({1}, like.options().dtype(at::kFloat));
  return std::get<2>(gumbel_softmax_cuda(one, 1.0, std::nullopt, /*hard=*/true, 0, std::nullopt,
                                         /*return_index=*/false, std::move(generator), std::nullopt,
                                         std::nullopt));
}

at::Tensor noise_at_cuda(const at::Tensor& like, const at::Tensor& position,
                         const at::Tensor& rng_state) {
  constexpr const char* op = "noise_at";
  check_noise_at(op, like, position, rng_state);
  const c10::cuda::CUDAGuard guard(like.device());
  const at::Tensor noise = at::empty(position.sizes(), like.options()),
                   table = position.contiguous();
  if (noise.numel() == 0) return noise;
  at::Tensor on_device;
  const RandomSource random = random_source(std::nullopt, rng_state, on_device);
  PositionGrid grid{};
  grid.table = table.const_data_ptr<int64_t>();
  check_launch(op,
               launch_noise(element_type(like.scalar_type()), random, grid, noise.numel(),
                            noise.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
  return noise;
}

}  // namespace

void forward_into(const char* name, Op op, const at::Tensor& logits, double tau,
                  const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                  const RandomSource* random, at::OptionalSymIntArrayRef positions,
                  const OptionalTensor& y, const OptionalTensor& index,
                  const OptionalTensor& used_state) {
  const OptionalTensor taus = tau_of_rows(tau_tensor, logits, dim),
                       allowed = expanded(mask, logits.sym_sizes());
  Pieces pieces(logits, dim, positions);
  do {
    const at::Tensor part = pieces.logits();
    Call call(name, part, dim, pieces);
    const at::Tensor x = call.input(part);
    call.p.logits = x.const_data_ptr();
    const OptionalTensor y_part = part_of(pieces, y);
    const at::Tensor out = y ? call.output(*y_part) : at::Tensor();
    if (y) call.p.y = out.mutable_data_ptr();
    if (index) call.p.index = pieces.of(*index).mutable_data_ptr<int64_t>();
    if (random == nullptr) {
      call.set_no_noise();
    } else {
      call.p.random = *random;
      if (used_state && pieces.first()) {
        call.p.used_state = used_state->mutable_data_ptr<int64_t>();
      }
    }
    call.set_tau(tau, tau_of(pieces, taus));
    call.set_mask(part_of(pieces, allowed));
    call.run(op);
    if (y) settle(*y_part, out);
  } while (pieces.next());
}

at::Tensor backward_into(const char* name, Op op, const at::Tensor& grad,
                         const at::Tensor& logits_or_y, const at::Tensor& index, double tau,
                         const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
                         const OptionalTensor& rng_state, bool tau_grad,
                         at::OptionalSymIntArrayRef positions, const at::Tensor& grad_logits) {
  dim = check_backward(name, grad, logits_or_y, index, tau, tau_tensor, dim, mask, rng_state,
                       positions);

  at::Tensor grad_tau = empty_grad_tau(logits_or_y, dim, tau_grad);
  if (logits_or_y.numel() == 0) return grad_tau.zero_();

  const c10::cuda::CUDAGuard guard(logits_or_y.device());
  const at::Tensor indices = index.contiguous();
  at::Tensor on_device;
  RandomSource random{};
  if (rng_state) random = random_source(std::nullopt, rng_state, on_device);
  const OptionalTensor taus = tau_of_rows(tau_tensor, logits_or_y, dim),
                       allowed = expanded(mask, logits_or_y.sym_sizes());
  Pieces pieces(logits_or_y, dim, positions);
  do {
    const at::Tensor part = pieces.logits(), grad_part = pieces.of(grad_logits);
    Call call(name, part, dim, pieces);
    const at::Tensor input = call.input(part), dy = call.input(pieces.of(grad));
    const at::Tensor out = call.output(grad_part);
    if (op == Op::kBackward) {
      // Kernels that read y only, which others write, share the field.
      call.p.y = const_cast<void*>(input.const_data_ptr());
    } else {
      call.p.logits = input.const_data_ptr();
    }
    call.p.random = random;
    call.p.grad = dy.const_data_ptr();
    call.p.grad_logits = out.mutable_data_ptr();
    call.p.index = const_cast<int64_t*>(pieces.of(indices).const_data_ptr<int64_t>());
    if (tau_grad) call.p.grad_tau = pieces.of(grad_tau).mutable_data_ptr();
    call.set_tau(tau, tau_of(pieces, taus));
    call.set_mask(part_of(pieces, allowed));
    call.run(op);
    settle(grad_part, out);
  } while (pieces.next());
  return grad_tau;
}

namespace {

std::tuple<at::Tensor, at::Tensor> backward_cuda(const char* name, Op op, const at::Tensor& grad,
                                                 const at::Tensor& logits_or_y,
                                                 const at::Tensor& index, double tau,
                                                 const OptionalTensor& tau_tensor, int64_t dim,
                                                 const OptionalTensor& mask,
                                                 const OptionalTensor& rng_state, bool tau_grad,
                                                 at::OptionalSymIntArrayRef positions) {
  check_logits(name, logits_or_y);
  const at::Tensor grad_logits = at::empty_like(logits_or_y);
  const at::Tensor grad_tau = backward_into(name, op, grad, logits_or_y, index, tau, tau_tensor,
                                            dim, mask, rng_state, tau_grad, positions, grad_logits);
  return {grad_logits, grad_tau};
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_backward_cuda(const at::Tensor& grad,
                                                                const at::Tensor& y,
                                                                const at::Tensor& index, double tau,
                                                                const OptionalTensor& tau_tensor,
                                                                int64_t dim, bool tau_grad) {
  return backward_cuda("gumbel_softmax_backward", Op::kBackward, grad, y, index, tau, tau_tensor,
                       dim, std::nullopt, std::nullopt, tau_grad, std::nullopt);
}

std::tuple<at::Tensor, at::Tensor> gumbel_softmax_hard_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& index, double tau,
    const OptionalTensor& tau_tensor, int64_t dim, const OptionalTensor& mask,
    const at::Tensor& rng_state, bool tau_grad, at::OptionalSymIntArrayRef positions) {
  return backward_cuda("gumbel_softmax_hard_backward", Op::kBackwardRecompute, grad, logits, index,
                       tau, tau_tensor, dim, mask, rng_state, tau_grad, positions);
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  m.impl("gumbel_softmax", &gumbel_softmax_cuda);
  m.impl("gumbel_argmax", &gumbel_argmax_cuda);
  m.impl("gumbel_topk", &gumbel_topk_cuda);
  m.impl("gumbel_noise", &gumbel_noise_cuda);
  m.impl("draw_rng_state", &draw_rng_state_cuda);
  m.impl("noise_at", &noise_at_cuda);
  m.impl("gumbel_softmax_backward", &gumbel_softmax_backward_cuda);
  m.impl("gumbel_softmax_hard_backward", &gumbel_softmax_hard_backward_cuda);
}
