// One device.
#pragma once

#include <c10/core/Device.h>

namespace c10 {
namespace cuda {
inline DeviceIndex current_device() { return 0; }
}  // namespace cuda
}  // namespace c10
