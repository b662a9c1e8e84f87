// cuBLAS's workspaces, as libtorch takes them from its allocator: one for each handle and stream that multiplied matrices,
// kept to the end of the process. A thread has a handle of its own, which the next one takes over when it ends.
//
//   REHEARSAL_WORKSPACE   bytes of each (0; on an H100 or later libtorch takes 32 MiB, on others 8)
#include <map>
#include <mutex>
#include <tuple>

#include "stand_in.h"

namespace stand_in {
namespace {

auto& mutex = *new std::mutex;
auto& idle_handles = *new std::map<DeviceIndex, std::vector<int>>;
auto& workspaces = *new std::map<std::tuple<DeviceIndex, int, c10::StreamId>, c10::DataPtr>;
int handles_made = 0;

struct Handles {
  std::map<DeviceIndex, int> of;
  ~Handles() {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto [device, handle] : of) idle_handles[device].push_back(handle);
  }
};

}  // namespace

void take_workspace(DeviceIndex device) {
  static const size_t bytes = number_from("REHEARSAL_WORKSPACE", 0);
  if (bytes == 0) return;
  thread_local Handles mine;
  std::lock_guard<std::mutex> lock(mutex);
  auto [found, is_new] = mine.of.try_emplace(device, 0);
  if (is_new) {
    auto& idle = idle_handles[device];
    if (idle.empty()) idle.push_back(handles_made++);
    found->second = idle.back();
    idle.pop_back();
  }
  auto& workspace = workspaces[{device, found->second, current_stream(device)}];
  if (workspace) return;
  auto before = current_device();
  current_device() = device;
  workspace = device_memory().allocate(bytes);
  current_device() = before;
}

}  // namespace stand_in
