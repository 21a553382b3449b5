// libacl_op_compiler: kernels that torch_npu asks for by name. Fill and PadV3 are here, because ProcessGroupHCCL makes the
// buffers of all_gather with them; asking for another is an error.
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>

#include "acl/acl.h"
#include "acl/acl_op.h"
#include "acl/acl_op_compiler.h"

#include "descriptors.h"

extern "C" aclError fake_launch_native(aclrtStream stream, const char* name, const std::function<bool()>* poll);

namespace {

// Inputs: the shape, and one element; the output is filled with that element.
aclError fill(const aclDataBuffer* value, const aclTensorDesc* desc, const aclDataBuffer* out, aclrtStream stream) {
  size_t number = 1;
  for (int64_t size : desc->dims) number *= size;
  if (number == 0) return ACL_SUCCESS;
  const size_t unit = aclDataTypeSize(desc->type);
  if (unit == 0 || value->bytes < unit || out->bytes < number * unit) return ACL_ERROR_INVALID_PARAM;
  // The element lies on the host as a rule, and may be gone when the task runs.
  const std::vector<char> element(static_cast<char*>(value->data), static_cast<char*>(value->data) + unit);
  auto data = static_cast<char*>(out->data);
  const std::function<bool()> poll = [element, data, number, unit] {
    for (size_t index = 0; index < number; ++index) std::memcpy(data + index * unit, element.data(), unit);
    return true;
  };
  return fake_launch_native(stream, "aclop:Fill", &poll);
}

// Inputs: a tensor, (before, after) of each dimension on the host, and one element to put there. Rows only grow.
aclError pad(const aclTensorDesc* const descs[], const aclDataBuffer* const inputs[], const aclTensorDesc* out_desc,
             const aclDataBuffer* out, aclrtStream stream) {
  const auto& dims = descs[0]->dims;
  std::vector<int64_t> around;
  for (size_t index = 0; index < 2 * dims.size(); ++index)
    around.push_back(descs[1]->type == ACL_INT64 ? static_cast<int64_t*>(inputs[1]->data)[index]
                                                 : static_cast<int32_t*>(inputs[1]->data)[index]);
  size_t rows = 1;
  for (size_t index = 0; index + 1 < dims.size(); ++index) {
    if (around[2 * index] != 0 || around[2 * index + 1] != 0) return ACL_ERROR_FAILURE;
    rows *= dims[index];
  }
  const size_t unit = aclDataTypeSize(out_desc->type), before = around[2 * dims.size() - 2];
  const size_t width = dims.back(), padded = out_desc->dims.back();
  if (padded != before + width + around.back() || out->bytes < rows * padded * unit) return ACL_ERROR_INVALID_PARAM;
  const std::vector<char> element(static_cast<char*>(inputs[2]->data), static_cast<char*>(inputs[2]->data) + unit);
  const auto from = static_cast<char*>(inputs[0]->data), to = static_cast<char*>(out->data);
  const std::function<bool()> poll = [=] {
    for (size_t index = 0; index < rows * padded; ++index) std::memcpy(to + index * unit, element.data(), unit);
    for (size_t row = 0; row < rows; ++row)
      std::memcpy(to + (row * padded + before) * unit, from + row * width * unit, width * unit);
    return true;
  };
  return fake_launch_native(stream, "aclop:PadV3", &poll);
}

}  // namespace

extern "C" {

struct aclopAttr {};

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attr) { delete attr; }
aclError aclopSetAttrBool(aclopAttr*, const char*, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrDataType(aclopAttr*, const char*, aclDataType) { return ACL_SUCCESS; }
aclError aclopSetAttrFloat(aclopAttr*, const char*, float) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr*, const char*, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
aclError aclopSetAttrListInt(aclopAttr*, const char*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr*, const char*, const char*) { return ACL_SUCCESS; }
aclError aclopSetMaxOpQueueNum(uint64_t) { return ACL_SUCCESS; }

aclError aclopCompileAndExecute(const char* type, int num_inputs, const aclTensorDesc* const descs[],
                                const aclDataBuffer* const inputs[], int num_outputs,
                                const aclTensorDesc* const out_descs[], aclDataBuffer* const outputs[],
                                const aclopAttr*, aclopEngineType, aclopCompileType, const char*, aclrtStream stream) {
  if (std::string(type) == "Fill" && num_inputs == 2 && num_outputs == 1)
    return fill(inputs[1], out_descs[0], outputs[0], stream);
  if (std::string(type) == "PadV3" && num_inputs == 3 && num_outputs == 1)
    return pad(descs, inputs, out_descs[0], outputs[0], stream);
  std::fprintf(stderr, "fake CANN: no kernel %s (inputs:", type);
  for (int index = 0; index < num_inputs; ++index) {
    std::fprintf(stderr, " type %d [", descs[index]->type);
    for (int64_t size : descs[index]->dims) std::fprintf(stderr, " %ld", static_cast<long>(size));
    std::fprintf(stderr, " ]");
  }
  std::fprintf(stderr, ")\n");
  return ACL_ERROR_FAILURE;
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t) {
  *value = '\0';
  return ACL_SUCCESS;
}
aclError aclopSetCompileFlag(aclOpCompileFlag) { return ACL_SUCCESS; }

}  // extern "C"
