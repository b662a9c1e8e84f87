// NCCL between processes, and NVML.
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <cstring>
#include <functional>
#include <vector>

#include "check.h"

namespace check {
namespace {

struct Id {
  char bytes[128];
};
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef, version = 22809;
  int blocking = 0, rest[7] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN};
};
constexpr int kSuccess = 0, kUnhandledCuda = 1, kInvalidArgument = 4, kRemoteError = 6, kInProgress = 7, kFloat = 7,
              kSum = 0;

template <class Function>
Function* function(const char* library, const char* name) {
  void* opened = dlopen(library, RTLD_NOW);
  return reinterpret_cast<Function*>(opened ? dlsym(opened, name) : nullptr);
}
struct Nccl {
  template <class Function>
  static Function* get(const char* name) {
    return function<Function>("libnccl.so.2", name);
  }
  int (*unique_id)(Id*) = get<int(Id*)>("ncclGetUniqueId");
  int (*init)(void**, int, Id, int) = get<int(void**, int, Id, int)>("ncclCommInitRank");
  int (*init_config)(void**, int, Id, int,
                     const Config*) = get<int(void**, int, Id, int, const Config*)>("ncclCommInitRankConfig");
  int (*state)(void*, int*) = get<int(void*, int*)>("ncclCommGetAsyncError");
  int (*finalize)(void*) = get<int(void*)>("ncclCommFinalize");
  int (*destroy)(void*) = get<int(void*)>("ncclCommDestroy");
  int (*abort)(void*) = get<int(void*)>("ncclCommAbort");
  int (*group_start)() = get<int()>("ncclGroupStart");
  int (*group_end)() = get<int()>("ncclGroupEnd");
  int (*send)(const void*, size_t, int, int, void*,
              void*) = get<int(const void*, size_t, int, int, void*, void*)>("ncclSend");
  int (*recv)(void*, size_t, int, int, void*, void*) = get<int(void*, size_t, int, int, void*, void*)>("ncclRecv");
  int (*all_reduce)(const void*, void*, size_t, int, int, void*,
                    void*) = get<int(const void*, void*, size_t, int, int, void*, void*)>("ncclAllReduce");
  int (*all_gather)(const void*, void*, size_t, int, void*,
                    void*) = get<int(const void*, void*, size_t, int, void*, void*)>("ncclAllGather");
  int (*reduce_scatter)(const void*, void*, size_t, int, int, void*,
                        void*) = get<int(const void*, void*, size_t, int, int, void*, void*)>("ncclReduceScatter");

  // Asks until nothing is in progress.
  int settled(void* communicator) const {
    int code = kInProgress;
    while (state(communicator, &code) == kSuccess && code == kInProgress) usleep(500);
    return code;
  }
};

// A stream beside the default one, and the wait for what is on it.
struct Side {
  c10::impl::VirtualGuardImpl guard{c10::DeviceType::CUDA};
  c10::Stream stream = guard.getStreamFromGlobalPool(c10::Device(c10::DeviceType::CUDA, 0));
  void* handle() const { return stream.native_handle(); }
  void wait() const { guard.synchronizeStream(stream); }
};

// Runs the ranks of a group, each in a process; how many ended well.
int ranks(int size, const std::function<bool(const Nccl&, int rank, Id)>& body) {
  Id id;
  Nccl().unique_id(&id);
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    children.push_back(fork());
    if (children.back() == 0) _exit(body(Nccl(), rank, id) ? 0 : 1);
  }
  int good = 0;
  for (pid_t child : children) {
    int status;
    waitpid(child, &status, 0);
    good += WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  return good;
}
bool is_garbage(const std::vector<float>& all) {
  for (float x : all)
    if (x == x) return false;
  return true;
}

}  // namespace

void collectives() {
  EXPECT(ranks(3, [](const Nccl& nccl, int rank, Id id) {
           void* group = nullptr;
           if (nccl.init(&group, 3, id, rank)) return false;
           Side side;
           std::vector<float> mine{float(rank), 1, 2}, sum(3), part(1), all(9), from(3);
           bool good = nccl.all_reduce(mine.data(), sum.data(), 3, kFloat, kSum, group, side.handle()) == kSuccess;
           good &= nccl.reduce_scatter(mine.data(), part.data(), 1, kFloat, kSum, group, side.handle()) == kSuccess;
           good &= nccl.all_gather(mine.data(), all.data(), 3, kFloat, group, side.handle()) == kSuccess;
           nccl.group_start();
           for (int peer = 0; peer < 3; ++peer) {
             good &= nccl.send(&mine[0], 1, kFloat, peer, group, side.handle()) == kSuccess;
             good &= nccl.recv(&from[peer], 1, kFloat, peer, group, side.handle()) == kSuccess;
           }
           good &= nccl.group_end() == kSuccess;
           side.wait();
           good &= sum == std::vector<float>{3, 3, 6} && part[0] == sum[rank] && all[3] == 1 && all[8] == 2;
           good &= from == std::vector<float>{0, 1, 2};
           return good && nccl.destroy(group) == kSuccess;
         }) == 3);
  // A peer that is gone is an error to ask for, and what was to be received is garbage.
  EXPECT(ranks(2, [](const Nccl& nccl, int rank, Id id) {
           void* group = nullptr;
           if (nccl.init(&group, 2, id, rank)) return false;
           if (rank == 1) return true;
           Side side;
           std::vector<float> data(5);
           nccl.recv(data.data(), 5, kFloat, 1, group, side.handle());
           side.wait();
           int code;
           nccl.state(group, &code);
           return code == kRemoteError && is_garbage(data) && nccl.abort(group) == kSuccess;
         }) == 2);
  // An abort ends what waits for a peer.
  EXPECT(ranks(2, [](const Nccl& nccl, int rank, Id id) {
           void* group = nullptr;
           if (nccl.init(&group, 2, id, rank)) return false;
           if (rank == 1) return usleep(500000), true;
           Side side;
           std::vector<float> data(5), later(5);
           nccl.recv(data.data(), 5, kFloat, 1, group, side.handle());
           nccl.recv(later.data(), 5, kFloat, 1, group, side.handle());
           usleep(50000);
           return nccl.abort(group) == kSuccess && is_garbage(data) && is_garbage(later);
         }) == 2);
}

void in_progress() {
  EXPECT(ranks(2, [](const Nccl& nccl, int rank, Id id) {
           void* group = nullptr;
           Config config;
           if (rank == 1) usleep(200000);
           const auto begun = std::chrono::steady_clock::now();
           if (nccl.init_config(&group, 2, id, rank, &config) != kInProgress || !group) return false;
           if (std::chrono::steady_clock::now() - begun > std::chrono::milliseconds(100)) return false;
           Side side;
           std::vector<float> data{1, 2};
           if (rank == 0 &&
               nccl.all_reduce(data.data(), data.data(), 2, kFloat, kSum, group, side.handle()) != kInvalidArgument)
             return false;
           if (nccl.settled(group) != kSuccess) return false;
           int told = 0;
           for (int i = 0; i < 4; ++i) {
             const int code = nccl.all_reduce(data.data(), data.data(), 2, kFloat, kSum, group, side.handle());
             told += code == kInProgress;
             if (code != kSuccess && code != kInProgress) return false;
             if (nccl.settled(group) != kSuccess) return false;
             side.wait();
           }
           if (told != 2 || data != std::vector<float>{16, 32}) return false;
           const int code = nccl.finalize(group);
           return (code == kSuccess || code == kInProgress) && nccl.settled(group) == kSuccess &&
                  nccl.destroy(group) == kSuccess;
         }) == 2);
  // Nobody comes: an abort ends it.
  EXPECT(ranks(1, [](const Nccl& nccl, int rank, Id id) {
           void* group = nullptr;
           const Config config;
           int code = 0;
           if (nccl.init_config(&group, 2, id, rank, &config) != kInProgress) return false;
           usleep(100000);
           return nccl.state(group, &code) == kSuccess && code == kInProgress && nccl.abort(group) == kSuccess;
         }) == 1);
  Id id;
  Nccl nccl;
  void* group;
  Config wrong;
  wrong.magic = 0;
  EXPECT(nccl.unique_id(&id) == kSuccess && nccl.init_config(&group, 1, id, 0, &wrong) == kInvalidArgument);
  // A communicator takes memory of the device; here there is enough for two.
  void* more[3];
  Id ids[3];
  for (auto& each : ids) nccl.unique_id(&each);
  EXPECT(nccl.init(&more[0], 1, ids[0], 0) == kSuccess && nccl.init(&more[1], 1, ids[1], 0) == kSuccess);
  EXPECT(nccl.init(&more[2], 1, ids[2], 0) == kUnhandledCuda && nccl.destroy(more[0]) == kSuccess);
  EXPECT(nccl.init(&more[2], 1, ids[2], 0) == kSuccess);
}

void management() {
  auto nvml = [](const char* name) { return dlsym(dlopen("libnvidia-ml.so.1", RTLD_NOW), name); };
  auto init = reinterpret_cast<int (*)()>(nvml("nvmlInit_v2"));
  const char* mode = std::getenv("REHEARSAL_NVML");
  constexpr int kVersionMismatch = 18;
  if (mode) {
    EXPECT(init() == kVersionMismatch);
    return;
  }
  struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
  } memory;
  unsigned count, now, pending, is_slice;
  int version;
  char text[96];
  void *device, *slice;
  EXPECT(init() == 0 && reinterpret_cast<int (*)(unsigned*)>(nvml("nvmlDeviceGetCount_v2"))(&count) == 0 && count == 2);
  auto handle = reinterpret_cast<int (*)(unsigned, void**)>(nvml("nvmlDeviceGetHandleByIndex_v2"));
  EXPECT(handle(1, &device) == 0 && handle(2, &slice) == 2);
  auto uuid = reinterpret_cast<int (*)(void*, char*, unsigned)>(nvml("nvmlDeviceGetUUID"));
  EXPECT(uuid(device, text, sizeof text) == 0 && std::strcmp(text, "GPU-5a1e0000-0000-4000-8000-000000000001") == 0);
  auto name = reinterpret_cast<int (*)(void*, char*, unsigned)>(nvml("nvmlDeviceGetName"));
  EXPECT(name(device, text, sizeof text) == 0 && std::strcmp(text, "NVIDIA H200") == 0);
  auto info = reinterpret_cast<int (*)(void*, void*)>(nvml("nvmlDeviceGetMemoryInfo_v2"));
  EXPECT(info(device, &memory) == 0 && memory.total == 256 << 20 && memory.used == 16 << 20 &&
         memory.free == 240 << 20);
  EXPECT(reinterpret_cast<int (*)(int*)>(nvml("nvmlSystemGetCudaDriverVersion_v2"))(&version) == 0 && version == 12040);
  EXPECT(reinterpret_cast<int (*)(char*, unsigned)>(nvml("nvmlSystemGetDriverVersion"))(text, sizeof text) == 0 &&
         std::strcmp(text, "550.54.14") == 0);
  EXPECT(reinterpret_cast<int (*)(void*, unsigned*, unsigned*)>(nvml("nvmlDeviceGetMigMode"))(device, &now, &pending) ==
             0 &&
         now == 1);
  EXPECT(reinterpret_cast<int (*)(void*, unsigned, void**)>(nvml("nvmlDeviceGetMigDeviceHandleByIndex"))(device, 3,
                                                                                                         &slice) == 0);
  EXPECT(reinterpret_cast<int (*)(void*, unsigned*)>(nvml("nvmlDeviceIsMigDeviceHandle"))(slice, &is_slice) == 0 &&
         is_slice == 1);
  EXPECT(name(slice, text, sizeof text) == 0 && std::strcmp(text, "NVIDIA H200 MIG 1g.18gb") == 0);
  EXPECT(info(slice, &memory) == 0 && memory.total == 32 << 20);
}

}  // namespace check
