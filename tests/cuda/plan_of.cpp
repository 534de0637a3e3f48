// Asks plan.cpp which regime calls run in. A line of input is a call on contiguous logits:
//   op (of enum Op) type (of enum ElementType) outer classes inner multiprocessors clusters
// and a line of output its plan: regime team groups cluster.
#include <iostream>

#include "params.h"

using namespace gumbel_ext::cuda;

int main() {
  int op, type, clusters;
  Params p{};
  Device device{};
  while (std::cin >> op >> type >> p.outer >> p.classes >> p.inner >> device.multiprocessors >>
         clusters) {
    device.clusters = clusters != 0;
    p.outer_stride = p.position_outer_stride = p.classes * p.inner;
    p.class_stride = p.position_class_stride = p.inner;
    p.inner_stride = 1;
    p.position_inner_stride = p.inner == 1 ? 0 : 1;
    const Plan plan = make_plan(static_cast<Op>(op), static_cast<ElementType>(type), p, device);
    std::cout << static_cast<int>(plan.regime) << ' ' << plan.team << ' ' << plan.groups << ' '
              << plan.cluster << '\n';
  }
}
