// Poison for what torch's caching allocator hands out and takes back. The allocator reuses its blocks without asking the
// runtime, so this listens to its trace. Fills are tasks of the block's stream: work launched earlier keeps its data.
#include <torch_npu/csrc/core/npu/NPUCachingAllocator.h>

extern "C" void fake_poison_on_stream(aclrtStream stream, void* address, size_t bytes);
extern "C" int fake_stream_is_capturing(aclrtStream stream);

using Entry = c10_npu::NPUCachingAllocator::TraceEntry;

extern "C" void fake_poison_allocator() {
  c10_npu::NPUCachingAllocator::attachAllocatorTraceTracker([](const Entry& entry) {
    // The output of a graph may be read through a view after its tensor is gone: blocks of private pools, and those
    // freed inside a capture, are left as they are.
    const bool taken = entry.action_ == Entry::ALLOC;
    const bool freed = entry.action_ == Entry::FREE_COMPLETED && entry.mempool_ == c10_npu::MempoolId_t{0, 0} &&
                       !fake_stream_is_capturing(entry.stream_);
    if (taken || freed) fake_poison_on_stream(entry.stream_, reinterpret_cast<void*>(entry.addr_), entry.size_);
  });
}
