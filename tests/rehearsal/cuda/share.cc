// What this process takes of a card beside others, and the loss of a card.
//
//   REHEARSAL_CAPACITY      bytes of each card (2 GiB)
//   REHEARSAL_FOREIGN_BYTES of them held by programs that are not rehearsed (0)
//   REHEARSAL_CONTEXT       bytes that a process's first use of a device takes (0; CUDA's is some 500 MB)
//   REHEARSAL_FAIL_AFTER    launches, counted over all processes, after which the card REHEARSAL_FAIL_DEVICE (0) is lost
#include <c10/util/Exception.h>

#include <sys/file.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

#include "../cards.h"
#include "stand_in.h"

namespace stand_in {
namespace {

auto& mutex = *new std::mutex;

// Between processes: the kernel lets go of the lock of one that is killed.
struct Lock {
  Lock() : here(mutex) {
    static const int kept = [] {
      const char* folder = std::getenv("REHEARSAL_SHARED");
      return folder ? open((std::string(folder) + "/lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    }();
    file = kept;
    if (file >= 0) flock(file, LOCK_EX);
  }
  ~Lock() {
    if (file >= 0) flock(file, LOCK_UN);
  }
  std::lock_guard<std::mutex> here;
  int file;
};

// Under the lock. The places of the dead are taken over.
RehearsalProcess& mine() {
  static RehearsalProcess* kept = nullptr;
  static int owner = 0;
  if (owner == getpid()) return *kept;
  auto* cards = shared_cards();
  for (auto& process : cards->processes) {
    if (process.pid != 0 && began_at(process.pid) == process.began) continue;
    std::fill(std::begin(process.held), std::end(process.held), 0);
    process.began = began_at(getpid());
    __atomic_store_n(&process.pid, getpid(), __ATOMIC_RELEASE);
    kept = &process, owner = getpid();
    return process;
  }
  TORCH_CHECK(false, "stand-in: more than ", int{kMostProcesses}, " processes in one rehearsal");
}

std::array<std::atomic<bool>, kMostUnits> contexts{};

bool is_lost(int unit) { return __atomic_load_n(&shared_cards()->lost[card_of_unit(unit)], __ATOMIC_RELAXED) != 0; }

}  // namespace

bool take(DeviceIndex device, size_t bytes) {
  int unit = unit_of(device);
  Lock lock;
  if (free_of(unit) < bytes) return false;
  __atomic_fetch_add(&mine().held[unit], bytes, __ATOMIC_RELAXED);
  return true;
}
void give_back(DeviceIndex device, size_t bytes) {
  Lock lock;
  __atomic_fetch_sub(&mine().held[unit_of(device)], bytes, __ATOMIC_RELAXED);
}
size_t free_bytes(DeviceIndex device) { return free_of(unit_of(device)); }
size_t held_here(DeviceIndex device) {
  Lock lock;
  return mine().held[unit_of(device)];
}
std::vector<std::pair<int, size_t>> holders(DeviceIndex device) {
  std::vector<std::pair<int, size_t>> all;
  Lock lock;
  for (auto& process : shared_cards()->processes)
    if (size_t held = process.held[unit_of(device)]; process.pid && held && began_at(process.pid) == process.began)
      all.emplace_back(process.pid, held);
  return all;
}

bool has_context(DeviceIndex device) { return contexts[unit_of(device)]; }

void use(DeviceIndex device) {
  int unit = unit_of(checked(device));
  if (is_lost(unit)) raise_cuda(719, "unspecified launch failure", "cudaErrorLaunchFailure");
  static auto& making = *new std::mutex;
  if (contexts[unit]) return;
  std::lock_guard<std::mutex> lock(making);
  if (contexts[unit]) return;
  if (!take(device, number_from("REHEARSAL_CONTEXT", 0))) raise_cuda(2, "out of memory", "cudaErrorMemoryAllocation");
  contexts[unit] = true;
}

void use_for_launch(DeviceIndex device) {
  static const size_t last = number_from("REHEARSAL_FAIL_AFTER", 0), failing = number_from("REHEARSAL_FAIL_DEVICE", 0);
  if (last) {
    int card = card_of_unit(unit_of(checked(device)));
    auto launches = __atomic_add_fetch(&shared_cards()->launches[card], 1, __ATOMIC_RELAXED);
    if (launches > last && size_t(card) == failing) __atomic_store_n(&shared_cards()->lost[card], 1, __ATOMIC_RELAXED);
  }
  use(device);
}

}  // namespace stand_in

// For the stand-in for NCCL: takes bytes of the thread's device and says which it was; -1: there are not enough.
extern "C" int rehearsal_take(size_t bytes) {
  auto device = stand_in::current_device();
  return stand_in::take(device, bytes) ? device : -1;
}
extern "C" void rehearsal_give_back(int device, size_t bytes) {
  stand_in::give_back(static_cast<c10::DeviceIndex>(device), bytes);
}
// Whether the card that this address is of is lost.
extern "C" int rehearsal_is_lost(const void* address) {
  return stand_in::on_device(address) && stand_in::is_lost(stand_in::unit_of(stand_in::device_of(address)));
}
