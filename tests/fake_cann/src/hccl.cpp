// libhccl: collectives between processes of one machine through a file in shared memory. A collective is one task of its
// stream. Ranks first compare what they were asked (operation, count, type, root): a disagreement is an error, where real
// hardware would hang or mix up data. Reductions add in the order of ranks in float32, so every rank gets the same bits.
#include "hccl/hccl.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "acl/acl.h"

extern "C" aclError fake_launch_native(aclrtStream stream, const char* name, const std::function<bool()>* poll);
extern "C" void fake_fail_device(int error);
extern "C" void fake_count(const char* name, uint64_t bytes);

namespace {

constexpr size_t kSlotBytes = 1 << 20, kMailBytes = 1 << 18;
constexpr uint32_t kMaxRanks = 16;

struct Asked {
  uint32_t operation, type, reduce, root;
  uint64_t count, rounds;
};
struct Mailbox {
  std::atomic<uint32_t> full;
  uint64_t bytes;
};
struct Header {
  std::atomic<uint32_t> joined, arrived, generation, failed;
  int32_t pid[kMaxRanks];
  Asked asked[kMaxRanks];
  Mailbox mail[kMaxRanks * kMaxRanks];
};

struct Communicator {
  std::string name;
  uint32_t rank = 0, size = 0;
  Header* header = nullptr;
  char* data = nullptr;
  size_t mapped = 0;
  std::mutex one_at_a_time;
  std::atomic<int> error{HCCL_SUCCESS};

  char* slot(uint32_t owner) const { return data + owner * kSlotBytes; }
  char* mail(uint32_t from, uint32_t to) const { return data + size * kSlotBytes + (from * size + to) * kMailBytes; }
  Mailbox& mailbox(uint32_t from, uint32_t to) const { return header->mail[from * size + to]; }
  ~Communicator() {
    if (header) munmap(header, mapped);
  }
};
using CommunicatorPtr = std::shared_ptr<Communicator>;

std::mutex registry_mutex;
std::map<void*, CommunicatorPtr> registry;
std::atomic<uint32_t> next_name{0};

int timeout_s() {
  const char* text = std::getenv("FAKE_CANN_HCCL_TIMEOUT_S");
  return text ? std::atoi(text) : 60;
}

// A process that ended but was not waited for by its parent is dead, too.
bool alive(int32_t pid) {
  char path[32], state = 'Z';
  std::snprintf(path, sizeof(path), "/proc/%d/stat", pid);
  std::FILE* file = std::fopen(path, "r");
  if (!file) return false;
  const int found = std::fscanf(file, "%*d (%*[^)]) %c", &state);
  std::fclose(file);
  return found == 1 && state != 'Z' && state != 'X';
}

// Waits until `reached`, and fails when a peer has died, has failed, or lets the time pass.
void wait_for(Communicator& comm, const std::function<bool()>& reached) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(timeout_s());
  for (uint64_t turn = 0; !reached(); ++turn) {
    if (turn < 200) {
      std::this_thread::yield();
      continue;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(turn < 2000 ? 20 : 200));
    if (turn % 256 != 0) continue;
    if (comm.header->failed) throw std::runtime_error("a peer failed");
    for (uint32_t peer = 0; peer < comm.size; ++peer)
      if (comm.header->pid[peer] && !alive(comm.header->pid[peer])) throw std::runtime_error("a peer is gone");
    if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("no answer from a peer in time");
  }
}

void barrier(Communicator& comm) {
  const uint32_t generation = comm.header->generation;
  if (comm.header->arrived.fetch_add(1) + 1 == comm.size) {
    comm.header->arrived = 0;
    comm.header->generation.fetch_add(1);
    return;
  }
  wait_for(comm, [&] { return comm.header->generation != generation; });
}

// Every rank says what it was asked; returns the largest number of rounds any needs.
uint64_t agree(Communicator& comm, const Asked& mine) {
  comm.header->asked[comm.rank] = mine;
  barrier(comm);
  uint64_t rounds = 0;
  for (uint32_t peer = 0; peer < comm.size; ++peer) {
    const Asked& other = comm.header->asked[peer];
    if (other.operation != mine.operation || other.type != mine.type || other.reduce != mine.reduce ||
        other.root != mine.root || other.count != mine.count)
      throw std::runtime_error("rank " + std::to_string(peer) + " calls another collective: operation " +
                               std::to_string(other.operation) + " count " + std::to_string(other.count) +
                               " type " + std::to_string(other.type) + ", here " + std::to_string(mine.operation) +
                               " count " + std::to_string(mine.count) + " type " + std::to_string(mine.type));
    rounds = std::max(rounds, other.rounds);
  }
  barrier(comm);
  return rounds;
}

size_t bytes_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2: return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64: return 8;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32: return 4;
    default: throw std::runtime_error("data type " + std::to_string(type));
  }
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  BFloat16() = default;
  explicit BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7FC0 : static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
};

// Combines element `i` of every part, in the order of the parts.
template <typename Stored, typename Sum>
void combine(const std::vector<const char*>& parts, void* out, size_t number, HcclReduceOp op) {
  for (size_t i = 0; i < number; ++i) {
    Sum total = static_cast<Sum>(reinterpret_cast<const Stored*>(parts[0])[i]);
    for (size_t part = 1; part < parts.size(); ++part) {
      const Sum next = static_cast<Sum>(reinterpret_cast<const Stored*>(parts[part])[i]);
      switch (op) {
        case HCCL_REDUCE_SUM: total = total + next; break;
        case HCCL_REDUCE_PROD: total = total * next; break;
        case HCCL_REDUCE_MAX: total = std::max(total, next); break;
        case HCCL_REDUCE_MIN: total = std::min(total, next); break;
        default: throw std::runtime_error("reduction " + std::to_string(op));
      }
    }
    reinterpret_cast<Stored*>(out)[i] = static_cast<Stored>(total);
  }
}

void combine(HcclDataType type, const std::vector<const char*>& parts, void* out, size_t number, HcclReduceOp op) {
  switch (type) {
    case HCCL_DATA_TYPE_FP32: return combine<float, float>(parts, out, number, op);
    case HCCL_DATA_TYPE_FP16: return combine<_Float16, float>(parts, out, number, op);
    case HCCL_DATA_TYPE_BFP16: return combine<BFloat16, float>(parts, out, number, op);
    case HCCL_DATA_TYPE_INT8: return combine<int8_t, int8_t>(parts, out, number, op);
    case HCCL_DATA_TYPE_INT16: return combine<int16_t, int16_t>(parts, out, number, op);
    case HCCL_DATA_TYPE_INT32: return combine<int32_t, int32_t>(parts, out, number, op);
    case HCCL_DATA_TYPE_INT64: return combine<int64_t, int64_t>(parts, out, number, op);
    case HCCL_DATA_TYPE_UINT8: return combine<uint8_t, uint8_t>(parts, out, number, op);
    default: throw std::runtime_error("reduction of data type " + std::to_string(type));
  }
}

enum Operation : uint32_t { ALL_REDUCE = 1, ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, BROADCAST, REDUCE, SCATTER, BARRIER };

uint64_t pieces(uint64_t bytes, uint64_t piece) { return (bytes + piece - 1) / piece; }

// Every rank shows `bytes` of its own; `read(peer, part, at, size)` sees all of them piece by piece.
using Read = std::function<void(const std::vector<const char*>& parts, uint64_t at, uint64_t size)>;
void show_all(Communicator& comm, const Asked& asked, const char* mine, uint64_t bytes, const Read& read) {
  agree(comm, asked);
  for (uint64_t at = 0; at < bytes; at += kSlotBytes) {
    const uint64_t size = std::min<uint64_t>(kSlotBytes, bytes - at);
    if (mine) std::memcpy(comm.slot(comm.rank), mine + at, size);
    barrier(comm);
    std::vector<const char*> parts;
    for (uint32_t peer = 0; peer < comm.size; ++peer) parts.push_back(comm.slot(peer));
    read(parts, at, size);
    barrier(comm);
  }
}

struct Piece {
  char* address;
  uint64_t bytes;
};
// Rank r's out[p] arrives as rank p's in[r].
void all_to_all(Communicator& comm, Asked asked, const std::vector<Piece>& out, const std::vector<Piece>& in) {
  const uint64_t room = kSlotBytes / comm.size / 64 * 64;
  for (const Piece& piece : out) asked.rounds = std::max(asked.rounds, pieces(piece.bytes, room));
  for (const Piece& piece : in) asked.rounds = std::max(asked.rounds, pieces(piece.bytes, room));
  const uint64_t rounds = agree(comm, asked);
  for (uint64_t round = 0; round < rounds; ++round) {
    const uint64_t at = round * room;
    for (uint32_t peer = 0; peer < comm.size; ++peer)
      if (at < out[peer].bytes)
        std::memcpy(comm.slot(comm.rank) + peer * room, out[peer].address + at, std::min(room, out[peer].bytes - at));
    barrier(comm);
    for (uint32_t peer = 0; peer < comm.size; ++peer)
      if (at < in[peer].bytes)
        std::memcpy(in[peer].address + at, comm.slot(peer) + comm.rank * room, std::min(room, in[peer].bytes - at));
    barrier(comm);
  }
}

// Sends and receives of one call make progress together, so that two ranks may send to each other first.
struct Transfer {
  bool send;
  uint32_t peer;
  char* address;
  uint64_t bytes, done = 0;
  bool finished = false;
};
bool move_one_piece(Communicator& comm, Transfer& transfer) {
  const uint32_t from = transfer.send ? comm.rank : transfer.peer, to = transfer.send ? transfer.peer : comm.rank;
  Mailbox& box = comm.mailbox(from, to);
  if (box.full == (transfer.send ? 1u : 0u)) return false;
  const uint64_t size = std::min<uint64_t>(kMailBytes, transfer.bytes - transfer.done);
  if (transfer.send) {
    std::memcpy(comm.mail(from, to), transfer.address + transfer.done, size);
    box.bytes = size;
    box.full = 1;
  } else {
    if (box.bytes != size) throw std::runtime_error("a receive of another size than the send");
    std::memcpy(transfer.address + transfer.done, comm.mail(from, to), size);
    box.full = 0;
  }
  transfer.done += size;
  transfer.finished = transfer.done == transfer.bytes;
  return true;
}
void transfer_all(Communicator& comm, std::vector<Transfer> transfers) {
  auto step = [&] {
    bool all = true, moved = false;
    for (size_t index = 0; index < transfers.size(); ++index) {
      Transfer& one = transfers[index];
      if (one.finished) continue;
      const bool earlier = std::any_of(transfers.begin(), transfers.begin() + index, [&](const Transfer& before) {
        return !before.finished && before.send == one.send && before.peer == one.peer;
      });
      if (!earlier) moved |= move_one_piece(comm, one);
      all &= one.finished;
    }
    return all || moved;
  };
  while (std::any_of(transfers.begin(), transfers.end(), [](const Transfer& one) { return !one.finished; }))
    wait_for(comm, step);
}

CommunicatorPtr find(HcclComm comm) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  auto found = registry.find(comm);
  return found == registry.end() ? nullptr : found->second;
}

bool run(Communicator& comm, const std::function<void(Communicator&)>& body) {
  std::lock_guard<std::mutex> lock(comm.one_at_a_time);
  try {
    body(comm);
    return true;
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "fake HCCL, rank %u of %s: %s\n", comm.rank, comm.name.c_str(), failure.what());
    comm.header->failed = 1;
    comm.error = HCCL_E_REMOTE;
    fake_fail_device(ACL_ERROR_RT_COMM_OP_RETRY_FAIL);
    return false;
  }
}

HcclResult launch(HcclComm handle, aclrtStream stream, const char* name, uint64_t bytes,
                  std::function<void(Communicator&)> body) {
  CommunicatorPtr comm = find(handle);
  if (!comm) return HCCL_E_PARA;
  fake_count(name, bytes);
  const std::function<bool()> poll = [comm, body = std::move(body)] {
    run(*comm, body);
    return true;
  };
  return fake_launch_native(stream, name, &poll) == ACL_SUCCESS ? HCCL_SUCCESS : HCCL_E_RUNTIME;
}

HcclResult join(const std::string& path, const std::string& name, uint32_t size, uint32_t rank, HcclComm* out) {
  if (size > kMaxRanks || rank >= size) return HCCL_E_PARA;
  auto comm = std::make_shared<Communicator>();
  comm->name = name;
  comm->rank = rank;
  comm->size = size;
  const size_t head = (sizeof(Header) + 4095) / 4096 * 4096;
  comm->mapped = head + size * kSlotBytes + static_cast<size_t>(size) * size * kMailBytes;
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(comm->mapped)) != 0) return HCCL_E_SYSCALL;
  void* memory = mmap(nullptr, comm->mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return HCCL_E_MEMORY;
  comm->header = static_cast<Header*>(memory);
  comm->data = static_cast<char*>(memory) + head;
  comm->header->pid[rank] = getpid();
  comm->header->joined.fetch_add(1);
  try {
    wait_for(*comm, [&] { return comm->header->joined == size; });
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "fake HCCL, rank %u of %s: %s\n", rank, name.c_str(), failure.what());
    return HCCL_E_TIMEOUT;
  }
  if (rank == 0) unlink(path.c_str());
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry[comm.get()] = comm;
  *out = comm.get();
  return HCCL_SUCCESS;
}

std::string shared_path(const std::string& name) {
  return (access("/dev/shm", W_OK) == 0 ? "/dev/shm/" : "/tmp/") + name;
}

Asked asked(Operation operation, uint64_t count, HcclDataType type, uint32_t reduce = 0, uint32_t root = 0) {
  return {operation, static_cast<uint32_t>(type), reduce, root, count, 0};
}

}  // namespace

extern "C" {

// Communicators -------------------------------------------------------------------------------------------------------
HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  std::memset(info, 0, sizeof(*info));
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  std::snprintf(info->internal, sizeof(info->internal), "fake_hccl_%d_%u_%llx", getpid(), next_name++,
                static_cast<unsigned long long>(now));
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* info, uint32_t rank, HcclComm* comm) {
  return join(shared_path(info->internal), info->internal, size, rank, comm);
}
HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* comm) {
  const bool named = config && config->hcclCommName[0];
  return join(shared_path(info->internal), named ? config->hcclCommName : info->internal, size, rank, comm);
}
HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t size, uint32_t*, uint64_t id, uint32_t rank,
                                   HcclCommConfig* config, HcclComm* comm) {
  CommunicatorPtr whole = find(*parent);
  if (!whole) return HCCL_E_PARA;
  const std::string own = whole->name + "_" + std::to_string(id);
  return join(shared_path(own), config && config->hcclCommName[0] ? config->hcclCommName : own, size, rank, comm);
}
HcclResult HcclCommDestroy(HcclComm comm) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry.erase(comm);
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommName(HcclComm handle, char* name) {
  CommunicatorPtr comm = find(handle);
  if (!comm) return HCCL_E_PARA;
  std::snprintf(name, COMM_NAME_MAX_LENGTH, "%s", comm->name.c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
  *size = find(comm)->size;
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  *rank = find(comm)->rank;
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* error) {
  CommunicatorPtr comm = find(handle);
  *error = comm ? static_cast<HcclResult>(comm->error.load()) : HCCL_E_PARA;
  return HCCL_SUCCESS;
}
// Buffer size, determinism and name, which are the first three; nothing later.
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_COMM_NAME + 1; }
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
const char* HcclGetErrorString(HcclResult) { return "fake HCCL: see stderr"; }
HcclResult HcclGroupStart() { return HCCL_SUCCESS; }
HcclResult HcclGroupEnd() { return HCCL_SUCCESS; }

// Collectives ---------------------------------------------------------------------------------------------------------
HcclResult HcclAllReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm comm,
                         aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:all_reduce", bytes, [=](Communicator& c) {
    show_all(c, asked(ALL_REDUCE, count, type, op), static_cast<char*>(send), bytes,
             [&](const auto& parts, uint64_t at, uint64_t size) {
               combine(type, parts, static_cast<char*>(receive) + at, size / bytes_of(type), op);
             });
  });
}

HcclResult HcclReduce(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root,
                      HcclComm comm, aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:reduce", bytes, [=](Communicator& c) {
    show_all(c, asked(REDUCE, count, type, op, root), static_cast<char*>(send), bytes,
             [&](const auto& parts, uint64_t at, uint64_t size) {
               if (c.rank == root) combine(type, parts, static_cast<char*>(receive) + at, size / bytes_of(type), op);
             });
  });
}

HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                         aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:broadcast", bytes, [=](Communicator& c) {
    show_all(c, asked(BROADCAST, count, type, 0, root), c.rank == root ? static_cast<char*>(buffer) : nullptr, bytes,
             [&](const auto& parts, uint64_t at, uint64_t size) {
               if (c.rank != root) std::memcpy(static_cast<char*>(buffer) + at, parts[root], size);
             });
  });
}

HcclResult HcclAllGather(void* send, void* receive, uint64_t count, HcclDataType type, HcclComm comm,
                         aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:all_gather", bytes, [=](Communicator& c) {
    show_all(c, asked(ALL_GATHER, count, type), static_cast<char*>(send), bytes,
             [&](const auto& parts, uint64_t at, uint64_t size) {
               for (uint32_t peer = 0; peer < c.size; ++peer)
                 std::memcpy(static_cast<char*>(receive) + peer * bytes + at, parts[peer], size);
             });
  });
}

HcclResult HcclReduceScatter(void* send, void* receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                             HcclComm comm, aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:reduce_scatter", bytes, [=](Communicator& c) {
    std::vector<std::vector<char>> room(c.size, std::vector<char>(bytes));
    std::vector<Piece> out, in;
    std::vector<const char*> parts;
    for (uint32_t peer = 0; peer < c.size; ++peer) {
      out.push_back({static_cast<char*>(send) + peer * bytes, bytes});
      in.push_back({room[peer].data(), bytes});
      parts.push_back(room[peer].data());
    }
    all_to_all(c, asked(REDUCE_SCATTER, count, type, op), out, in);
    combine(type, parts, receive, count, op);
  });
}

HcclResult HcclScatter(void* send, void* receive, uint64_t count, HcclDataType type, uint32_t root, HcclComm comm,
                       aclrtStream stream) {
  const uint64_t bytes = count * bytes_of(type);
  return launch(comm, stream, "hccl:scatter", bytes, [=](Communicator& c) {
    std::vector<Piece> out(c.size, Piece{nullptr, 0}), in(c.size, Piece{nullptr, 0});
    if (c.rank == root)
      for (uint32_t peer = 0; peer < c.size; ++peer) out[peer] = {static_cast<char*>(send) + peer * bytes, bytes};
    in[root] = {static_cast<char*>(receive), bytes};
    all_to_all(c, asked(SCATTER, count, type, 0, root), out, in);
  });
}

HcclResult HcclAlltoAllV(const void* send, const void* send_counts, const void* send_starts, HcclDataType send_type,
                         const void* receive, const void* receive_counts, const void* receive_starts,
                         HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  CommunicatorPtr known = find(comm);
  if (!known || send_type != receive_type) return HCCL_E_PARA;
  const uint64_t unit = bytes_of(send_type);
  std::vector<Piece> out, in;
  uint64_t bytes = 0;
  for (uint32_t peer = 0; peer < known->size; ++peer) {  // the counts are host arrays, read now
    out.push_back({static_cast<char*>(const_cast<void*>(send)) + static_cast<const uint64_t*>(send_starts)[peer] * unit,
                   static_cast<const uint64_t*>(send_counts)[peer] * unit});
    in.push_back({static_cast<char*>(const_cast<void*>(receive)) +
                      static_cast<const uint64_t*>(receive_starts)[peer] * unit,
                  static_cast<const uint64_t*>(receive_counts)[peer] * unit});
    bytes += out.back().bytes;
  }
  return launch(comm, stream, "hccl:all_to_all", bytes,
                [=](Communicator& c) { all_to_all(c, asked(ALL_TO_ALL, 0, send_type), out, in); });
}

HcclResult HcclAlltoAll(const void* send, uint64_t send_count, HcclDataType send_type, const void* receive,
                        uint64_t receive_count, HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  CommunicatorPtr known = find(comm);
  if (!known) return HCCL_E_PARA;
  std::vector<uint64_t> send_counts(known->size, send_count), receive_counts(known->size, receive_count), starts, ends;
  for (uint32_t peer = 0; peer < known->size; ++peer) {
    starts.push_back(peer * send_count);
    ends.push_back(peer * receive_count);
  }
  return HcclAlltoAllV(send, send_counts.data(), starts.data(), send_type, receive, receive_counts.data(), ends.data(),
                       receive_type, comm, stream);
}

HcclResult HcclAlltoAllVC(const void* send, const void* matrix, HcclDataType send_type, const void* receive,
                          HcclDataType receive_type, HcclComm comm, aclrtStream stream) {
  CommunicatorPtr known = find(comm);
  if (!known) return HCCL_E_PARA;
  std::vector<uint64_t> out, in, starts, ends;
  uint64_t sent = 0, received = 0;
  for (uint32_t peer = 0; peer < known->size; ++peer) {
    out.push_back(static_cast<const uint64_t*>(matrix)[known->rank * known->size + peer]);
    in.push_back(static_cast<const uint64_t*>(matrix)[peer * known->size + known->rank]);
    starts.push_back(sent);
    ends.push_back(received);
    sent += out.back();
    received += in.back();
  }
  return HcclAlltoAllV(send, out.data(), starts.data(), send_type, receive, in.data(), ends.data(), receive_type, comm,
                       stream);
}

HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  return launch(comm, stream, "hccl:barrier", 0,
                [](Communicator& c) { agree(c, asked(BARRIER, 0, HCCL_DATA_TYPE_INT8)); });
}

// Point to point ------------------------------------------------------------------------------------------------------
HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t number, HcclComm comm, aclrtStream stream) {
  std::vector<Transfer> transfers;
  uint64_t bytes = 0;
  for (uint32_t index = 0; index < number; ++index) {
    const HcclSendRecvItem& item = items[index];
    transfers.push_back({item.sendRecvType == HCCL_SEND, item.remoteRank, static_cast<char*>(item.buf),
                         item.count * bytes_of(item.dataType)});
    transfers.back().finished = transfers.back().bytes == 0;
    bytes += transfers.back().bytes;
  }
  const char* name = number > 1 ? "hccl:batch_send_recv" : transfers[0].send ? "hccl:send" : "hccl:recv";
  return launch(comm, stream, name, bytes, [transfers](Communicator& c) { transfer_all(c, transfers); });
}
HcclResult HcclSend(void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
  HcclSendRecvItem item{HCCL_SEND, buffer, count, type, peer};
  return HcclBatchSendRecv(&item, 1, comm, stream);
}
HcclResult HcclRecv(void* buffer, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm, aclrtStream stream) {
  HcclSendRecvItem item{HCCL_RECV, buffer, count, type, peer};
  return HcclBatchSendRecv(&item, 1, comm, stream);
}

// For the references of fused operators, which name a communicator (`hcom`, `group_ep`) and run as one task ------------
static CommunicatorPtr by_name(const char* name) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  for (auto& [handle, comm] : registry)
    if (comm->name == name) return comm;
  return nullptr;
}
int fake_hccl_rank(const char* name) { return by_name(name) ? static_cast<int>(by_name(name)->rank) : -1; }
int fake_hccl_size(const char* name) { return by_name(name) ? static_cast<int>(by_name(name)->size) : -1; }
// Every rank's `bytes` are gathered into `receive`, in the order of ranks; the call returns when they are there.
int fake_hccl_all_gather(const char* name, void* send, void* receive, uint64_t bytes) {
  CommunicatorPtr comm = by_name(name);
  if (!comm) return HCCL_E_NOT_FOUND;
  fake_count("hccl:inside_operator", bytes);
  const bool done = run(*comm, [=](Communicator& c) {
    show_all(c, asked(ALL_GATHER, bytes, HCCL_DATA_TYPE_UINT8), static_cast<char*>(send), bytes,
             [&](const auto& parts, uint64_t at, uint64_t size) {
               for (uint32_t peer = 0; peer < c.size; ++peer)
                 std::memcpy(static_cast<char*>(receive) + peer * bytes + at, parts[peer], size);
             });
  });
  return done ? HCCL_SUCCESS : HCCL_E_REMOTE;
}

}  // extern "C"
