// The binary concrete's CPU kernels: the same bits however the elements are cut and whatever the
// instruction set, and nothing touched outside. Their values are tests/test_binary.py's matter.
#pragma once

#include "strided.h"

namespace gumbel_ext {
namespace cpu {

struct BinaryCase {
  ElementType type;
  std::int64_t rows, run;
  int one;  // bits: logits, temperature, gradient are one value
  bool backward, hard;
};

inline std::vector<BinaryCase> binary_cases() {
  std::vector<BinaryCase> cases;
  for (const ElementType type : {ElementType::kFloat64, ElementType::kFloat32,
                                 ElementType::kBFloat16, ElementType::kFloat16}) {
    for (const std::int64_t run : {1, 15, 16, 65, 509, 1031}) {
      for (const bool backward : {false, true}) {
        for (const int one : {0, 2, 7}) {
          cases.push_back({type, run < 100 ? 7 : 3, run, one, backward, run == 65});
        }
      }
    }
  }
  return cases;
}

// The output and the terms, computed in `pieces` by as many threads.
inline std::vector<char> compute_binary(const KernelTable& table, const BinaryCase& c, int pieces) {
  const bool is_double = c.type == ElementType::kFloat64;
  const std::int64_t count = c.rows * c.run;
  const std::size_t size = is_double                         ? 8
                           : c.type == ElementType::kFloat32 ? 4
                                                             : 2,
                    computed = is_double ? 8 : 4, bytes = static_cast<std::size_t>(count) * size;
  const auto of = [&](int bit) { return c.one >> bit & 1 ? c.rows : count; };
  const Bytes logits = random_elements(of(0), c.type, -4, 1),
              inverse = random_numbers(of(1), is_double, 0.5, 2),
              grad = random_elements(of(2), c.type, -4, 3);
  const Bytes out(new char[bytes]), terms(new char[static_cast<std::size_t>(count) * computed]);

  BinaryProblem p;
  p.type = c.type;
  p.dims = 1;
  p.size[0] = c.rows;
  p.run = c.run;
  p.seed = 0x1234567890ABCDEFu;
  p.offset = 3;
  p.first_position = 2;
  p.position_stride[0] = c.run + 5;
  p.hard = c.hard;
  const auto set = [&](RunOperand& operand, const Bytes& data, int bit) {
    operand.data = data.get();
    operand.one = c.one >> bit & 1;
    operand.stride[0] = operand.one ? 1 : c.run;
  };
  set(p.logits, logits, 0);
  set(p.inverse_tau, inverse, 1);
  if (c.backward) {
    set(p.grad, grad, 2);
    p.tau_terms = terms.get();
  }
  p.out = out.get();
  std::vector<std::thread> threads;
  for (int i = 0; i < pieces; ++i) {
    threads.emplace_back([&, i] { table.binary(p, count * i / pieces, count * (i + 1) / pieces); });
  }
  for (std::thread& thread : threads) thread.join();

  std::vector<char> result(out.get(), out.get() + bytes);
  if (c.backward) {
    result.insert(result.end(), terms.get(),
                  terms.get() + static_cast<std::size_t>(count) * computed);
  }
  return result;
}

// Calls check(ok, what). `reference` computes what the bits are compared with, if they must agree.
template <class Check>
void check_binary_kernels(const KernelTable& table, const KernelTable* reference, Check check) {
  for (const BinaryCase& c : binary_cases()) {
    const std::string name = std::string(table.capability) + " binary concrete, type " +
                             std::to_string(static_cast<int>(c.type)) + ", runs of " +
                             std::to_string(c.run) + (c.backward ? ", backward" : "");
    const std::vector<char> base = compute_binary(table, c, 1);
    check(compute_binary(table, c, 5) == base, name + ": bits depend on how it is cut");
    if (reference) {
      check(compute_binary(*reference, c, 1) == base, name + ": bits depend on instruction set");
    }
  }
}

}  // namespace cpu
}  // namespace gumbel_ext
