// The CPU kernels without noise, of the straight-through softmax: the same bits however the work is
// cut, in every layout and on every instruction set, and nothing touched outside. Their values are
// tests/test_straight_through_softmax.py's matter.
#pragma once

#include "cpu/execute.h"
#include "strided.h"

namespace gumbel_ext {
namespace cpu {

struct NoiselessCase {
  ElementType type;
  Extent size;
  Laying laying;
  bool masked, special, tau_per_row;

  std::string name() const {
    return std::string(name_of(type)) + " [" + std::to_string(size.outer) + ", " +
           std::to_string(size.classes) + ", " + std::to_string(size.inner) + "] layout " +
           std::to_string(static_cast<int>(laying));
  }
};

inline std::vector<NoiselessCase> noiseless_cases() {
  // Short rows, rows long enough to be searched by bounds, were there noise, rows longer than a
  // tile, slabs, columns, and a row that is shared among threads.
  const Extent sizes[] = {{7, 1, 1},  {21, 33, 1}, {3, 1031, 1}, {2, 2500, 1},
                          {3, 65, 5}, {2, 700, 5}, {2, 33, 17},  {2, 20001, 1}};
  std::vector<NoiselessCase> cases;
  std::mt19937 flip(7);
  for (const ElementType type : kElementTypes) {
    for (const Extent& size : sizes) {
      for (const Laying laying : kLayings) {
        if (size.classes > 10000 && laying != Laying::kContiguous) continue;
        cases.push_back({type, size, laying, flip() % 2 == 0, flip() % 2 == 0, flip() % 2 == 0});
      }
    }
  }
  return cases;
}

// Cut in one, cut in five, contiguous.
constexpr int kNoiselessVariants = 3;

inline std::vector<char> compute_noiseless(const KernelTable& table, const NoiselessCase& c,
                                           int variant) {
  const Extent &size = c.size, plain = strides_of(Laying::kContiguous, size, false),
               laid = strides_of(c.laying, size, false);
  Strided logits = random_strided(c.type, size, laid, -4, 21),
          grad = random_strided(c.type, size, laid, -4, 22), mask = some_mask(size, laid);
  if (c.special) {
    set_some(logits, c.type, 3, -HUGE_VAL);
    set_some(logits, c.type, 307, std::nan(""));
  }
  const bool contiguous = variant == 2 || c.laying == Laying::kContiguous;
  if (variant == 2) {
    logits = logits.moved(plain);
    grad = grad.moved(plain);
    mask = mask.moved(plain);
  }
  const Bytes tau = random_numbers(size.rows(), true, 0.5, 23);
  const ElementType wide = computed_type(c.type);
  Written y(c.type, size.count()), one_hot(c.type, size.count()), grad_logits(c.type, size.count()),
      grad_tau(wide, size.rows());
  std::vector<std::int64_t> index(static_cast<std::size_t>(size.rows()), -7), only(index);

  Problem p{};
  p.noise = false;
  p.type = c.type;
  p.outer = size.outer;
  p.classes = size.classes;
  p.inner = size.inner;
  p.dims = 2;
  p.size[0] = size.outer;
  p.size[1] = size.inner;
  p.tau_value = 0.7;
  p.positions.stride[0] = size.classes * size.inner;
  p.positions.stride[1] = 1;
  p.positions.class_stride = size.classes == 1 ? 1 : size.inner;
  p.positions.contiguous = true;
  const auto write_to = [&](Operand& operand, const Written& out) {
    operand.data = out.bytes.get();
    operand.class_stride = size.classes == 1 ? 1 : plain.classes;
    operand.contiguous = true;
    operand.stride[0] = plain.outer;
    operand.stride[1] = plain.inner;
  };
  const int threads = variant == 1 ? 5 : 1;
  const auto run = [&](Op op) { execute(table, op, p, threads, InThreads{threads}); };

  logits.attach(p.logits, contiguous);
  if (c.masked) mask.attach(p.mask, contiguous);
  if (c.tau_per_row) {
    p.tau.data = tau.get();
    p.tau.class_stride = 1;
    p.tau.stride[0] = size.inner;
    p.tau.stride[1] = 1;
  }
  p.index = only.data();
  run(Op::kIndexOnly);
  p.index = index.data();
  write_to(p.output, y);
  run(Op::kForward);
  p.hard = true;
  write_to(p.output, one_hot);
  run(Op::kForward);
  p.hard = false;
  p.output = Operand();
  grad.attach(p.grad, contiguous);
  write_to(p.grad_logits, grad_logits);
  p.grad_tau = grad_tau.bytes.get();
  run(Op::kBackwardRecompute);

  std::vector<char> bytes;
  for (const Written* out : {&y, &one_hot, &grad_logits, &grad_tau}) out->append_to(bytes);
  index.insert(index.end(), only.begin(), only.end());
  const char* indices = reinterpret_cast<const char*>(index.data());
  bytes.insert(bytes.end(), indices, indices + index.size() * sizeof index[0]);
  return bytes;
}

}  // namespace cpu
}  // namespace gumbel_ext
