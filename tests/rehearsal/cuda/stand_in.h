// What the parts of the stand-in for libtorch_cuda.so share. For rehearsals and tests only: its kernels run on the CPU.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace stand_in {

using c10::Device;
using c10::DeviceIndex;

// ---- Settings (settings.cc) ----

size_t number_from(const char* name, size_t otherwise);
int num_devices();  // that this process sees
DeviceIndex checked(DeviceIndex device);
size_t capacity(DeviceIndex device);
int unit_of(DeviceIndex device);  // the card or slice (../cards.h)
[[noreturn]] void raise_cuda(int code, const std::string& message, const std::string& name);

// ---- What processes share of a card (share.cc) ----

// Every call on a device begins with this: it raises what CUDA does when the card is lost, and makes the context.
void use(DeviceIndex device);
void use_for_launch(DeviceIndex device);
bool has_context(DeviceIndex device);
// Takes bytes of the card for this process; false: there are not enough.
bool take(DeviceIndex device, size_t bytes);
void give_back(DeviceIndex device, size_t bytes);
size_t free_bytes(DeviceIndex device);
size_t held_here(DeviceIndex device);
std::vector<std::pair<int, size_t>> holders(DeviceIndex device);  // process ids, with what each holds

// ---- Counters and the report (report.cc) ----

enum Kind {
  kLaunch,
  kWait,
  kHostToDevice,
  kDeviceToHost,
  kOnDevice,
  kBetweenDevices,
  kPinnedCopy,
  kMixedIndex,
  kKinds
};
void count(Kind kind, const std::string& name, size_t bytes = 0);
FILE* trace();  // null unless asked for

using Frames = std::vector<void*>;
bool wants_sites();
Frames stack_here();
void report();

// ---- Device memory (memory.cc, pinned.cc) ----

// Device memory has two addresses: the one that tensors show ("bus"), which no page stands behind, so that host code that
// touches it faults in whatever thread it runs; and the one that the kernels here use.
bool on_device(const void* address);
void* host_address(void* address);  // that of host memory is itself
DeviceIndex device_of(const void* address);
size_t offset_on_device(const void* address);

c10::DeviceAllocator& device_memory();
c10::Allocator& pinned_memory();
bool is_pinned(const void* address);

struct FullestMoment {
  int64_t bytes;
  Frames where;
};
FullestMoment fullest_moment(DeviceIndex device);
void report_memory(FILE* out);
void report_pinned(FILE* out);

// ---- cuBLAS's workspaces (workspace.cc) ----

void take_workspace(DeviceIndex device);

// ---- Devices and streams (streams.cc) ----

DeviceIndex& current_device();                     // of this thread
c10::StreamId current_stream(DeviceIndex device);  // of this thread
// Kernels are launched on the current stream and waited for there.
void count_launch(DeviceIndex device, const std::string& name);
void count_wait_for_launches(DeviceIndex device, const std::string& name);
void wait_for_device(DeviceIndex device);

}  // namespace stand_in
