// The pieces of rows that are sharded over processes, in the arithmetic and order of the fused
// kernels: shards of whole chunks give the bits of the row in one piece.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "kernels.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

// Calls body(row, first class, classes, chunk) for every chunk of every row.
template <class Body>
void for_chunks(int64_t rows, int64_t classes, Body body) {
  const int64_t chunks = (classes + kChunk - 1) / kChunk;
  at::parallel_for(0, rows * chunks, std::max<int64_t>(1, 8192 / std::min(classes, kChunk)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t row = i / chunks, c = i % chunks * kChunk;
                       body(row, c, std::min(kChunk, classes - c), i);
                     }
                   });
}

at::Tensor empty_sums(const at::Tensor& rows) {
  at::DimVector shape(rows.sizes());
  shape.back() = (shape.back() + kChunk - 1) / kChunk;
  return at::empty(shape, at::kDouble);
}

std::tuple<at::Tensor, at::Tensor> exponentiate_chunks_cpu(const at::Tensor& scores,
                                                           const at::Tensor& largest, double tau,
                                                           const OptionalTensor& tau_tensor,
                                                           int64_t dim) {
  constexpr const char* op = "exponentiate_chunks";
  dim = check_exponentiate(op, scores, largest, tau, tau_tensor, dim);
  at::Tensor temperatures = row_temperatures(op, tau_tensor, scores, dim);
  if (tau_tensor) temperatures = temperatures.contiguous();
  const at::Tensor rows = scores.movedim(dim, -1).contiguous(), e = at::empty_like(rows),
                   sums = empty_sums(rows), peaks = largest.contiguous();
  if (rows.numel() > 0) {
    const int64_t classes = rows.size(-1), bytes = static_cast<int64_t>(rows.element_size());
    const ElementType type = element_type(rows.scalar_type());
    const char* from = static_cast<const char*>(rows.const_data_ptr());
    char* to = static_cast<char*>(e.mutable_data_ptr());
    const double* peak = peaks.const_data_ptr<double>();
    const double* taus = tau_tensor ? temperatures.const_data_ptr<double>() : nullptr;
    double* sum = sums.mutable_data_ptr<double>();
    for_chunks(rows.numel() / classes, classes,
               [&](int64_t row, int64_t c, int64_t count, int64_t chunk) {
                 const int64_t at = (row * classes + c) * bytes;
                 sum[chunk] = kernels().exponentiate(type, from + at, count, peak[row],
                                                     taus ? taus[row] : tau, to + at);
               });
  }
  return {e.movedim(-1, dim), sums};
}

at::Tensor dot_chunks_cpu(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& shift,
                          const OptionalTensor& dot, int64_t dim) {
  dim = check_dot("dot_chunks", grad, y, shift, dot, dim);
  const at::Tensor dy = grad.movedim(dim, -1).contiguous(), p = y.movedim(dim, -1).contiguous(),
                   sums = empty_sums(dy), shifts = shift.contiguous(),
                   dots = dot ? dot->contiguous() : at::Tensor();
  if (dy.numel() == 0) return sums;
  const int64_t classes = dy.size(-1);
  const ElementType type = element_type(dy.scalar_type());
  const char* grads = static_cast<const char*>(dy.const_data_ptr());
  const char* ys = static_cast<const char*>(p.const_data_ptr());
  const double* shift_of = shifts.const_data_ptr<double>();
  const double* dot_of = dot ? dots.const_data_ptr<double>() : nullptr;
  double* sum = sums.mutable_data_ptr<double>();
  const bool computed_y = p.scalar_type() != dy.scalar_type();
  for_chunks(dy.numel() / classes, classes,
             [&](int64_t row, int64_t c, int64_t count, int64_t chunk) {
               const int64_t at = row * classes + c;
               sum[chunk] =
                   kernels().dot(type, computed_y, ys + at * static_cast<int64_t>(p.element_size()),
                                 grads + at * static_cast<int64_t>(dy.element_size()), count,
                                 shift_of[row], dot_of ? dot_of + row : nullptr);
             });
  return sums;
}

at::Tensor noise_at_cpu(const at::Tensor& like, const at::Tensor& position,
                        const at::Tensor& rng_state) {
  check_noise_at("noise_at", like, position, rng_state);
  const at::Tensor places = position.contiguous(),
                   noise = at::empty(position.sizes(), like.options());
  const RngState state = reserve_randomness(std::nullopt, rng_state);
  const ElementType type = element_type(noise.scalar_type());
  const int64_t* place = places.const_data_ptr<int64_t>();
  char* data = static_cast<char*>(noise.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(noise.element_size());
  at::parallel_for(0, noise.numel(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().noise(type, state.seed, state.offset, static_cast<uint64_t>(place[i]), 1,
                      data + i * bytes);
    }
  });
  return noise;
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  m.impl("exponentiate_chunks", &exponentiate_chunks_cpu);
  m.impl("dot_chunks", &dot_chunks_cpu);
  m.impl("noise_at", &noise_at_cpu);
}
