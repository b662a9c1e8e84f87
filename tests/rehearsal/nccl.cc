// A stand-in for libnccl.so.2 between processes of one host: for rehearsals and tests only. Ranks meet at Unix sockets in
// $REHEARSAL_SHARED. "Device" memory is what the stand-in for CUDA says it is; an operation runs on its stream's thread, in
// order, and is done when both ends did it. What was not received when it ends is garbage (0xff), as on a GPU.
//
//   REHEARSAL_NCCL_SILENT=1       a peer that is gone is waited for until the abort, as over NVLink; else it is an error
//                                 to ask for
//   REHEARSAL_NCCL_DELAY_US       pause before each operation (0)
//   REHEARSAL_NCCL_MEMORY         bytes that a communicator takes of its device (0)
//   REHEARSAL_NCCL_IN_PROGRESS=1  with `blocking = 0` every second operation returns ncclInProgress and is enqueued 2 ms
//                                 later
//   REHEARSAL_NCCL_VERSION        as ncclGetVersion tells it (22809)
#include <dlfcn.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Code {
  kSuccess = 0,
  kUnhandledCuda = 1,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

size_t number_from(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// ---- The stand-in for CUDA, if it is loaded ----

template <class Function>
Function cuda(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}
char* host(const void* address) {
  static auto translate = cuda<void* (*)(void*)>("rehearsal_host_address");
  return static_cast<char*>(translate ? translate(const_cast<void*>(address)) : const_cast<void*>(address));
}
bool is_lost(const void* address) {
  static auto ask = cuda<int (*)(const void*)>("rehearsal_is_lost");
  return ask && ask(address);
}
void submit(void* stream, std::function<void()> work) {
  static auto to_stream = cuda<void (*)(void*, void (*)(void*), void*)>("rehearsal_submit");
  auto run = [](void* held) {
    (*static_cast<std::function<void()>*>(held))();
    delete static_cast<std::function<void()>*>(held);
  };
  auto* held = new std::function<void()>(std::move(work));
  to_stream ? to_stream(stream, run, held) : run(held);
}

// ---- Communicators ----

struct Communicator {
  int rank, size;
  bool is_blocking = true;
  std::string meeting_place;
  std::vector<int> sockets;
  std::atomic<bool> is_joining{true}, is_aborted{false}, is_finalizing{false};
  std::atomic<int> error{kSuccess}, in_flight{0}, not_yet_enqueued{0};
  std::atomic<uint64_t> operations{0};
  int device = -1;  // of which it took memory

  ~Communicator() {
    for (int socket : sockets)
      if (socket >= 0) close(socket);
    static auto give_back = cuda<void (*)(int, size_t)>("rehearsal_give_back");
    if (device >= 0) give_back(device, number_from("REHEARSAL_NCCL_MEMORY", 0));
  }
  bool takes_memory() {
    static auto take = cuda<int (*)(size_t)>("rehearsal_take");
    const size_t bytes = number_from("REHEARSAL_NCCL_MEMORY", 0);
    if (bytes == 0 || !take) return true;
    device = take(bytes);
    return device >= 0;
  }
  int state() const {
    if (is_joining || not_yet_enqueued || (is_finalizing && in_flight)) return kInProgress;
    return error;
  }
};
using Shared = std::shared_ptr<Communicator>;
struct Handle {
  Shared shared;
};
const Shared& of(void* raw) { return static_cast<Handle*>(raw)->shared; }

sockaddr_un address_of(const Communicator& all, int rank) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const std::string path = all.meeting_place + "." + std::to_string(rank);
  path.copy(name.sun_path, sizeof name.sun_path - 1);
  return name;
}
bool is_readable(int socket) {
  pollfd waiting{socket, POLLIN, 0};
  return poll(&waiting, 1, 20) > 0;
}

// Connects with every other rank, however long they take.
int join(Communicator& all) {
  const auto here = address_of(all, all.rank);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bind(listener, reinterpret_cast<const sockaddr*>(&here), sizeof here) || listen(listener, all.size)) {
    close(listener);
    return kSystemError;
  }
  auto meet = [&] {
    for (int peer = 0; peer < all.rank; ++peer) {
      const auto there = address_of(all, peer);
      const int to = all.sockets[peer] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      while (connect(to, reinterpret_cast<const sockaddr*>(&there), sizeof there)) {
        if (all.is_aborted) return kInvalidUsage;
        usleep(2000);
      }
      if (send(to, &all.rank, sizeof all.rank, MSG_NOSIGNAL) != sizeof all.rank) return kRemoteError;
    }
    for (int missing = all.size - 1 - all.rank; missing > 0; --missing) {
      while (!is_readable(listener))
        if (all.is_aborted) return kInvalidUsage;
      const int from = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      int who = -1;
      if (read(from, &who, sizeof who) != sizeof who || who <= all.rank || who >= all.size)
        return close(from), kRemoteError;
      all.sockets[who] = from;
    }
    return kSuccess;
  };
  const int code = meet();
  close(listener);
  unlink(here.sun_path);
  return code;
}

// ---- Operations ----

struct Message {
  char* data;
  size_t length, done = 0;
};
using Lists = std::vector<std::vector<Message>>;  // by peer

// Sends to and receives from every peer at once. False: aborted, or a peer is gone.
bool exchange(Communicator& all, Lists& out, Lists& in) {
  auto& to_self = out[all.rank];
  for (size_t i = 0; i < to_self.size() && i < in[all.rank].size(); ++i) {
    auto& [data, length, done] = in[all.rank][i];
    if (data != to_self[i].data) std::memmove(data, to_self[i].data, length);
    done = length;
  }
  std::vector<size_t> next_out(all.size), next_in(all.size);
  auto is_pending = [&](const Lists& lists, std::vector<size_t>& next, int peer) {
    while (next[peer] < lists[peer].size() && lists[peer][next[peer]].done == lists[peer][next[peer]].length)
      ++next[peer];
    return next[peer] < lists[peer].size();
  };
  for (;;) {
    std::vector<pollfd> waiting;
    std::vector<int> who;
    for (int peer = 0; peer < all.size; ++peer) {
      if (peer == all.rank) continue;
      const short events =
          (is_pending(out, next_out, peer) ? POLLOUT : 0) | (is_pending(in, next_in, peer) ? POLLIN : 0);
      if (events) waiting.push_back({all.sockets[peer], events, 0}), who.push_back(peer);
    }
    if (waiting.empty()) return true;
    if (all.is_aborted) return false;
    poll(waiting.data(), waiting.size(), 20);
    for (size_t i = 0; i < waiting.size(); ++i) {
      const int peer = who[i];
      bool is_gone = waiting[i].revents & POLLERR;
      if (waiting[i].revents & POLLOUT && next_out[peer] < out[peer].size()) {
        auto& [data, length, done] = out[peer][next_out[peer]];
        const auto sent = send(waiting[i].fd, data + done, length - done, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) done += sent;
        is_gone |= sent < 0 && errno != EAGAIN;
      }
      if (waiting[i].revents & (POLLIN | POLLHUP) && next_in[peer] < in[peer].size()) {
        auto& [data, length, done] = in[peer][next_in[peer]];
        const auto got = recv(waiting[i].fd, data + done, length - done, MSG_DONTWAIT);
        if (got > 0) done += got;
        is_gone |= got == 0 || (got < 0 && errno != EAGAIN);
      }
      if (!is_gone) continue;
      if (std::getenv("REHEARSAL_NCCL_SILENT"))
        while (!all.is_aborted) usleep(10000);
      else
        all.error = kRemoteError;
      return false;
    }
  }
}

// An operation of a communicator: what `run` does on the stream, and the memory that is garbage if it does not end well.
struct Operation {
  std::function<bool(Communicator&)> run;
  std::vector<Message> results;
  const void* device_address;

  void perform(Communicator& all) const {
    usleep(number_from("REHEARSAL_NCCL_DELAY_US", 0));
    if (is_lost(device_address)) all.error = kUnhandledCuda;
    if (!all.is_aborted && all.error == kSuccess && run(all)) return;
    for (const auto& [data, length, done] : results) std::memset(data + done, 0xff, length - done);
  }
};

int enqueue(const Shared& all, void* stream, Operation operation) {
  if (all->is_aborted) return kInvalidUsage;
  if (all->state() == kInProgress) {
    std::fprintf(stderr,
                 "stand-in for NCCL: a communicator is used before its previous operation returned ncclSuccess\n");
    return kInvalidArgument;
  }
  const auto number = ++all->operations;
  ++all->in_flight;
  auto work = [all, operation = std::move(operation)] {
    operation.perform(*all);
    --all->in_flight;
  };
  static const bool is_slow = number_from("REHEARSAL_NCCL_IN_PROGRESS", 0) != 0;
  if (!is_slow || all->is_blocking || number % 2 == 0) return submit(stream, std::move(work)), kSuccess;
  ++all->not_yet_enqueued;
  std::thread([all, stream, work = std::move(work)] {
    usleep(2000);
    submit(stream, work);
    --all->not_yet_enqueued;
  }).detach();
  return kInProgress;
}

size_t width(int type) {
  switch (type) {
    case 0:
    case 1: return 1;
    case 6:
    case 9: return 2;
    case 2:
    case 3:
    case 7: return 4;
    case 4:
    case 5:
    case 8: return 8;
  }
  return 0;
}

template <class T>
void add(char* total, const char* part, size_t count) {
  for (size_t i = 0; i < count; ++i) reinterpret_cast<T*>(total)[i] += reinterpret_cast<const T*>(part)[i];
}
void add_bf16(char* total, const char* part, size_t count) {
  auto wide = [](uint16_t x) {
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (size_t i = 0; i < count; ++i) {
    auto* to = reinterpret_cast<uint16_t*>(total) + i;
    const float sum = wide(*to) + wide(reinterpret_cast<const uint16_t*>(part)[i]);
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
using Add = void (*)(char*, const char*, size_t);
Add adder(int type) {
  switch (type) {
    case 2: return add<int32_t>;
    case 4: return add<int64_t>;
    case 7: return add<float>;
    case 8: return add<double>;
    case 9: return add_bf16;
  }
  return nullptr;
}

// Sums `count` numbers of every rank, in the order of ranks: all of `from`, or the part of it that is for this rank.
int reduce(const Shared& all, void* stream, const void* from, void* to, size_t count, int type, int operation,
           bool scatters) {
  const size_t length = count * width(type);
  const auto sum = adder(type);
  constexpr int kSum = 0;
  if (operation != kSum || !sum) return kInvalidArgument;
  char *mine = host(from), *total = host(to);
  auto run = [=](Communicator& all) {
    std::vector<char> parts(length * all.size);
    Lists out(all.size), in(all.size);
    for (int peer = 0; peer < all.size; ++peer) {
      out[peer].push_back({mine + (scatters ? peer * length : 0), length});
      in[peer].push_back({parts.data() + peer * length, length});
    }
    if (!exchange(all, out, in)) return false;
    for (int rank = 1; rank < all.size; ++rank) sum(parts.data(), parts.data() + rank * length, count);
    std::memcpy(total, parts.data(), length);
    return true;
  };
  return enqueue(all, stream, {run, {{total, length}}, to});
}

struct PointToPoint {
  Shared all;
  void* stream;
  int peer;
  bool is_send;
  Message message;
  const void* device_address;
};
thread_local int depth = 0;
thread_local std::vector<PointToPoint> grouped;

int enqueue_grouped() {
  std::map<Communicator*, std::vector<PointToPoint>> by_communicator;
  for (auto& one : grouped) by_communicator[one.all.get()].push_back(std::move(one));
  grouped.clear();
  int worst = kSuccess;
  for (auto& [raw, group] : by_communicator) {
    auto lists = std::make_shared<std::pair<Lists, Lists>>(Lists(raw->size), Lists(raw->size));
    std::vector<Message> results;
    for (auto& one : group) {
      (one.is_send ? lists->first : lists->second)[one.peer].push_back(one.message);
      if (!one.is_send) results.push_back(one.message);
    }
    auto run = [lists](Communicator& all) { return exchange(all, lists->first, lists->second); };
    const int code = enqueue(group[0].all, group[0].stream, {run, results, group[0].device_address});
    if (code != kSuccess && (worst == kSuccess || worst == kInProgress)) worst = code;
  }
  return worst;
}
int point_to_point(void* raw, void* stream, int peer, bool is_send, const void* data, size_t length) {
  if (peer < 0 || peer >= of(raw)->size) return kInvalidArgument;
  grouped.push_back({of(raw), stream, peer, is_send, {host(data), length}, data});
  return depth ? kSuccess : enqueue_grouped();
}

int end(void* raw, bool aborts) {
  auto* handle = static_cast<Handle*>(raw);
  auto& all = *handle->shared;
  if (aborts || all.is_joining) all.is_aborted = true;
  while (all.in_flight || all.is_joining) usleep(1000);  // destroying waits for what is in flight, as NCCL does
  if (const char* path = std::getenv("REHEARSAL_REPORT"); path && std::strcmp(path, "-"))
    if (FILE* out = std::fopen(path, "a")) {
      std::fprintf(out, "--- stand-in for NCCL, process %d: rank %d of %d, %lu operations%s\n", getpid(), all.rank,
                   all.size, all.operations.load(), aborts ? ", aborted" : "");
      std::fclose(out);
    }
  delete handle;
  return kSuccess;
}

}  // namespace

extern "C" {

struct ncclUniqueId {
  char bytes[128];
};
// The beginning of ncclConfig_t, which has been the same since NCCL 2.14.
struct ncclConfig {
  size_t size;
  unsigned magic, version;
  int blocking;
};

int ncclGetVersion(int* version) {
  return *version = static_cast<int>(number_from("REHEARSAL_NCCL_VERSION", 22809)), kSuccess;
}
const char* ncclGetErrorString(int code) {
  const char* const names[] = {"no error",
                               "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                               "unhandled system error (run with NCCL_DEBUG=INFO for details)",
                               "internal error - please report this issue to the NCCL developers",
                               "invalid argument (run with NCCL_DEBUG=WARN for details)",
                               "invalid usage (run with NCCL_DEBUG=WARN for details)",
                               "remote process exited or there was a network error",
                               "NCCL operation in progress"};
  return code >= 0 && code < 8 ? names[code] : "unknown result code";
}
const char* ncclGetLastError(void*) { return "the stand-in for NCCL keeps no last error"; }

int ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> next{0};
  const char* folder = std::getenv("REHEARSAL_SHARED");
  if (!folder || std::strlen(folder) > 70) {
    std::fprintf(stderr, "stand-in for NCCL: REHEARSAL_SHARED must be a folder with a name of at most 70 bytes\n");
    return kSystemError;
  }
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->bytes, sizeof id->bytes, "%s/nccl.%d.%d", folder, getpid(), next++);
  return kSuccess;
}
int ncclCommInitRankConfig(void** raw, int size, ncclUniqueId id, int rank, const ncclConfig* config) {
  constexpr unsigned kMagic = 0xcafebeef;
  if (config && (config->magic != kMagic || config->size < sizeof *config)) return kInvalidArgument;
  if (size < 1 || rank < 0 || rank >= size || !std::memchr(id.bytes, 0, sizeof id.bytes)) return kInvalidArgument;
  if (config && config->blocking != INT_MIN && config->blocking != 0 && config->blocking != 1) return kInvalidArgument;
  auto all = std::make_shared<Communicator>();
  all->rank = rank, all->size = size, all->meeting_place = id.bytes;
  all->is_blocking = !config || config->blocking != 0;
  all->sockets.assign(size, -1);
  if (!all->takes_memory()) return kUnhandledCuda;
  *raw = new Handle{all};
  if (!all->is_blocking) {
    std::thread([all] {
      all->error = join(*all);
      all->is_joining = false;
    }).detach();
    return kInProgress;
  }
  const int code = join(*all);
  all->is_joining = false;
  if (code != kSuccess) delete static_cast<Handle*>(*raw), *raw = nullptr;
  return code;
}
int ncclCommInitRank(void** raw, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(raw, size, id, rank, nullptr);
}
int ncclCommGetAsyncError(void* raw, int* code) { return *code = of(raw)->state(), kSuccess; }
int ncclCommCount(void* raw, int* size) { return *size = of(raw)->size, kSuccess; }
int ncclCommUserRank(void* raw, int* rank) { return *rank = of(raw)->rank, kSuccess; }
int ncclCommFinalize(void* raw) {
  auto& all = *of(raw);
  if (all.is_joining) return kInvalidArgument;
  all.is_finalizing = true;
  while (all.is_blocking && all.in_flight) usleep(1000);
  return all.in_flight ? kInProgress : kSuccess;
}
int ncclCommDestroy(void* raw) { return end(raw, false); }
int ncclCommAbort(void* raw) { return end(raw, true); }

int ncclGroupStart() { return ++depth, kSuccess; }
int ncclGroupEnd() { return --depth || grouped.empty() ? kSuccess : enqueue_grouped(); }
int ncclSend(const void* data, size_t count, int type, int peer, void* raw, void* stream) {
  return point_to_point(raw, stream, peer, true, data, count * width(type));
}
int ncclRecv(void* data, size_t count, int type, int peer, void* raw, void* stream) {
  return point_to_point(raw, stream, peer, false, data, count * width(type));
}

int ncclAllGather(const void* from, void* to, size_t count, int type, void* raw, void* stream) {
  const size_t length = count * width(type);
  char *mine = host(from), *whole = host(to);
  auto run = [=](Communicator& all) {
    Lists out(all.size), in(all.size);
    for (int peer = 0; peer < all.size; ++peer)
      out[peer].push_back({mine, length}), in[peer].push_back({whole + peer * length, length});
    return exchange(all, out, in);
  };
  return enqueue(of(raw), stream, {run, {{whole, length * of(raw)->size}}, to});
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, void* raw, void* stream) {
  return reduce(of(raw), stream, from, to, count, type, operation, /*scatters=*/false);
}
int ncclReduceScatter(const void* from, void* to, size_t count, int type, int operation, void* raw, void* stream) {
  return reduce(of(raw), stream, from, to, count, type, operation, /*scatters=*/true);
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* raw, void* stream) {
  const size_t length = count * width(type);
  char *mine = host(from), *whole = host(to);
  auto run = [=](Communicator& all) {
    Lists out(all.size), in(all.size);
    if (all.rank != root) {
      in[root].push_back({whole, length});
    } else {
      for (int peer = 0; peer < all.size; ++peer)
        if (peer != root) out[peer].push_back({mine, length});
      if (whole != mine) std::memmove(whole, mine, length);
    }
    return exchange(all, out, in);
  };
  std::vector<Message> results;
  if (of(raw)->rank != root) results.push_back({whole, length});
  return enqueue(of(raw), stream, {run, results, to});
}
}
