// High-bandwidth memory is host memory, counted against a size of our choice; virtual memory management is real
// (memfd and mmap). Bytes 0xFF are NaN in every float type, -1 in every signed integer: the poison.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "device.h"

namespace fake {
namespace {

struct Physical {
  int file;
  size_t bytes;
  int device;
};
struct Range {
  size_t bytes;
  int device;
};

std::mutex memory_mutex;
std::map<uintptr_t, Range> device_ranges;  // what may be touched
std::map<uintptr_t, size_t> pinned;
std::map<uintptr_t, size_t> reserved;
std::map<uintptr_t, size_t> mapped;
std::map<int, uint64_t> used;
std::vector<void*> freed_while_busy;  // given back when no task can touch them any more

bool inside(const std::map<uintptr_t, size_t>& ranges, const void* address, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(address);
  auto after = ranges.upper_bound(start);
  if (after == ranges.begin()) return false;
  --after;
  return start + bytes <= after->first + after->second;
}

int current_device() {
  int32_t device = 0;
  return aclrtGetDevice(&device) == ACL_SUCCESS ? device : 0;
}

aclError take(int device, size_t bytes) {
  if (used[device] + bytes > settings.hbm_bytes)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "the device has not enough free memory");
  used[device] += bytes;
  return ACL_SUCCESS;
}

const char* kind_name(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: return "h2h";
    case ACL_MEMCPY_HOST_TO_DEVICE: return "h2d";
    case ACL_MEMCPY_DEVICE_TO_HOST: return "d2h";
    case ACL_MEMCPY_DEVICE_TO_DEVICE: return "d2d";
    default: return "other";
  }
}

// Whether the addresses are what the kind says. A pinned or plain host address is never device memory here.
aclError check_copy(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  if (bytes > capacity) return fail(ACL_ERROR_RT_PARAM_INVALID, "copy of more bytes than the destination holds");
  const bool to_device = kind == ACL_MEMCPY_HOST_TO_DEVICE || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  const bool from_device = kind == ACL_MEMCPY_DEVICE_TO_HOST || kind == ACL_MEMCPY_DEVICE_TO_DEVICE;
  if (bytes && kind <= ACL_MEMCPY_DEVICE_TO_DEVICE &&
      (is_device_memory(to, bytes) != to_device || is_device_memory(from, bytes) != from_device))
    return fail(ACL_ERROR_RT_PARAM_INVALID, std::string("copy ") + kind_name(kind) + " of other addresses");
  return ACL_SUCCESS;
}

}  // namespace

bool is_device_memory(const void* address, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  // Neighbouring mappings of one expandable segment count as one range.
  auto start = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = start + bytes;
  while (true) {
    auto after = device_ranges.upper_bound(start);
    if (after == device_ranges.begin()) return false;
    --after;
    const uintptr_t range_end = after->first + after->second.bytes;
    if (start >= range_end) return false;
    if (end <= range_end) return true;
    start = range_end;
  }
}

bool is_pinned(const void* address, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  return inside(pinned, address, bytes);
}

void poison_bytes(void* address, size_t bytes) { std::memset(address, 0xFF, bytes); }

}  // namespace fake

using namespace fake;

extern "C" {

// Device memory -------------------------------------------------------------------------------------------------------
aclError aclrtMalloc(void** address, size_t bytes, aclrtMemMallocPolicy) {
  count("malloc", bytes);
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    if (aclError error = take(current_device(), bytes)) return error;
    if (posix_memalign(address, 512, bytes ? bytes : 512)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    device_ranges[reinterpret_cast<uintptr_t>(*address)] = {bytes, current_device()};
  }
  if (settings.poison) poison_bytes(*address, bytes);
  return ACL_SUCCESS;
}
aclError aclrtMallocAlign32(void** address, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(address, bytes, policy);
}

aclError aclrtFree(void* address) {
  count("free");
  bool busy;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    busy = !idle();
  }
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto found = device_ranges.find(reinterpret_cast<uintptr_t>(address));
  if (found == device_ranges.end()) return fail(ACL_ERROR_RT_PARAM_INVALID, "free of memory that is not the device's");
  used[found->second.device] -= found->second.bytes;
  if (settings.poison) poison_bytes(address, found->second.bytes);
  device_ranges.erase(found);
  if (busy) {
    freed_while_busy.push_back(address);
    return ACL_SUCCESS;
  }
  for (void* old : freed_while_busy) std::free(old);
  freed_while_busy.clear();
  std::free(address);
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  *total_bytes = settings.hbm_bytes;
  const uint64_t taken = used[current_device()];
  *free_bytes = taken > settings.hbm_bytes ? 0 : settings.hbm_bytes - taken;
  return ACL_SUCCESS;
}

// Virtual memory ------------------------------------------------------------------------------------------------------
aclError aclrtReserveMemAddress(void** address, size_t bytes, size_t, void*, uint64_t) {
  count("reserve_address", bytes);
  void* found = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(memory_mutex);
  reserved[reinterpret_cast<uintptr_t>(found)] = bytes;
  *address = found;
  return ACL_SUCCESS;
}

aclError aclrtReleaseMemAddress(void* address) {
  count("release_address");
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto found = reserved.find(reinterpret_cast<uintptr_t>(address));
  if (found == reserved.end()) return ACL_ERROR_RT_PARAM_INVALID;
  munmap(address, found->second);
  reserved.erase(found);
  return ACL_SUCCESS;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp*, aclrtMemGranularityOptions, size_t* bytes) {
  *bytes = settings.page_bytes;
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp* prop, uint64_t) {
  count("malloc_physical", bytes);
  const int device = prop ? static_cast<int>(prop->location.id) : current_device();
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (aclError error = take(device, bytes)) return error;
  const int file = memfd_create("fake_hbm", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  // Poisoned here and not when it is mapped: what it holds stays, wherever it is mapped next.
  if (settings.poison) {
    void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (fresh == MAP_FAILED) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    poison_bytes(fresh, bytes);
    munmap(fresh, bytes);
  }
  *handle = new Physical{file, bytes, device};
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  count("free_physical");
  auto physical = static_cast<Physical*>(handle);
  std::lock_guard<std::mutex> lock(memory_mutex);
  used[physical->device] -= physical->bytes;
  close(physical->file);
  delete physical;
  return ACL_SUCCESS;
}

aclError aclrtMapMem(void* address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  count("map_memory", bytes);
  auto physical = static_cast<Physical*>(handle);
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    if (!inside(reserved, address, bytes)) return fail(ACL_ERROR_RT_PARAM_INVALID, "map outside reserved addresses");
    if (mapped.count(reinterpret_cast<uintptr_t>(address)))
      return fail(ACL_ERROR_RT_PARAM_INVALID, "map over what is mapped");
    void* found = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file,
                       static_cast<off_t>(offset));
    if (found == MAP_FAILED) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    mapped[reinterpret_cast<uintptr_t>(address)] = bytes;
    device_ranges[reinterpret_cast<uintptr_t>(address)] = {bytes, physical->device};
  }
  return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void* address) {
  count("unmap_memory");
  wait_device();  // a task that still uses the pages would end this process instead of raising a device error
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto found = mapped.find(reinterpret_cast<uintptr_t>(address));
  if (found == mapped.end()) return ACL_ERROR_RT_PARAM_INVALID;
  mmap(address, found->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  device_ranges.erase(found->first);
  mapped.erase(found);
  return ACL_SUCCESS;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t*) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "sharing memory between processes");
}
aclError aclrtMemImportFromShareableHandle(uint64_t, int32_t, aclrtDrvMemHandle*) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "sharing memory between processes");
}
aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t*, size_t) {
  return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "sharing memory between processes");
}

// Host memory ---------------------------------------------------------------------------------------------------------
aclError aclrtMallocHost(void** address, size_t bytes) {
  count("malloc_host", bytes);
  if (posix_memalign(address, 4096, bytes ? bytes : 4096)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned[reinterpret_cast<uintptr_t>(*address)] = bytes;
  return ACL_SUCCESS;
}
aclError aclrtMallocHostWithCfg(void** address, uint64_t bytes, aclrtMallocConfig*) {
  return aclrtMallocHost(address, bytes);
}
aclError aclrtFreeHost(void* address) {
  count("free_host");
  wait_device();
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(address));
  std::free(address);
  return ACL_SUCCESS;
}
aclError aclrtHostRegister(void* address, uint64_t bytes, aclrtHostRegisterType, void** device_address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned[reinterpret_cast<uintptr_t>(address)] = bytes;
  *device_address = address;
  return ACL_SUCCESS;
}
aclError aclrtHostUnregister(void* address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(address));
  return ACL_SUCCESS;
}
aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
  std::memset(attributes, 0, sizeof(*attributes));
  attributes->location.type = is_device_memory(address, 1) ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : is_pinned(address, 1)      ? ACL_MEM_LOCATION_TYPE_HOST
                                                           : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}

// Copies --------------------------------------------------------------------------------------------------------------
aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  count(std::string("memcpy:") + kind_name(kind), bytes);
  if (aclError error = refuse_in_capture("synchronous copy")) return error;
  if (aclError error = check_copy(to, capacity, from, bytes, kind)) return error;
  std::memmove(to, from, bytes);
  return ACL_SUCCESS;
}

// Pinned host memory is read and written when the stream gets there. With pageable memory the call itself waits.
aclError aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  count(std::string("memcpy_async:") + kind_name(kind), bytes);
  if (aclError error = check_copy(to, capacity, from, bytes, kind)) return error;
  const bool pageable = (kind == ACL_MEMCPY_HOST_TO_DEVICE && !is_pinned(from, bytes)) ||
                        (kind == ACL_MEMCPY_DEVICE_TO_HOST && !is_pinned(to, bytes));
  if (pageable && resolve(stream)->capture)
    return refuse_on_stream(resolve(stream), "copy with pageable host memory", ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC);
  const aclError error = enqueue(stream, make_task("memcpy", [to, from, bytes] {
                                   std::memmove(to, from, bytes);
                                   return true;
                                 }));
  if (error != ACL_SUCCESS || !pageable) return error;
  return wait_stream(resolve(stream));
}

aclError aclrtMemset(void* address, size_t capacity, int32_t value, size_t bytes) {
  count("memset", bytes);
  if (bytes > capacity || !is_device_memory(address, bytes)) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError error = refuse_in_capture("synchronous memset")) return error;
  std::memset(address, value, bytes);
  return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void* address, size_t capacity, int32_t value, size_t bytes, aclrtStream stream) {
  count("memset_async", bytes);
  if (bytes > capacity || !is_device_memory(address, bytes)) return ACL_ERROR_RT_PARAM_INVALID;
  return enqueue(stream, make_task("memset", [address, value, bytes] {
                   std::memset(address, value, bytes);
                   return true;
                 }));
}

}  // extern "C"
