// Included before files that the module has registered already, and whose functions the library
// needs.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, m) \
  [[maybe_unused]] static void registered_by_the_module_for_##key(torch::Library& m)
#undef TORCH_LIBRARY_FRAGMENT
#define TORCH_LIBRARY_FRAGMENT(space, m) \
  [[maybe_unused]] static void defined_by_the_module(torch::Library& m)
