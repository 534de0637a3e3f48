// Chunks of rows that are sharded over processes on the CPU, in the arithmetic and order of the
// fused kernels: shards of whole chunks give the bits of the row in one piece.
#include <ATen/Parallel.h>

#include "../ops/sharded_rows.h"
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

std::tuple<at::Tensor, at::Tensor> exponentiate_chunks_cpu(ExponentiateChunks& a) {
  const auto [exponentials, sums] = a.prepare();
  at::Tensor temperatures =
      row_temperatures(name_of<ExponentiateChunks>(), a.tau_tensor, a.scores, a.dim);
  if (a.tau_tensor) temperatures = temperatures.contiguous();
  const at::Tensor rows = a.scores.movedim(a.dim, -1).contiguous(),
                   e = exponentials.movedim(a.dim, -1), peaks = a.largest.contiguous();
  if (rows.numel() > 0) {
    const int64_t classes = rows.size(-1), bytes = static_cast<int64_t>(rows.element_size());
    const ElementType type = element_type(rows.scalar_type());
    const char* from = static_cast<const char*>(rows.const_data_ptr());
    char* to = static_cast<char*>(e.mutable_data_ptr());
    const double* peak = peaks.const_data_ptr<double>();
    const double* taus = a.tau_tensor ? temperatures.const_data_ptr<double>() : nullptr;
    double* sum = sums.mutable_data_ptr<double>();
    for_chunks(rows.numel() / classes, classes,
               [&](int64_t row, int64_t c, int64_t count, int64_t chunk) {
                 const int64_t at = (row * classes + c) * bytes;
                 sum[chunk] = kernels().exponentiate(type, from + at, count, peak[row],
                                                     taus ? taus[row] : a.tau, to + at);
               });
  }
  return {exponentials, sums};
}

at::Tensor dot_chunks_cpu(DotChunks& a) {
  const at::Tensor sums = a.prepare();
  const at::Tensor dy = a.grad.movedim(a.dim, -1).contiguous(),
                   p = a.y.movedim(a.dim, -1).contiguous(), shifts = a.shift.contiguous(),
                   dots = a.dot ? a.dot->contiguous() : at::Tensor();
  if (dy.numel() == 0) return sums;
  const int64_t classes = dy.size(-1);
  const ElementType type = element_type(dy.scalar_type());
  const char* grads = static_cast<const char*>(dy.const_data_ptr());
  const char* ys = static_cast<const char*>(p.const_data_ptr());
  const double* shift_of = shifts.const_data_ptr<double>();
  const double* dot_of = a.dot ? dots.const_data_ptr<double>() : nullptr;
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

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&exponentiate_chunks_cpu>(m);
  implement<&dot_chunks_cpu>(m);
}
