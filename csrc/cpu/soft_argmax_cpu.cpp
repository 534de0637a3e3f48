// The expected position on the CPU: rows of contiguous classes, cut in chunks that are shared among
// threads. The cut does not depend on their number, so neither do the bits.
#include <ATen/Parallel.h>

#include <vector>

#include "../ops/soft_argmax.h"
#include "kernels.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

static_assert(kMaxCoordinates == gumbel_ext::kMaxCoordinates, "the ops check what kernels can");

constexpr int64_t kGrainElements = 8192;

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrainElements / elements); }

// What forward and backward need of their arguments, in the memory that the kernels read.
class Call {
 public:
  // Of the op or of its backward.
  template <class Op>
  explicit Call(const Op& a)
      : rows((a.logits.dim() == 0 ? a.logits.unsqueeze(0) : a.logits)
                 .movedim(a.dim, -1)
                 .contiguous()),
        classes(rows.size(-1)),
        count(rows.numel() / classes),
        chunks((classes + kChunk - 1) / kChunk),
        type(element_type(rows.scalar_type())) {
    const at::ScalarType computed = compute_dtype(rows.scalar_type());
    // Around their middle, so that coordinates that are all large lose nothing in float32.
    const at::Tensor exact = a.positions.detach().to(at::kDouble);
    middle = (exact.amax(1, /*keepdim=*/true) + exact.amin(1, /*keepdim=*/true)) / 2;
    centred = (exact - middle).to(computed).contiguous();
    row_.positions = centred.const_data_ptr();
    row_.coordinates = static_cast<int>(a.positions.size(0));
    row_.classes = classes;
    row_.beta = a.beta;
    if (a.beta_tensor) {
      const at::Tensor values = a.beta_tensor->to(at::kDouble);
      check_beta_values(name_of<Op>(), values);
      betas = values.expand_symint(shape_reduced(a.logits, a.dim)).contiguous();
    }
  }

  PositionRow row(int64_t r) const {
    PositionRow of_row = row_;
    if (betas.defined()) of_row.beta = betas.const_data_ptr<double>()[r];
    return of_row;
  }
  const char* logits(int64_t r, int64_t c) const { return at_class(rows.const_data_ptr(), r, c); }
  const char* at_class(const void* data, int64_t r, int64_t c) const {
    return static_cast<const char*>(data) +
           (r * classes + c) * static_cast<int64_t>(rows.element_size());
  }

  const at::Tensor rows;
  const int64_t classes, count, chunks;
  const ElementType type;
  at::Tensor middle, centred, betas;

 private:
  PositionRow row_{};
};

// Calls body(row, first class, classes, chunk) for every chunk of every row.
template <class Body>
void for_chunks(const Call& call, Body body) {
  at::parallel_for(0, call.count * call.chunks, grain(std::min(call.classes, kChunk)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t row = i / call.chunks, c = i % call.chunks * kChunk;
                       body(row, c, std::min(kChunk, call.classes - c), i);
                     }
                   });
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_cpu(SoftArgmax& a) {
  const auto [expected, state] = a.prepare();
  const Call call(a);
  const int64_t coordinates = a.positions.size(0), width = 3 + coordinates;
  double* states = state.mutable_data_ptr<double>();
  const KernelTable& table = kernels();
  if (call.chunks == 1) {
    at::parallel_for(0, call.count, grain(call.classes), [&](int64_t begin, int64_t end) {
      PositionChunk chunk;
      for (int64_t r = begin; r < end; ++r) {
        const PositionRow row = call.row(r);
        table.accumulate_positions(call.type, call.logits(r, 0), 0, call.classes, row, chunk);
        table.settle_positions(call.type, &chunk, 1, row, states + r * width);
      }
    });
  } else {
    std::vector<PositionChunk> chunks(static_cast<size_t>(call.count * call.chunks));
    for_chunks(call, [&](int64_t r, int64_t c, int64_t count, int64_t i) {
      table.accumulate_positions(call.type, call.logits(r, c), c, count, call.row(r),
                                 chunks[static_cast<size_t>(i)]);
    });
    at::parallel_for(0, call.count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        table.settle_positions(call.type, chunks.data() + r * call.chunks, call.chunks, call.row(r),
                               states + r * width);
      }
    });
  }
  const at::Tensor best = state.select(-1, 0).to(at::kLong).flatten();
  const at::Tensor origin = call.centred.index_select(1, best).t().contiguous().view_as(expected);
  expected.copy_(origin.to(at::kDouble) + state.narrow(-1, 3, coordinates) +
                 call.middle.squeeze(1));
  return {expected, state};
}

std::tuple<at::Tensor, at::Tensor> soft_argmax_backward_cpu(SoftArgmaxBackward& a) {
  const auto [grad_logits, grad_beta] = a.prepare();
  const Call call(a);
  const int64_t coordinates = a.positions.size(0), width = 3 + coordinates;
  const at::Tensor in_order = grad_logits.dim() == 0 ? grad_logits.unsqueeze(0)
                                                     : grad_logits.movedim(a.dim, -1),
                   grad_rows = in_order.is_contiguous() ? in_order : at::empty_like(call.rows),
                   states = a.row_state.contiguous(), grads = a.grad.contiguous();
  const double* state = states.const_data_ptr<double>();
  for (int64_t r = 0; r < call.count; ++r) {
    // Read as an address below.
    const double best = state[r * width];
    TORCH_CHECK_INDEX(best >= 0 && best < static_cast<double>(call.classes),
                      name_of<SoftArgmaxBackward>(), ": row_state must hold classes between 0 and ",
                      call.classes - 1, ", got ", best);
  }
  const char* grad_data = static_cast<const char*>(grads.const_data_ptr());
  const int64_t grad_bytes = coordinates * static_cast<int64_t>(grads.element_size());
  std::vector<double> parts(static_cast<size_t>(a.beta_grad ? call.count * call.chunks : 0));
  for_chunks(call, [&](int64_t r, int64_t c, int64_t count, int64_t i) {
    const double part = kernels().position_gradient(
        call.type, call.logits(r, c), c, count, call.row(r), state + r * width,
        grad_data + r * grad_bytes, a.beta_grad,
        const_cast<char*>(call.at_class(grad_rows.mutable_data_ptr(), r, c)));
    if (a.beta_grad) parts[static_cast<size_t>(i)] = part;
  });
  if (a.beta_grad) {
    at::Tensor sums = at::empty({call.count}, at::kDouble);
    double* sum = sums.mutable_data_ptr<double>();
    for (int64_t r = 0; r < call.count; ++r) {
      sum[r] = 0;
      for (int64_t c = 0; c < call.chunks; ++c) {
        sum[r] += parts[static_cast<size_t>(r * call.chunks + c)];
      }
    }
    grad_beta.copy_(sums.view(grad_beta.sizes()));
  }
  if (!grad_rows.is_same(in_order)) in_order.copy_(grad_rows);
  return {grad_logits, grad_beta};
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&soft_argmax_cpu>(m);
  implement<&soft_argmax_backward_cpu>(m);
}
