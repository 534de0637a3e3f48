// Nodes of the graph of derivatives that are recorded by hand.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/saved_variable.h>

namespace gumbel_ext {

// torch::autograd::Function refuses to run under a transform and has no forward mode. Where either
// is wanted a node is recorded by hand. PyTorch keeps nodes in one kind of pointer or, in later
// versions, another.
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

}  // namespace gumbel_ext
