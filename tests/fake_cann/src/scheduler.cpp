// Streams, events, and the three orders in which queued work is executed (device.h).
#include <algorithm>
#include <chrono>
#include <utility>

#include "device.h"

namespace fake {

std::mutex mutex;
std::condition_variable changed;
Settings settings;
std::atomic<aclError> device_error{ACL_SUCCESS};

namespace {

using Clock = std::chrono::steady_clock;

std::vector<std::unique_ptr<Stream>> streams;
std::map<Stream*, int> live;
std::mt19937_64 choice;  // which stream goes next, in the shuffled order
uint64_t next_sequence = 1;
int32_t next_stream_id = 1;
std::recursive_mutex pump_mutex;
thread_local bool in_task = false;

Stream* add_stream() {
  auto stream = std::make_unique<Stream>();
  stream->id = next_stream_id++;
  stream->random.seed(settings.seed * 7919 + stream->id);
  Stream* raw = stream.get();
  streams.push_back(std::move(stream));
  live[raw] = 0;
  return raw;
}

Stream* default_stream() {
  static Stream* stream = add_stream();
  return stream;
}

void work(Stream* stream) {
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return stream->stop || !stream->queue.empty(); });
    if (stream->queue.empty()) return;
    TaskPtr task = stream->queue.front();
    lock.unlock();
    if (task->name != "poison") draw_delay(stream->random);
    bool done = task->poll();
    lock.lock();
    while (!done) {
      changed.wait_for(lock, std::chrono::milliseconds(2));
      lock.unlock();
      done = task->poll();
      lock.lock();
    }
    stream->queue.pop_front();
    lock.unlock();
    task.reset();
    lock.lock();
    changed.notify_all();
  }
}

void start_worker(Stream* stream) {
  if (stream->worker.joinable()) return;
  stream->stop = false;
  stream->worker = std::thread(work, stream);
}

// Polls heads until nothing moves or `enough` holds. In program order the oldest launch goes first. Shuffled, the call
// draws whether one stream after the other gets as far as it can (a random one first) or each task is drawn anew.
void pump(const std::function<bool()>& enough) {
  if (in_task) return;
  std::lock_guard<std::recursive_mutex> only(pump_mutex);
  std::unique_lock<std::mutex> lock(mutex);
  std::vector<Stream*> blocked;
  const uint64_t favour = choice(), one_by_one = choice() % 2;
  while (!enough()) {
    std::vector<Stream*> ready;
    for (auto& stream : streams) {
      if (!stream->queue.empty() && std::find(blocked.begin(), blocked.end(), stream.get()) == blocked.end())
        ready.push_back(stream.get());
    }
    if (ready.empty()) return;
    std::sort(ready.begin(), ready.end(), [](const Stream* one, const Stream* other) {
      return one->queue.front()->sequence < other->queue.front()->sequence;
    });
    Stream* next = ready[0];
    if (settings.order == Order::shuffled) next = ready[(one_by_one ? choice() : favour) % ready.size()];
    TaskPtr task = next->queue.front();
    lock.unlock();
    in_task = true;
    const bool done = task->poll();
    in_task = false;
    lock.lock();
    if (!done) {
      blocked.push_back(next);
      continue;
    }
    next->queue.pop_front();
    lock.unlock();
    task.reset();
    lock.lock();
    changed.notify_all();
    blocked.clear();
  }
}

// A host that polls must see the device move: one task a question.
void move_when_polled() {
  if (settings.order != Order::shuffled) return;
  ReleaseInterpreter release;
  bool first = true;
  pump([&first] { return !std::exchange(first, false); });
}

aclError wait_until(const std::function<bool()>& reached, aclError timed_out, const char* what) {
  ReleaseInterpreter release;
  const auto deadline = Clock::now() + std::chrono::milliseconds(settings.timeout_ms);
  while (true) {
    if (settings.order != Order::threads) pump(reached);
    std::unique_lock<std::mutex> lock(mutex);
    if (reached()) break;
    changed.wait_for(lock, std::chrono::milliseconds(5));
    if (reached()) break;
    if (Clock::now() > deadline)
      return fail(timed_out, std::string(what) + ": the stream waits for an event that nobody records");
  }
  const aclError error = device_error;
  if (error != ACL_SUCCESS) return fail(error, "a kernel failed on the device");
  return ACL_SUCCESS;
}

uint64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

}  // namespace

bool draw_delay(std::mt19937_64& random) {
  // Half of the tasks are not late at all: two streams then overtake each other more often than with even delays.
  if (settings.max_delay_us == 0 || random() % 2 == 0) return false;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % (settings.max_delay_us + 1)));
  return true;
}

Stream* resolve(aclrtStream stream) { return stream ? static_cast<Stream*>(stream) : default_stream(); }

std::vector<Stream*> all_streams() {
  std::vector<Stream*> found;
  for (auto& stream : streams) found.push_back(stream.get());
  return found;
}

bool idle() {
  return std::all_of(streams.begin(), streams.end(), [](const auto& stream) { return stream->queue.empty(); });
}

TaskPtr make_task(std::string name, Poll poll, bool is_kernel) {
  auto task = std::make_shared<Task>();
  task->name = std::move(name);
  task->poll = std::move(poll);
  task->is_kernel = is_kernel;
  return task;
}

aclError enqueue(aclrtStream handle, TaskPtr task, bool pump_now) {
  if (device_error != ACL_SUCCESS) return fail(device_error, "a kernel failed on the device before this launch");
  {
    std::lock_guard<std::mutex> lock(mutex);
    Stream* stream = resolve(handle);
    if (stream->capture) return capture_task(stream, task);
    if (stream->update && task->is_kernel) {
      stream->update_tasks.push_back(task);
      return ACL_SUCCESS;
    }
    if (stream->update && task->name != "poison")
      return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, task->name + " between task update begin and end");
    task->sequence = next_sequence++;
    stream->queue.push_back(std::move(task));
    if (settings.order == Order::threads) start_worker(stream);
  }
  changed.notify_all();
  if (pump_now && settings.order == Order::program) {
    ReleaseInterpreter release;
    pump([] { return false; });
  }
  return device_error;
}

aclError wait_stream(Stream* stream) {
  return wait_until([stream] { return stream->queue.empty(); }, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream wait");
}

aclError wait_device() { return wait_until([] { return idle(); }, ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "device wait"); }

void set_order(Order order, uint64_t seed, uint64_t max_delay_us) {
  wait_device();
  ReleaseInterpreter release;
  std::vector<std::thread> workers;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto& stream : streams) {
      stream->stop = true;
      if (stream->worker.joinable()) workers.push_back(std::move(stream->worker));
    }
  }
  changed.notify_all();
  for (auto& worker : workers) worker.join();
  std::lock_guard<std::mutex> lock(mutex);
  settings.order = order;
  settings.seed = seed;
  settings.max_delay_us = max_delay_us;
  choice.seed(seed);
  for (auto& stream : streams) {
    stream->stop = false;
    stream->random.seed(seed * 7919 + stream->id);
  }
}

}  // namespace fake

using namespace fake;

extern "C" {

// Streams -------------------------------------------------------------------------------------------------------------
aclError aclrtCreateStream(aclrtStream* stream) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  default_stream();
  *stream = add_stream();
  return ACL_SUCCESS;
}
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

aclError aclrtDestroyStream(aclrtStream handle) {
  Stream* stream = resolve(handle);
  wait_stream(stream);
  std::thread worker;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    stream->stop = true;
    worker = std::move(stream->worker);
  }
  changed.notify_all();
  if (worker.joinable()) {
    ReleaseInterpreter release;
    worker.join();
  }
  std::lock_guard<std::mutex> lock(fake::mutex);
  streams.erase(std::remove_if(streams.begin(), streams.end(), [&](auto& one) { return one.get() == stream; }),
                streams.end());
  return ACL_SUCCESS;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtSynchronizeStream(aclrtStream handle) {
  count("synchronize_stream");
  Stream* stream = resolve(handle);
  if (stream->capture)
    return refuse_on_stream(stream, "synchronize stream", ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
  return wait_stream(stream);
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }

aclError aclrtSynchronizeDevice() {
  count("synchronize_device");
  if (aclError error = refuse_in_capture("synchronize device")) return error;
  return wait_device();
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  Stream* stream = resolve(handle);
  if (stream->capture) return refuse_on_stream(stream, "query stream", ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT);
  move_when_polled();
  std::lock_guard<std::mutex> lock(fake::mutex);
  *status = stream->queue.empty() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = resolve(stream)->id;
  return ACL_SUCCESS;
}

// Events --------------------------------------------------------------------------------------------------------------
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  auto handle = new EventHandle{std::make_shared<EventState>()};
  handle->state->flag = flag;
  *event = handle;
  count("create_event");
  return ACL_SUCCESS;
}
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtCreateEvent(aclrtEvent* event) { return aclrtCreateEventExWithFlag(event, ACL_EVENT_SYNC); }
aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<EventHandle*>(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  count("record_event");
  EventPtr event = static_cast<EventHandle*>(handle)->state;
  const bool external = event->flag & ACL_EVENT_EXTERNAL;
  uint64_t version = 0;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    Stream* target = resolve(stream);
    if (target->capture && !external) return capture_record(target, event);
    if (!target->capture) {
      version = ++event->issued;
      event->captured_in.reset();
    }
  }
  return enqueue(stream, make_task("record_event", [event, version] {
                   std::lock_guard<std::mutex> lock(fake::mutex);
                   event->completed = std::max(event->completed, version);
                   event->external_set = true;
                   event->time_ns = now_ns();
                   return true;
                 }));
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  count("wait_event");
  EventPtr event = static_cast<EventHandle*>(handle)->state;
  const bool external = event->flag & ACL_EVENT_EXTERNAL;
  uint64_t version = 0;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    aclError error = ACL_SUCCESS;
    if (!external && capture_wait(resolve(stream), event, &error)) return error;
    version = event->issued;
    event->waits_pending += 1;
  }
  return enqueue(stream, make_task("wait_event", [event, version, external] {
                   std::lock_guard<std::mutex> lock(fake::mutex);
                   const bool reached = external ? event->external_set : event->completed >= version;
                   if (reached && event->waits_pending) event->waits_pending -= 1;
                   return reached;
                 }));
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream stream) {
  count("reset_event");
  EventPtr event = static_cast<EventHandle*>(handle)->state;
  if (!(event->flag & ACL_EVENT_EXTERNAL)) return ACL_SUCCESS;
  return enqueue(stream, make_task("reset_event", [event] {
                   std::lock_guard<std::mutex> lock(fake::mutex);
                   event->external_set = false;
                   return true;
                 }));
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  count("query_event");
  EventPtr event = static_cast<EventHandle*>(handle)->state;
  move_when_polled();
  std::lock_guard<std::mutex> lock(fake::mutex);
  *status = event->completed >= event->issued ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  const bool pending = static_cast<EventHandle*>(handle)->state->waits_pending > 0;
  *status = pending ? ACL_EVENT_WAIT_STATUS_NOT_READY : ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  count("synchronize_event");
  EventPtr event = static_cast<EventHandle*>(handle)->state;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    if (event->captured_in.lock()) return fail(ACL_ERROR_RT_EVENT_CAPTURED, "synchronize an event of a capture");
  }
  if (aclError error = refuse_in_capture("synchronize event")) return error;
  const uint64_t version = event->issued;
  return wait_until([event, version] { return event->completed >= version; }, ACL_ERROR_RT_EVENT_SYNC_TIMEOUT,
                    "event wait");
}
aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t) { return aclrtSynchronizeEvent(event); }

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  const EventPtr first = static_cast<EventHandle*>(start)->state, last = static_cast<EventHandle*>(end)->state;
  std::lock_guard<std::mutex> lock(fake::mutex);
  if (!first->completed || !last->completed) return ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID;
  *milliseconds = (static_cast<double>(last->time_ns) - static_cast<double>(first->time_ns)) * 1e-6;
  return ACL_SUCCESS;
}
aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* timestamp) {
  *timestamp = static_cast<EventHandle*>(event)->state->time_ns / 1000;
  return ACL_SUCCESS;
}

// Host functions ------------------------------------------------------------------------------------------------------
aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  count("launch_host_function");
  return enqueue(stream, make_task("host_function", [function, argument] {
                   function(argument);
                   return true;
                 }));
}
aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType, aclrtStream stream) {
  return aclrtLaunchHostFunc(stream, function, data);
}
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t) { return ACL_ERROR_RT_REPORT_TIMEOUT; }

}  // extern "C"
