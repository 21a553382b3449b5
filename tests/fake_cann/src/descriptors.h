// What torch_npu's older operator interface passes around; opaque in the public headers.
#pragma once

#include <cstdint>
#include <vector>

#include "acl/acl.h"

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> dims;
};
struct aclDataBuffer {
  void* data;
  size_t bytes;
};
