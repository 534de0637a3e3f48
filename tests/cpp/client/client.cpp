// A libtorch program that uses the installed library: every function of gumbel_ext.h, forward and
// backward, must give the tensors that the Python package gave for the same seed (expected.py).
//
//   client FILE     FILE: a dict of tensors written by torch.save
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gumbel_ext.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr uint64_t kSeed = 20260;  // as in expected.py

class Expected {
 public:
  explicit Expected(const char* path) : tensors_(read(path)) {}

  at::Tensor get(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::runtime_error("no tensor " + name + " in the file");
    return found->second;
  }

  // Bit for bit: both sides run the same kernels.
  void compare(const std::string& name, const at::Tensor& actual) {
    const at::Tensor wanted = get(name);
    const bool same = wanted.dtype() == actual.dtype() && at::equal(wanted, actual);
    if (!same) std::printf("%s differs\n", name.c_str());
    failures_ += !same;
    ++compared_;
  }

  void require(const char* what, bool holds) {
    if (!holds) std::printf("not so: %s\n", what);
    failures_ += !holds;
  }

  int report() const {
    std::printf("%d tensors compared with Python's, %d failures\n", compared_, failures_);
    return failures_ == 0 && compared_ > 0 ? 0 : 1;
  }

 private:
  static std::map<std::string, at::Tensor> read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)),
                                  std::istreambuf_iterator<char>());
    if (bytes.empty()) throw std::runtime_error(std::string("cannot read ") + path);
    std::map<std::string, at::Tensor> tensors;
    for (const auto& item : torch::jit::pickle_load(bytes).toGenericDict()) {
      tensors.emplace(item.key().toStringRef(), item.value().toTensor());
    }
    return tensors;
  }

  std::map<std::string, at::Tensor> tensors_;
  int compared_ = 0, failures_ = 0;
};

void compare_dtype(Expected& expected, const std::string& type) {
  const at::Tensor logits = expected.get(type + ".logits"), weight = expected.get(type + ".weight"),
                   mask = expected.get("mask"), state = expected.get("state"),
                   tau = expected.get("tau");
  for (const bool hard : {false, true}) {
    const std::string name = type + (hard ? ".hard" : ".soft");

    // A number, the default generator, autograd.
    at::manual_seed(kSeed);
    const at::Tensor leaf = logits.clone().requires_grad_();
    auto [y, index, used] = gumbel_ext::gumbel_softmax(leaf, 0.7, std::nullopt, hard, 1,
                                                       std::nullopt, /*return_index=*/true);
    (y * weight).sum().backward();
    expected.compare(name + ".y", y.detach());
    expected.compare(name + ".index", index);
    expected.compare(name + ".used", used);
    expected.compare(name + ".grad", leaf.grad());

    // A learned temperature, a mask, a generator of one's own.
    const at::Tensor masked_leaf = logits.clone().requires_grad_(),
                     learned = tau.clone().requires_grad_();
    at::Generator generator = at::detail::createCPUGenerator(kSeed);
    std::tie(y, index, used) = gumbel_ext::gumbel_softmax(masked_leaf, 1.0, learned, hard, 1, mask,
                                                          /*return_index=*/true, generator);
    (y * weight).sum().backward();
    expected.compare(name + ".masked.y", y.detach());
    expected.compare(name + ".masked.index", index);
    expected.compare(name + ".masked.grad", masked_leaf.grad());
    expected.compare(name + ".masked.grad_tau", learned.grad());

    // Stateless, without a gradient.
    const at::NoGradGuard no_grad;
    std::tie(y, index, used) =
        gumbel_ext::gumbel_softmax(logits, 0.7, std::nullopt, hard, 1, std::nullopt,
                                   /*return_index=*/true, std::nullopt, state);
    expected.compare(name + ".stateless.y", y);
    const auto [grad, grad_tau] =
        hard ? gumbel_ext::gumbel_softmax_hard_backward(weight, logits, index, 0.7, std::nullopt, 1,
                                                        std::nullopt, state, /*tau_grad=*/true)
             : gumbel_ext::gumbel_softmax_backward(weight, y, index, 0.7, std::nullopt, 1,
                                                   /*tau_grad=*/true);
    expected.compare(name + ".stateless.grad", grad);
    expected.compare(name + ".stateless.grad_tau", grad_tau);
  }
  at::manual_seed(kSeed);
  expected.compare(type + ".argmax", gumbel_ext::gumbel_argmax(logits, 1, /*keepdim=*/true, mask));
  expected.compare(type + ".noise", gumbel_ext::gumbel_noise(logits, {3, 11}));
  expected.compare(type + ".stateless.noise",
                   gumbel_ext::gumbel_noise(logits, {3, 11}, std::nullopt, state));
}

template <class Error, class Function>
bool throws(const char* words, const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    return std::string(error.what()).find(words) != std::string::npos;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE, as expected.py writes it\n", argv[0]);
    return 2;
  }
  Expected expected(argv[1]);
  for (const char* type : {"float16", "bfloat16", "float32", "float64"}) {
    compare_dtype(expected, type);
  }

  const at::Tensor logits = expected.get("float32.logits");
  expected.require("two calls draw different noise",
                   !at::equal(std::get<0>(gumbel_ext::gumbel_softmax(logits)),
                              std::get<0>(gumbel_ext::gumbel_softmax(logits))));
  expected.require("tau = -1 is refused by name", throws<c10::ValueError>("tau", [&] {
                     gumbel_ext::gumbel_softmax(logits, -1.0);
                   }));
  expected.require("integer logits are refused by name", throws<c10::TypeError>("logits", [&] {
                     gumbel_ext::gumbel_argmax(logits.to(at::kLong));
                   }));
  return expected.report();
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
