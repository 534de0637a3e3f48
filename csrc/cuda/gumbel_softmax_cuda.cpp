// The Gumbel-softmax sample, its index and its backward on CUDA.
#include "gumbel_softmax_cuda.h"

#include <c10/cuda/CUDAGuard.h>

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

void copy_back(const at::Tensor& part, const at::Tensor& output) {
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
    check_launch(op_, launch_positions(row_positions_, rows, table, current_stream()));
  }

  const char* run(Op op, const Plan& plan) {
    const int64_t bytes = partial_bytes(plan, p);
    if (bytes > 0) {
      kept_.push_back(at::empty({bytes}, like_.options().dtype(at::kByte)));
      p.partials = kept_.back().mutable_data_ptr();
    }
    return launch(op, type_, p, plan, current_stream());
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

}  // namespace

// ---- samples ------------------------------------------------------------------------------------

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
    if (y) copy_back(*y_part, out);
  } while (pieces.next());
}

void sample_into(const GumbelSoftmax& a, const GumbelSoftmax::Result& out) {
  const auto& [y, index, used_rng_state] = out;
  if (a.logits.numel() == 0) {
    index.fill_(-1);
    used_rng_state.zero_();
    return;
  }
  const c10::cuda::CUDAGuard guard(a.logits.device());
  at::Tensor on_device;
  const RandomSource random = random_source(a.generator, a.rng_state, on_device);
  forward_into(name_of<GumbelSoftmax>(), a.hard ? Op::kHard : Op::kSoft, a.logits, a.tau,
               a.tau_tensor, a.dim, a.mask, &random, a.positions, y,
               a.return_index ? OptionalTensor(index) : std::nullopt, used_rng_state);
}

GumbelSoftmax::Result sample(const GumbelSoftmax& a) {
  const auto out = a.allocate();
  sample_into(a, out);
  return out;
}

at::Tensor argmax(const GumbelArgmax& a) {
  const at::Tensor index = a.allocate();
  if (a.logits.numel() == 0) return index.fill_(-1);
  const c10::cuda::CUDAGuard guard(a.logits.device());
  // One number a row, of the shape without dim.
  const at::Tensor of_rows = a.keepdim && a.logits.dim() > 0 ? index.squeeze(a.dim) : index;
  at::Tensor on_device;
  const RandomSource random = random_source(a.generator, a.rng_state, on_device);
  forward_into(name_of<GumbelArgmax>(), Op::kIndexOnly, a.logits, 1.0, std::nullopt, a.dim, a.mask,
               &random, a.positions, std::nullopt, of_rows, std::nullopt);
  return index;
}

at::Tensor draw_state(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  // While a graph is captured only a kernel can read the generator.
  GumbelSoftmax one{at::zeros({1}, like.options().dtype(at::kFloat))};
  one.hard = true;
  one.dim = 0;
  one.generator = generator;
  return std::get<2>(sample(one));
}

// ---- their backward -----------------------------------------------------------------------------

void backward_into(const char* name, Op op, const GumbelSoftmaxHardBackward& a,
                   const at::Tensor& grad_logits, const at::Tensor& grad_tau) {
  if (a.logits.numel() == 0) {
    grad_tau.zero_();
    return;
  }
  const c10::cuda::CUDAGuard guard(a.logits.device());
  const at::Tensor indices = a.index.contiguous();
  at::Tensor on_device;
  RandomSource random{};
  if (op == Op::kBackwardRecompute) random = random_source(std::nullopt, a.rng_state, on_device);
  const OptionalTensor taus = tau_of_rows(a.tau_tensor, a.logits, a.dim),
                       allowed = expanded(a.mask, a.logits.sym_sizes());
  Pieces pieces(a.logits, a.dim, a.positions);
  do {
    const at::Tensor part = pieces.logits(), grad_part = pieces.of(grad_logits);
    Call call(name, part, a.dim, pieces);
    const at::Tensor input = call.input(part), dy = call.input(pieces.of(a.grad));
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
    if (a.tau_grad) call.p.grad_tau = pieces.of(grad_tau).mutable_data_ptr();
    call.set_tau(a.tau, tau_of(pieces, taus));
    call.set_mask(part_of(pieces, allowed));
    call.run(op);
    copy_back(grad_part, out);
  } while (pieces.next());
}

namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor>;

GumbelSoftmax::Result gumbel_softmax_cuda(GumbelSoftmax& a) {
  const auto out = a.prepare();
  check_tau_on_host(a);
  sample_into(a, out);
  return out;
}

at::Tensor gumbel_argmax_cuda(GumbelArgmax& a) {
  check_rows(a);
  return argmax(a);
}

Gradients gumbel_softmax_backward_cuda(GumbelSoftmaxBackward& a) {
  const auto out = a.prepare();
  backward_into(name_of<GumbelSoftmaxBackward>(), Op::kBackward, from_y(a), std::get<0>(out),
                std::get<1>(out));
  return out;
}

Gradients gumbel_softmax_hard_backward_cuda(GumbelSoftmaxHardBackward& a) {
  const auto out = a.prepare();
  backward_into(name_of<GumbelSoftmaxHardBackward>(), Op::kBackwardRecompute, a, std::get<0>(out),
                std::get<1>(out));
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CUDA, m) {
  using namespace gumbel_ext::cuda;
  using gumbel_ext::implement;
  implement<&gumbel_softmax_cuda>(m);
  implement<&gumbel_argmax_cuda>(m);
  implement<&gumbel_softmax_backward_cuda>(m);
  implement<&gumbel_softmax_hard_backward_cuda>(m);
}
