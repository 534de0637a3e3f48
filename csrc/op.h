// An op as a struct: its schema, what compilers and autocast may do with it, and its arguments as
// fields in the order of the schema.
//
//     struct Zgr {
//       static constexpr const char* schema = "zgr(Tensor logits, int dim, ...) -> (Tensor y,
//       ...)"; static constexpr bool draws = true; static constexpr Autocast autocast =
//       Autocast::kFloat32; using Result = std::tuple<at::Tensor, at::Tensor>; Result prepare();
//
//       at::Tensor logits;
//       int64_t dim;
//       ...
//     };
//
// prepare() checks the arguments, counts dim from the front and allocates the results: Meta kernels
// return them, the kernels of a device fill them.
//
//     TORCH_LIBRARY_FRAGMENT(gumbel_ext, m) { define<Zgr>(m); }
//     TORCH_LIBRARY_IMPL(gumbel_ext, CPU, m) { implement<&zgr_cpu>(m); }   // Result zgr_cpu(Zgr&)
//     auto [y, index] = call(Zgr{logits, dim, ...});                       // by the dispatcher
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace gumbel_ext {

using OptionalTensor = std::optional<at::Tensor>;

// What torch.autocast does to an op on CUDA. kFloat32 is what it does to softmax: the first
// argument is cast, and the result is of float32. On the CPU softmax keeps its dtype, and so do all
// ops here.
enum class Autocast { kNone, kFloat32 };

// ---- what a schema says -------------------------------------------------------------------------

constexpr std::string_view name_in(std::string_view schema) {
  return schema.substr(0, schema.find('('));
}

// The text of the arguments, between the parentheses.
constexpr std::string_view arguments_in(std::string_view schema) {
  const size_t open = schema.find('(');
  return schema.substr(open + 1, schema.find(')') - open - 1);
}

constexpr size_t count_arguments(std::string_view schema) {
  size_t count = 1;
  for (const char c : arguments_in(schema)) count += c == ',';
  return count;
}

// The name of an argument: of "SymInt[]? positions=None" it is "positions".
constexpr std::string_view argument_name(std::string_view schema, size_t index) {
  std::string_view rest = arguments_in(schema);
  for (; index > 0; --index) rest = rest.substr(rest.find(',') + 1);
  rest = rest.substr(0, rest.find(','));
  rest = rest.substr(0, rest.find('='));
  return rest.substr(rest.rfind(' ') + 1);
}

// The place of an argument among all of the op, or their number if there is none of this name.
template <class Op>
constexpr size_t place_of(std::string_view argument) {
  constexpr size_t count = count_arguments(Op::schema);
  for (size_t i = 0; i < count; ++i) {
    if (argument_name(Op::schema, i) == argument) return i;
  }
  return count;
}

template <class Op>
constexpr bool has_argument(std::string_view argument) {
  return place_of<Op>(argument) < count_arguments(Op::schema);
}

template <class Op>
constexpr auto terminated_name() {
  constexpr std::string_view name = name_in(Op::schema);
  std::array<char, name.size() + 1> text{};
  for (size_t i = 0; i < name.size(); ++i) text[i] = name[i];
  return text;
}
template <class Op>
inline constexpr auto kTerminatedName = terminated_name<Op>();

// The name of the op for messages, without its namespace.
template <class Op>
constexpr const char* name_of() {
  return kTerminatedName<Op>.data();
}

// ---- the fields of an op ------------------------------------------------------------------------

// References to the fields, in order. The schema says how many there are, and a struct that has
// another number of them does not compile.
template <class Op>
auto fields(Op& op) {
  constexpr size_t count = count_arguments(Op::schema);
  static_assert(3 <= count && count <= 14, "add a case below");
  if constexpr (count == 3) {
    auto& [a, b, c] = op;
    return std::tie(a, b, c);
  } else if constexpr (count == 4) {
    auto& [a, b, c, d] = op;
    return std::tie(a, b, c, d);
  } else if constexpr (count == 5) {
    auto& [a, b, c, d, e] = op;
    return std::tie(a, b, c, d, e);
  } else if constexpr (count == 6) {
    auto& [a, b, c, d, e, f] = op;
    return std::tie(a, b, c, d, e, f);
  } else if constexpr (count == 7) {
    auto& [a, b, c, d, e, f, g] = op;
    return std::tie(a, b, c, d, e, f, g);
  } else if constexpr (count == 8) {
    auto& [a, b, c, d, e, f, g, h] = op;
    return std::tie(a, b, c, d, e, f, g, h);
  } else if constexpr (count == 9) {
    auto& [a, b, c, d, e, f, g, h, i] = op;
    return std::tie(a, b, c, d, e, f, g, h, i);
  } else if constexpr (count == 10) {
    auto& [a, b, c, d, e, f, g, h, i, j] = op;
    return std::tie(a, b, c, d, e, f, g, h, i, j);
  } else if constexpr (count == 11) {
    auto& [a, b, c, d, e, f, g, h, i, j, k] = op;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k);
  } else if constexpr (count == 12) {
    auto& [a, b, c, d, e, f, g, h, i, j, k, l] = op;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k, l);
  } else if constexpr (count == 13) {
    auto& [a, b, c, d, e, f, g, h, i, j, k, l, m] = op;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k, l, m);
  } else {
    auto& [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = op;
    return std::tie(a, b, c, d, e, f, g, h, i, j, k, l, m, n);
  }
}

// How the dispatcher passes a field: tensors by reference, all else by value.
template <class Field>
struct Parameter {
  using type = Field;
};
template <>
struct Parameter<at::Tensor> {
  using type = const at::Tensor&;
};
template <>
struct Parameter<OptionalTensor> {
  using type = const OptionalTensor&;
};

// An op as a function of its fields, one parameter each.
template <class Op, class Fields = decltype(fields(std::declval<Op&>()))>
struct Unpacked;

template <class Op, class... Field>
struct Unpacked<Op, std::tuple<Field&...>> {
  using Function = typename Op::Result(typename Parameter<Field>::type...);

  template <auto function>
  static typename Op::Result run(typename Parameter<Field>::type... given) {
    Op op{std::forward<typename Parameter<Field>::type>(given)...};
    return function(op);
  }
};

template <class Op>
typename Op::Result call(const Op& op) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(c10::str("gumbel_ext::", name_of<Op>()).c_str(),
                                                    /*overload_name=*/"")
                                 .template typed<typename Unpacked<Op>::Function>();
  return std::apply([](const auto&... field) { return handle.call(field...); },
                    fields(const_cast<Op&>(op)));
}

// ---- registration -------------------------------------------------------------------------------

template <class Result, class Op>
Op op_of(Result (*)(Op&));
template <class Result, class Op>
Op op_of(Result (*)(const Op&));

// Registers a function of an op's struct under the dispatch key of `m`.
template <auto function>
void implement(torch::Library& m) {
  using Op = decltype(op_of(function));
  m.impl(name_of<Op>(), TORCH_FN((Unpacked<Op>::template run<function>)));
}

// Under another key than that of `m`.
template <auto function>
void implement(torch::Library& m, c10::DispatchKey key) {
  using Op = decltype(op_of(function));
  m.impl(
      name_of<Op>(),
      torch::dispatch(key, torch::CppFunction(TORCH_FN((Unpacked<Op>::template run<function>)))));
}

// Tensors that are not strided arrays of numbers are refused in one line that names the argument.
// Without this the dispatcher would answer with a page about backends.
void refuse_other_layouts(torch::Library& m, const char* op);

template <class Op>
typename Op::Result prepared(Op& op) {
  return op.prepare();
}

template <class Op>
typename Op::Result call_in_float32(Op& op) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  // Above autograd, so that the gradient comes back in the dtype of the argument.
  at::Tensor& first = std::get<0>(fields(op));
  first = at::autocast::cached_cast(at::kFloat, first, at::kCUDA);
  return call(op);
}

// Declares an op and its place under autocast: all that an op needs that is made of others.
template <class Op>
void declare(torch::Library& m) {
  // Ops that may draw from a generator must say so, or compiled activation checkpointing replays
  // them with other noise.
  const std::vector<at::Tag> deterministic{at::Tag::pt2_compliant_tag},
      random{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  m.def(Op::schema, Op::draws ? random : deterministic);
  if constexpr (Op::autocast == Autocast::kFloat32) {
    implement<&call_in_float32<Op>>(m, c10::DispatchKey::AutocastCUDA);
  }
}

// Declares an op, and registers shapes without data and the refusal of other layouts.
template <class Op>
void define(torch::Library& m) {
  declare<Op>(m);
  refuse_other_layouts(m, name_of<Op>());
  implement<&prepared<Op>>(m, c10::DispatchKey::Meta);
}

}  // namespace gumbel_ext
