// The codebook lookup on the CPU: rows copied by code, and added up by code.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "../ops/embedding.h"
#include "gumbel_softmax_cpu.h"
#include "tensors.h"

namespace gumbel_ext {
namespace cpu {
namespace {

constexpr int64_t kGrainBytes = 32768;

at::Tensor gather(const at::Tensor& codebook, const at::Tensor& codes) {
  const at::Tensor table = codebook.contiguous();
  const int64_t groups = table.size(0), classes = table.size(1), width = table.size(2);
  const at::Tensor rows = at::empty({codes.size(0), groups, width}, table.options());
  const int64_t bytes = width * static_cast<int64_t>(table.element_size());
  if (rows.numel() == 0) return rows;
  const at::Tensor nan =
      at::full({width}, std::numeric_limits<double>::quiet_NaN(), table.options());
  const char *from = static_cast<const char*>(table.const_data_ptr()),
             *nans = static_cast<const char*>(nan.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t* code = codes.const_data_ptr<int64_t>();
  at::parallel_for(0, codes.numel(), std::max<int64_t>(1, kGrainBytes / bytes),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       char* row = to + i * bytes;
                       if (code[i] == -1) {
                         std::memset(row, 0, static_cast<size_t>(bytes));
                       } else {
                         const char* source =
                             code[i] < 0 ? nans : from + (i % groups * classes + code[i]) * bytes;
                         std::memcpy(row, source, static_cast<size_t>(bytes));
                       }
                     }
                   });
  return rows;
}

// The rows of a group in order of their codes, those of one code in order of their number.
struct SortedRows {
  std::vector<int64_t> first;  // of each code, and the end of the last
  std::vector<int64_t> row;

  SortedRows(const int64_t* codes, int64_t count, int64_t groups, int64_t group, int64_t classes)
      : first(static_cast<size_t>(classes) + 1, 0) {
    const auto code_of = [&](int64_t r) { return codes[r * groups + group]; };
    int64_t chosen = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (code_of(r) < 0) continue;
      ++first[static_cast<size_t>(code_of(r)) + 1];
      ++chosen;
    }
    for (size_t v = 1; v < first.size(); ++v) first[v] += first[v - 1];
    row.resize(static_cast<size_t>(chosen));
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t r = 0; r < count; ++r) {
      if (code_of(r) >= 0) row[static_cast<size_t>(next[static_cast<size_t>(code_of(r))]++)] = r;
    }
  }
};

// Columns that are added up together, in registers and in double, so that a code that many rows
// chose costs no digits.
constexpr int64_t kColumnsTogether = 32;

template <class T>
void sum_codes(const T* rows, int64_t row_stride, const SortedRows& sorted, int64_t begin,
               int64_t end, int64_t columns, T* sums, int64_t sum_stride) {
  for (int64_t v = begin; v < end; ++v) {
    double total[kColumnsTogether] = {};
    const int64_t last = sorted.first[static_cast<size_t>(v) + 1];
    for (int64_t i = sorted.first[static_cast<size_t>(v)]; i < last; ++i) {
      const T* row = rows + sorted.row[static_cast<size_t>(i)] * row_stride;
      if (columns == kColumnsTogether) {
        for (int64_t c = 0; c < kColumnsTogether; ++c) total[c] += static_cast<double>(row[c]);
      } else {
        for (int64_t c = 0; c < columns; ++c) total[c] += static_cast<double>(row[c]);
      }
    }
    for (int64_t c = 0; c < columns; ++c) sums[v * sum_stride + c] = static_cast<T>(total[c]);
  }
}

void check_codes(const at::Tensor& codes, int64_t classes) {
  const int64_t* code = codes.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < codes.numel(); ++i) {
    TORCH_CHECK_INDEX(code[i] >= -1 && code[i] < classes,
                      "gumbel_embedding_backward: index must be between -1 and ", classes - 1,
                      ", got ", code[i]);
  }
}

template <class T>
void sum_groups(const at::Tensor& rows, const at::Tensor& codes, const at::Tensor& sums) {
  const int64_t count = rows.size(0), groups = rows.size(1), width = rows.size(2),
                classes = sums.size(1);
  const T* from = rows.const_data_ptr<T>();
  T* to = sums.mutable_data_ptr<T>();
  const int64_t blocks = (width + kColumnsTogether - 1) / kColumnsTogether;
  // One code may have all the rows: threads share the columns first, then the codes.
  const int64_t parts = std::max<int64_t>(1, at::get_num_threads() / blocks);
  for (int64_t group = 0; group < groups; ++group) {
    const SortedRows sorted(codes.const_data_ptr<int64_t>(), count, groups, group, classes);
    const auto first_of_part = [&](int64_t part) {
      if (part == parts) return classes;
      const auto target = static_cast<int64_t>(sorted.row.size()) * part / parts;
      return part == 0 ? int64_t{0}
                       : std::lower_bound(sorted.first.begin(), sorted.first.end() - 1, target) -
                             sorted.first.begin();
    };
    at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task / parts * kColumnsTogether, part = task % parts;
        sum_codes(from + group * width + column, groups * width, sorted, first_of_part(part),
                  first_of_part(part + 1), std::min(kColumnsTogether, width - column),
                  to + group * classes * width + column, width);
      }
    });
  }
}

at::Tensor sum_by_code(const at::Tensor& given, const at::Tensor& codes, int64_t classes) {
  check_codes(codes, classes);
  const at::Tensor rows = given.contiguous(),
                   sums = at::empty({rows.size(1), classes, rows.size(2)}, rows.options());
  if (sums.numel() == 0) return sums;
  if (rows.scalar_type() == at::kDouble) {
    sum_groups<double>(rows, codes, sums);
  } else {
    sum_groups<float>(rows, codes, sums);
  }
  return sums;
}

at::Tensor draw_state(const at::Tensor& logits, const std::optional<at::Generator>& generator) {
  const at::Tensor state = empty_rng_state(logits);
  write_state(reserve_randomness(generator, std::nullopt), state);
  return state;
}

at::Tensor tile_backward(bool from_y, const GumbelSoftmaxHardBackward& a,
                         const at::Tensor& grad_logits) {
  const at::Tensor grad_tau = empty_grad_tau(a.logits, a.dim, a.tau_grad);
  backward_into(name_of<GumbelEmbeddingBackward>(), from_y ? Op::kBackward : Op::kBackwardRecompute,
                a, grad_logits, grad_tau);
  return grad_tau;
}

// 16-bit products are no quicker here, and would round what the softmax is differentiated with.
at::ScalarType product_type(at::ScalarType logits, at::ScalarType codebook) {
  return compute_dtype(at::promote_types(logits, codebook));
}

constexpr LookupKernels kKernels{&gather, &sum_by_code,    &draw_state,   &sample,
                                 &argmax, &tile_backward,  &product_type, int64_t{1} << 18,
                                 128,     int64_t{1} << 22};

GumbelEmbedding::Result gumbel_embedding_cpu(GumbelEmbedding& a) { return lookup(kKernels, a); }

GumbelEmbeddingBackward::Result gumbel_embedding_backward_cpu(GumbelEmbeddingBackward& a) {
  return lookup_backward(kKernels, a);
}

}  // namespace
}  // namespace cpu
}  // namespace gumbel_ext

TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) {
  using namespace gumbel_ext::cpu;
  using gumbel_ext::implement;
  implement<&gumbel_embedding_cpu>(m);
  implement<&gumbel_embedding_backward_cpu>(m);
}
