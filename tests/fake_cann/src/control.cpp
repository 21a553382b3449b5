// What the Python side reads and sets: counters, settings, and launches of Python functions as device work.
#include <dlfcn.h>

#include <cstring>
#include <sstream>

#include "device.h"

namespace fake {
namespace {

struct Count {
  uint64_t calls = 0, bytes = 0;
};
std::mutex count_mutex;
std::map<std::string, Count> counts;

thread_local std::string last_error;

// Python functions are known here by a number. When the last task that holds the number is gone, Python may forget it.
using PythonCall = int (*)(uint64_t);
PythonCall python_call = nullptr;
std::mutex released_mutex;
std::vector<uint64_t> released;

struct PythonFunction {
  uint64_t id;
  explicit PythonFunction(uint64_t number) : id(number) {}
  ~PythonFunction() {
    std::lock_guard<std::mutex> lock(released_mutex);
    released.push_back(id);
  }
};

}  // namespace

void count(const std::string& name, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(count_mutex);
  Count& entry = counts[name];
  entry.calls += 1;
  entry.bytes += bytes;
}

aclError fail(aclError error, const std::string& message) {
  last_error = message;
  return error;
}

const char* recent_error() { return last_error.empty() ? nullptr : last_error.c_str(); }

ReleaseInterpreter::ReleaseInterpreter() {
  using Check = int (*)();
  using Save = void* (*)();
  static Check is_initialized = reinterpret_cast<Check>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
  static Check check = reinterpret_cast<Check>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  static Save save = reinterpret_cast<Save>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
  if (is_initialized && check && save && is_initialized() && check()) state_ = save();
}

ReleaseInterpreter::~ReleaseInterpreter() {
  using Restore = void (*)(void*);
  static Restore restore = reinterpret_cast<Restore>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
  if (state_) restore(state_);
}

}  // namespace fake

using namespace fake;

extern "C" {

// Settings ------------------------------------------------------------------------------------------------------------
void fake_set_order(int order, uint64_t seed, uint64_t max_delay_us) {
  set_order(static_cast<Order>(order), seed, max_delay_us);
}
void fake_set_hbm_bytes(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  settings.hbm_bytes = bytes;
}
void fake_set_page_bytes(uint64_t bytes) { settings.page_bytes = bytes; }
void fake_set_num_devices(uint32_t devices) { settings.num_devices = devices; }
void fake_set_poison(int on) { settings.poison = on != 0; }
int fake_poison() { return settings.poison; }
void fake_set_timeout_ms(uint64_t milliseconds) { settings.timeout_ms = milliseconds; }
aclError fake_device_error() { return device_error.load(); }
void fake_clear_device_error() { device_error = ACL_SUCCESS; }
void fake_fail_device(int error) { device_error = error; }
int fake_idle() {
  std::lock_guard<std::mutex> lock(fake::mutex);
  return idle();
}

// Counters: one line "name calls bytes" each --------------------------------------------------------------------------
void fake_count(const char* name, uint64_t bytes) { count(name, bytes); }
void fake_reset_counts() {
  std::lock_guard<std::mutex> lock(count_mutex);
  counts.clear();
}
size_t fake_read_counts(char* text, size_t capacity) {
  std::lock_guard<std::mutex> lock(count_mutex);
  std::ostringstream lines;
  for (const auto& [name, entry] : counts) lines << name << '\t' << entry.calls << '\t' << entry.bytes << '\n';
  const std::string all = lines.str();
  if (text && capacity > all.size()) std::memcpy(text, all.c_str(), all.size() + 1);
  return all.size();
}

// Launches ------------------------------------------------------------------------------------------------------------
void fake_set_python_call(PythonCall call) { python_call = call; }

aclError fake_launch_python(aclrtStream stream, uint64_t id, const char* name) {
  auto function = std::make_shared<PythonFunction>(id);
  count(std::string("launch:") + name);
  return enqueue(stream, make_task(name, [function] {
                   if (python_call(function->id) != 0) device_error = ACL_ERROR_RT_VECTOR_CORE_EXCEPTION;
                   return true;
                 }, true));
}

size_t fake_take_released(uint64_t* ids, size_t capacity) {
  std::lock_guard<std::mutex> lock(released_mutex);
  const size_t number = std::min(capacity, released.size());
  std::copy(released.end() - number, released.end(), ids);
  released.resize(released.size() - number);
  return number;
}

// For libhccl: a collective is one task, which C++ code polls.
aclError fake_launch_native(aclrtStream stream, const char* name, const std::function<bool()>* poll) {
  count(std::string("launch:") + name);
  return enqueue(stream, make_task(name, *poll, true));
}

// Fills memory with NaN as a task of the stream: work launched before still sees the old bytes. Called by the allocator
// under its lock, so the fill waits for the next launch or synchronisation.
void fake_poison_on_stream(aclrtStream stream, void* address, size_t bytes) {
  if (!settings.poison) return;
  enqueue(stream, make_task("poison", [address, bytes] {
            if (is_device_memory(address, bytes)) poison_bytes(address, bytes);
            return true;
          }), false);
}
int fake_stream_is_capturing(aclrtStream stream) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  return resolve(stream)->capture != nullptr;
}

const char* aclGetRecentErrMsg() { return recent_error(); }

}  // extern "C"
