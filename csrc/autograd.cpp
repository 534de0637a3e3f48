#include "autograd.h"

#include <algorithm>

namespace gumbel_ext {
namespace {

// One of each element that strides of 0 repeat.
at::Tensor distinct(const at::Tensor& t) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor out = t;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) out = out.narrow(d, 0, 1);
  }
  return out;
}

// A copy of an expanded tensor that stays expanded, with the derivative of clone().
class ExpandedCopy : public torch::autograd::Function<ExpandedCopy> {
 public:
  static at::Tensor forward(AutogradContext*, const at::Tensor& t) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return distinct(t).clone().expand(t.sizes());
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return grads; }
};

}  // namespace

at::Tensor unchanging(const at::Tensor& t) {
  if (under_transform() || t.is_inference() || !t.has_storage()) return t;
  if (!(t.is_leaf() || (t.is_view() && t._base().is_leaf()))) return t;
  c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
  if (!storage->_mutable_data_ptr_no_checks()) return t;
  const bool repeats = !has_tangent(t) && distinct(t).numel() < t.numel();
  return repeats ? ExpandedCopy::apply(t) : t.clone();
}

namespace {

// PyTorch keeps nodes in one kind of pointer or, in later versions, another.
using NodePointer = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;

template <class Node, class Pointer = NodePointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node(), [](Node* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

template <class Node, class Pointer = NodePointer>
Pointer pointer_to(Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return node->shared_from_this();
  } else {
    return Pointer::reclaim_copy(node);
  }
}

struct RecordedNode : torch::autograd::Node {
  std::string name() const override { return description.name; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list out(num_outputs());
    if (std::none_of(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined(); })) {
      return out;
    }
    const variable_list tensors = unchanged(description.op.c_str(), description.saved_names, [&] {
      variable_list unpacked;
      for (const auto& variable : saved) unpacked.push_back(variable.unpack(pointer_to(this)));
      return unpacked;
    });
    backward(NodeCall{grads, tensors, *this, out});
    return out;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  NodeDescription description;
  std::vector<torch::autograd::SavedVariable> saved;
  std::function<void(const NodeCall&)> backward;
};

}  // namespace

void record(const NodeDescription& description, const variable_list& outputs,
            const variable_list& inputs, const std::vector<Saved>& saved,
            std::function<void(const NodeCall&)> backward,
            const std::function<void()>& set_tangents) {
  auto node = make_node<RecordedNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->description = description;
  node->backward = std::move(backward);
  for (const at::Tensor& output : outputs) torch::autograd::set_history(output, node);
  set_tangents();
  for (const Saved& s : saved) node->saved.emplace_back(s.tensor, s.is_output);
}

}  // namespace gumbel_ext
