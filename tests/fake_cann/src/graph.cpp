// Graph capture (aclmdlRI*): a graph is the list of tasks of the captured streams with the edges that events made.
// A replay is one task of the stream it is launched on; inside, every task runs as soon as its edges allow, in the order
// of capture or, in the random orders, in any order the edges allow: an edge that was forgotten shows.
#include <algorithm>
#include <set>

#include "device.h"

namespace fake {

struct Node {
  TaskPtr task;  // null: only edges
  int32_t lane;
  std::vector<size_t> after;
};

struct TaskGroup {
  ModelPtr model;
  std::vector<size_t> nodes;
};

struct Model {
  std::vector<Node> nodes;
  std::map<int32_t, size_t> last;  // of each lane
  Stream* origin = nullptr;
  std::thread::id thread;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  bool capturing = true, lost = false;
  TaskGroup* open_group = nullptr;
  Stream* group_stream = nullptr;
  std::vector<std::unique_ptr<TaskGroup>> groups;
  uint32_t id = 0;
  std::mt19937_64 random;

  size_t add(int32_t lane, TaskPtr task, std::vector<size_t> after = {}) {
    if (auto found = last.find(lane); found != last.end()) after.push_back(found->second);
    nodes.push_back({std::move(task), lane, std::move(after)});
    last[lane] = nodes.size() - 1;
    return nodes.size() - 1;
  }
};

namespace {

std::map<Model*, ModelPtr> models;  // those that torch holds
std::set<Model*> captures;          // those being captured
uint32_t next_model_id = 1;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

// One run of a graph, which may stop at an external event and go on later.
class Replay {
 public:
  explicit Replay(ModelPtr model) : model_(std::move(model)), done_(model_->nodes.size()), left_(done_.size()) {}

  bool poll() {
    std::set<size_t> blocked;
    while (left_) {
      std::vector<size_t> ready;
      TaskPtr task;
      size_t chosen = 0;
      {
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t node = 0; node < done_.size(); ++node)
          if (!done_[node] && !blocked.count(node) && after_done(node)) ready.push_back(node);
        if (ready.empty()) return false;
        chosen = settings.order == Order::program ? ready[0] : ready[model_->random() % ready.size()];
        task = model_->nodes[chosen].task;
      }
      if (settings.order == Order::threads) draw_delay(model_->random);
      if (task && !task->poll()) {
        blocked.insert(chosen);
        continue;
      }
      std::lock_guard<std::mutex> lock(mutex);
      done_[chosen] = true;
      --left_;
      blocked.clear();
    }
    return true;
  }

 private:
  bool after_done(size_t node) const {
    const auto& after = model_->nodes[node].after;
    return std::all_of(after.begin(), after.end(), [this](size_t one) { return done_[one]; });
  }

  ModelPtr model_;
  std::vector<bool> done_;
  size_t left_;
};

bool leads_to(const Model& model, size_t from, size_t to) {
  std::vector<size_t> open{to};
  std::set<size_t> seen;
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (node == from) return true;
    if (seen.insert(node).second) open.insert(open.end(), model.nodes[node].after.begin(), model.nodes[node].after.end());
  }
  return false;
}

bool everything_joined(const Model& model) {
  auto end = model.last.find(model.origin->id);
  if (end == model.last.end()) return model.last.empty();
  return std::all_of(model.last.begin(), model.last.end(),
                     [&](const auto& lane) { return leads_to(model, lane.second, end->second); });
}

ModelPtr captured(aclrtStream stream) { return resolve(stream)->capture; }

}  // namespace

aclError capture_task(Stream* stream, const TaskPtr& task) {
  Model& model = *stream->capture;
  const size_t node = model.add(stream->id, task);
  if (task->is_kernel && model.open_group && model.group_stream == stream) model.open_group->nodes.push_back(node);
  return ACL_SUCCESS;
}

aclError capture_record(Stream* stream, const EventPtr& event) {
  event->captured_in = stream->capture;
  event->captured_node = stream->capture->add(stream->id, nullptr);
  return ACL_SUCCESS;
}

// True when the wait belongs to a capture (or is an error there); otherwise the caller queues a plain wait.
bool capture_wait(Stream* stream, const EventPtr& event, aclError* error) {
  ModelPtr model = event->captured_in.lock();
  if (model && !model->capturing) model = nullptr;
  if (!model && !stream->capture) return false;
  if (!model) {
    stream->capture->lost = true;
    *error = fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for an event recorded outside the capture");
  } else if (stream->capture && stream->capture != model) {
    *error = fail(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream waits for an event of another capture");
  } else {
    stream->capture = model;
    model->add(stream->id, nullptr, {event->captured_node});
  }
  return true;
}

bool any_capture() {
  std::lock_guard<std::mutex> lock(mutex);
  return !captures.empty();
}

// What waits for the device is refused while a capture is under way that this thread must respect.
aclError refuse_in_capture(const char* what) {
  std::lock_guard<std::mutex> lock(mutex);
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  for (Model* model : captures) {
    if (model->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) continue;
    if (model->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL && model->thread != std::this_thread::get_id()) continue;
    model->lost = true;
    return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, std::string(what) + " while a stream is captured");
  }
  return ACL_SUCCESS;
}

aclError refuse_on_stream(Stream* stream, const char* what, aclError error) {
  std::lock_guard<std::mutex> lock(mutex);
  if (stream->capture) stream->capture->lost = true;
  return fail(error, std::string(what) + " on a captured stream");
}

}  // namespace fake

using namespace fake;

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  count("capture_begin");
  std::lock_guard<std::mutex> lock(fake::mutex);
  Stream* stream = resolve(handle);
  if (stream->capture) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "capture begin on a captured stream");
  auto model = std::make_shared<Model>();
  model->origin = stream;
  model->thread = std::this_thread::get_id();
  model->mode = mode;
  model->id = next_model_id++;
  model->random.seed(settings.seed * 104729 + model->id);
  models[model.get()] = model;
  captures.insert(model.get());
  stream->capture = std::move(model);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* out) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  const ModelPtr model = captured(handle);
  *status = !model       ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : model->lost ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                          : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  if (out) *out = model.get();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* out) {
  count("capture_end");
  std::lock_guard<std::mutex> lock(fake::mutex);
  Stream* stream = resolve(handle);
  const ModelPtr model = stream->capture;
  if (!model) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "capture end on a stream that is not captured");
  if (model->origin != stream) return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "capture end on a joined stream");
  for (Stream* one : all_streams())
    if (one->capture == model) one->capture = nullptr;
  model->capturing = false;
  captures.erase(model.get());
  *out = nullptr;
  aclError error = ACL_SUCCESS;
  if (model->lost) error = fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture was lost to a refused call");
  else if (model->open_group) error = fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "a task group is open at capture end");
  else if (!everything_joined(*model)) error = fail(ACL_ERROR_RT_STREAM_UNJOINED, "a captured stream was not joined");
  if (error != ACL_SUCCESS) {
    models.erase(model.get());
    return error;
  }
  *out = model.get();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
  count("replay");
  ModelPtr model;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    auto found = models.find(static_cast<Model*>(handle));
    if (found == models.end()) return fail(ACL_ERROR_RT_PARAM_INVALID, "replay of an unknown graph");
    model = found->second;
  }
  // The state of the run is made when it starts: a captured replay would run once for each run of its graph.
  auto run = std::make_shared<std::unique_ptr<Replay>>();
  return enqueue(stream, make_task("replay", [model, run] {
                   if (!*run) *run = std::make_unique<Replay>(model);
                   if (!(*run)->poll()) return false;
                   run->reset();
                   return true;
                 }));
}

aclError aclmdlRIDestroy(aclmdlRI model) {
  ModelPtr last;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    auto found = models.find(static_cast<Model*>(model));
    if (found != models.end()) {
      last = found->second;
      for (auto& group : last->groups) group->model.reset();
      models.erase(found);
    }
  }
  return ACL_SUCCESS;
}

aclError aclmdlRIGetId(aclmdlRI model, uint32_t* id) {
  *id = static_cast<Model*>(model)->id;
  return ACL_SUCCESS;
}
aclError aclmdlRIDebugPrint(aclmdlRI) { return ACL_SUCCESS; }

// Task groups ---------------------------------------------------------------------------------------------------------
aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  count("task_group_begin");
  std::lock_guard<std::mutex> lock(fake::mutex);
  const ModelPtr model = captured(handle);
  if (!model) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "task group begin on a stream that is not captured");
  if (model->open_group) return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "a task group is open already");
  model->groups.push_back(std::make_unique<TaskGroup>());
  model->open_group = model->groups.back().get();
  model->open_group->model = model;
  model->group_stream = resolve(handle);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group) {
  count("task_group_end");
  std::lock_guard<std::mutex> lock(fake::mutex);
  const ModelPtr model = captured(handle);
  if (!model || !model->open_group || model->group_stream != resolve(handle))
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "task group end without begin on this stream");
  *group = model->open_group;
  model->open_group = nullptr;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  count("task_update_begin");
  std::lock_guard<std::mutex> lock(fake::mutex);
  Stream* stream = resolve(handle);
  if (stream->capture || stream->update || !static_cast<TaskGroup*>(group)->model)
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "task update begin: the stream is captured, or in an update already");
  stream->update = static_cast<TaskGroup*>(group);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  count("task_update_end");
  Stream* stream = resolve(handle);
  std::vector<TaskPtr> tasks;
  ModelPtr model;
  std::vector<size_t> nodes;
  {
    std::lock_guard<std::mutex> lock(fake::mutex);
    if (!stream->update) return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "task update end without begin");
    tasks.swap(stream->update_tasks);
    model = stream->update->model;
    nodes = stream->update->nodes;
    stream->update = nullptr;
    const bool same = tasks.size() == nodes.size() &&
                      std::equal(tasks.begin(), tasks.end(), nodes.begin(), [&](const TaskPtr& task, size_t node) {
                        return task->name == model->nodes[node].task->name;
                      });
    if (!same)
      return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED, "the update launches other work than the task group holds");
  }
  return enqueue(stream, make_task("task_update", [model, nodes, tasks] {
                   std::lock_guard<std::mutex> lock(fake::mutex);
                   for (size_t index = 0; index < nodes.size(); ++index) model->nodes[nodes[index]].task = tasks[index];
                   return true;
                 }));
}

}  // extern "C"
