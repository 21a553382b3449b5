// The simulated device, as the parts of the stub runtime see it: streams that hold tasks, events, captured graphs,
// memory and counters. Only the functions of the public CANN headers and those named fake_* (control.cpp) are exported.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "acl/acl.h"

namespace fake {

// One piece of device work. `poll` tries to do it and says whether it is done; it says no while it must wait for an
// event or a peer, and is then asked again. Work in the middle of `poll` is never interrupted.
using Poll = std::function<bool()>;

struct Task {
  std::string name;
  Poll poll;
  uint64_t sequence = 0;
  bool is_kernel = false;  // launched work, which a task group may hold; not an event, a copy or a poison fill
};
using TaskPtr = std::shared_ptr<Task>;

struct Model;
using ModelPtr = std::shared_ptr<Model>;
struct TaskGroup;

struct Stream {
  int32_t id = 0;
  std::deque<TaskPtr> queue;
  bool running = false;  // its head is being polled by some thread
  ModelPtr capture;      // the graph this stream is being captured into, if any
  TaskGroup* update = nullptr;
  std::vector<TaskPtr> update_tasks;
  uint32_t limit[2] = {0, 0};  // cube and vector cores; 0: the device's
  std::mt19937_64 random;
  std::thread worker;
  bool stop = false;
};

struct EventState {
  uint32_t flag = 0;
  uint64_t issued = 0, completed = 0;  // records asked for by the host, and done by the device
  bool external_set = false;           // ACL_EVENT_EXTERNAL: a flag that record sets and reset clears
  uint64_t time_ns = 0;
  uint64_t waits_pending = 0;
  std::weak_ptr<Model> captured_in;
  size_t captured_node = 0;
};
using EventPtr = std::shared_ptr<EventState>;
struct EventHandle {
  EventPtr state;
};

// How queued work is executed.
enum class Order {
  program,   // at launch, in the order of launches, as far as events allow: deterministic, nothing is late
  shuffled,  // only when the host waits, in a random order of streams drawn from the seed: deterministic, all is late
  threads,   // a thread per stream, with a random delay before each task
};

struct Settings {
  Order order = Order::program;
  uint64_t seed = 0;
  uint64_t max_delay_us = 0;
  uint64_t timeout_ms = 20000;  // a wait longer than this is a dead device
  uint64_t hbm_bytes = 64ull << 30;
  uint64_t page_bytes = 2ull << 20;  // what physical memory comes in
  uint32_t num_devices = 2;
  bool poison = true;
};

extern std::mutex mutex;  // guards all of the above
extern std::condition_variable changed;
extern Settings settings;
extern std::atomic<aclError> device_error;  // sticky, as after a kernel exception on the device

// scheduler.cpp
aclError enqueue(aclrtStream stream, TaskPtr task, bool pump_now = true);
TaskPtr make_task(std::string name, Poll poll, bool is_kernel = false);
aclError wait_stream(Stream* stream);
aclError wait_device();
bool idle();
void set_order(Order order, uint64_t seed, uint64_t max_delay_us);
Stream* resolve(aclrtStream stream);  // null is the default stream
std::vector<Stream*> all_streams();
bool draw_delay(std::mt19937_64& random);

// graph.cpp
aclError capture_task(Stream* stream, const TaskPtr& task);  // the stream is capturing; `mutex` is held
aclError capture_record(Stream* stream, const EventPtr& event);
bool capture_wait(Stream* stream, const EventPtr& event, aclError* error);
bool any_capture();
aclError refuse_in_capture(const char* what);  // 107030 and the capture is lost
aclError refuse_on_stream(Stream* stream, const char* what, aclError error);

// memory.cpp
bool is_device_memory(const void* address, size_t bytes);
bool is_pinned(const void* address, size_t bytes);
void poison_bytes(void* address, size_t bytes);

// control.cpp
void count(const std::string& name, uint64_t bytes = 0);
aclError fail(aclError error, const std::string& message);  // remembers the message for aclGetRecentErrMsg
const char* recent_error();

// Lets other Python threads run while this one blocks. torch calls the runtime with and without the interpreter lock.
class ReleaseInterpreter {
 public:
  ReleaseInterpreter();
  ~ReleaseInterpreter();

 private:
  void* state_ = nullptr;
};

}  // namespace fake
