// The rest of libascendcl: devices, contexts, core limits, descriptors, and the calls that have nothing to do here.
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <array>

#include "acl/acl_op.h"
#include "descriptors.h"
#include "device.h"
#include "profiling/aprof_pub.h"

using namespace fake;

namespace {

// 24 cube and 48 vector cores, 192 MB of second-level cache: what Huawei publishes for the Ascend 910B2.
constexpr uint32_t kCores[2] = {24, 48};
constexpr int64_t kL2Bytes = 192ll << 20;

thread_local int current_device = -1;  // none before the first aclrtSetDevice: the library asks, to see who was first
int contexts[64];
std::map<int, std::array<uint32_t, 2>> device_limits;
thread_local Stream* thread_cores = nullptr;

uint32_t device_limit(int device, int type) {
  auto found = device_limits.find(device);
  return found == device_limits.end() ? kCores[type] : found->second[type];
}
uint32_t stream_limit(const Stream* stream, int type) {
  return stream->limit[type] ? stream->limit[type] : device_limit(current_device, type);
}
bool bad_type(int type) { return type < 0 || type > 1; }

}  // namespace

extern "C" {

aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }

// Devices and contexts ------------------------------------------------------------------------------------------------
aclError aclrtGetDeviceCount(uint32_t* number) {
  *number = settings.num_devices;
  return ACL_SUCCESS;
}
aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= static_cast<int32_t>(settings.num_devices)) return ACL_ERROR_RT_INVALID_DEVICEID;
  current_device = device;
  return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t* device) {
  if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_device;
  return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t) { return wait_device(); }
aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = &contexts[current_device];
  return ACL_SUCCESS;
}
aclError aclrtSetCurrentContext(aclrtContext context) {
  current_device = static_cast<int>(static_cast<int*>(context) - contexts);
  return ACL_SUCCESS;
}
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t*, int32_t* active) {
  *active = current_device == device;
  return ACL_SUCCESS;
}
aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logical) {
  *logical = user;
  return ACL_SUCCESS;
}
const char* aclrtGetSocName() {
  const char* name = std::getenv("FAKE_CANN_SOC");
  return name ? name : "Ascend910B2";
}
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = kCores[0]; break;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = kCores[1]; break;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = static_cast<int64_t>(settings.hbm_bytes); break;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = kL2Bytes; break;
    default: return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a device attribute the fake does not have");
  }
  return ACL_SUCCESS;
}
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  *value = info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? kCores[1] : info == ACL_DEVICE_INFO_L2_SIZE ? kL2Bytes : kCores[0];
  return ACL_SUCCESS;
}
aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  std::snprintf(uuid->bytes, sizeof(uuid->bytes), "fake-npu-%d", device);
  return ACL_SUCCESS;
}
aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}
aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, "9.1.0");
  return ACL_SUCCESS;
}

// Core limits ---------------------------------------------------------------------------------------------------------
aclError aclrtSetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t value) {
  if (bad_type(type) || value == 0 || value > kCores[type]) return ACL_ERROR_RT_PARAM_INVALID;
  auto found = device_limits.try_emplace(device, std::array<uint32_t, 2>{kCores[0], kCores[1]}).first;
  found->second[type] = value;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t* value) {
  if (bad_type(type)) return ACL_ERROR_RT_PARAM_INVALID;
  *value = device_limit(device, type);
  return ACL_SUCCESS;
}
aclError aclrtResetDeviceResLimit(int32_t device) {
  device_limits.erase(device);
  return ACL_SUCCESS;
}
aclError aclrtSetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t value) {
  count("set_stream_limit");
  if (bad_type(type) || value == 0 || value > kCores[type])
    return fail(ACL_ERROR_RT_PARAM_INVALID, "a stream limit of more cores than the device has");
  resolve(stream)->limit[type] = value;
  return ACL_SUCCESS;
}
aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t* value) {
  if (bad_type(type)) return ACL_ERROR_RT_PARAM_INVALID;
  *value = stream_limit(resolve(stream), type);
  return ACL_SUCCESS;
}
aclError aclrtResetStreamResLimit(aclrtStream stream) {
  resolve(stream)->limit[0] = resolve(stream)->limit[1] = 0;
  return ACL_SUCCESS;
}
aclError aclrtUseStreamResInCurrentThread(aclrtStream stream) {
  thread_cores = resolve(stream);
  return ACL_SUCCESS;
}
aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) {
  thread_cores = nullptr;
  return ACL_SUCCESS;
}
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  if (bad_type(type)) return ACL_ERROR_RT_PARAM_INVALID;
  *value = thread_cores ? stream_limit(thread_cores, type) : device_limit(current_device, type);
  return ACL_SUCCESS;
}

// Settings without effect ---------------------------------------------------------------------------------------------
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return ACL_SUCCESS;
}
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtCmoAsync(void*, size_t bytes, aclrtCmoType, aclrtStream) {
  count("prefetch", bytes);
  return ACL_SUCCESS;
}
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return device_error; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return device_error.load(); }
aclError aclmdlInitDump() { return ACL_SUCCESS; }
aclError aclmdlSetDump(const char*) { return ACL_SUCCESS; }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }

void aclAppLog(aclLogLevel level, const char* function, const char*, uint32_t, const char* format, ...) {
  static const char* threshold = std::getenv("FAKE_CANN_LOG");
  if (!threshold || level < std::atoi(threshold)) return;
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "torch_npu %s: ", function);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

// Tensor descriptors --------------------------------------------------------------------------------------------------
size_t aclDataTypeSize(aclDataType type) {
  switch (type) {
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL: return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16:
    case ACL_UINT16: return 2;
    case ACL_FLOAT:
    case ACL_INT32:
    case ACL_UINT32: return 4;
    case ACL_DOUBLE:
    case ACL_INT64:
    case ACL_UINT64: return 8;
    default: return 0;
  }
}
aclTensorDesc* aclCreateTensorDesc(aclDataType type, int number, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{type, format, std::vector<int64_t>(dims, dims + number)};
}
void aclDestroyTensorDesc(const aclTensorDesc* desc) { delete desc; }
aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  *size = desc->dims.at(index);
  return ACL_SUCCESS;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) { return desc->dims.size(); }
aclDataType aclGetTensorDescType(const aclTensorDesc* desc) { return desc->type; }
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
  desc->format = format;
  return ACL_SUCCESS;
}
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
aclError aclSetTensorShape(aclTensorDesc* desc, int number, const int64_t* dims) {
  desc->dims.assign(dims, dims + number);
  return ACL_SUCCESS;
}
aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) { return new aclDataBuffer{data, bytes}; }
aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

// Kernels of the driver's own kind, and its profiler: there are none --------------------------------------------------
aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*, aclrtBinHandle*) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "loading device code");
}
aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char*, aclrtFuncHandle*) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "loading device code");
}
aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "loading device code");
}
int32_t rtDevBinaryRegister(const void*, void**) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }
int32_t rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) {
  return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
}
int32_t rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void*) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }
int32_t rtGetC2cCtrlAddr(uint64_t*, uint32_t*) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }
uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
int32_t MsprofReportApi(uint32_t, const struct MsprofApi*) { return 0; }
int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
uint64_t MsprofSysCycleTime() { return 0; }

}  // extern "C"
