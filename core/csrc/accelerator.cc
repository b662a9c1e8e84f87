#include "accelerator.h"

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

namespace echelon {
namespace {

c10::Device cuda(int32_t index) { return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)}; }

c10::DeviceAllocator* allocator() { return c10::getDeviceAllocator(c10::DeviceType::CUDA); }

auto statistics(int32_t index) { return allocator()->getDeviceStats(static_cast<c10::DeviceIndex>(index)); }

constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

std::atomic<size_t> pinned{0};

// Of the CUDA runtime that libtorch has loaded; null where there is none.
template <class Function>
Function runtime(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

// Pages that the device may read and write by itself. Without the runtime they stay ordinary ones: copies are slower then,
// and nothing else changes.
bool lock_pages(void* data, size_t bytes) {
  static const auto lock = runtime<int (*)(void*, size_t, unsigned)>("cudaHostRegister");
  constexpr unsigned kForEveryDevice = 1;  // cudaHostRegisterPortable
  return lock != nullptr && lock(data, bytes, kForEveryDevice) == 0;
}

void unlock_pages(void* data) {
  static const auto unlock = runtime<int (*)(void*)>("cudaHostUnregister");
  if (unlock != nullptr) (void)unlock(data);
}

}  // namespace

void set_current_device(int32_t cuda_index) {
  c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).setDevice(cuda(cuda_index));
}

size_t device_live_bytes(int32_t cuda_index) { return statistics(cuda_index).allocated_bytes[kAll].current; }
size_t device_peak_bytes(int32_t cuda_index) { return statistics(cuda_index).allocated_bytes[kAll].peak; }
void device_reset_peak_bytes(int32_t cuda_index) {
  allocator()->resetPeakStats(static_cast<c10::DeviceIndex>(cuda_index));
}
size_t device_reserved_bytes(int32_t cuda_index) { return statistics(cuda_index).reserved_bytes[kAll].current; }
size_t device_free_bytes(int32_t cuda_index) {
  return allocator()->getMemoryInfo(static_cast<c10::DeviceIndex>(cuda_index)).first;
}
size_t device_total_bytes(int32_t cuda_index) {
  return allocator()->getMemoryInfo(static_cast<c10::DeviceIndex>(cuda_index)).second;
}
void device_give_back_kept(int32_t cuda_index) {
  c10::DeviceGuard guard(cuda(cuda_index));
  allocator()->emptyCache();
}

std::unique_ptr<at::Tensor> pinned_zeros(int64_t numel, int32_t dtype) {
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype)).device(at::kCPU);
  static const size_t page = sysconf(_SC_PAGESIZE);
  const size_t wanted = std::max<size_t>(numel * options.dtype().itemsize(), 1);
  const size_t bytes = (wanted + page - 1) / page * page;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(data != MAP_FAILED, "out of host memory: ", bytes, " bytes wanted for what leaves the device");
  const bool locked = lock_pages(data, bytes);
  pinned += bytes;
  auto release = [bytes, locked](void* data) {
    if (locked) unlock_pages(data);
    munmap(data, bytes);
    pinned -= bytes;
  };
  return std::make_unique<at::Tensor>(at::from_blob(data, {numel}, release, options));
}

size_t pinned_bytes() { return pinned.load(); }

void use_deterministic_algorithms(bool wanted) {
  auto& context = at::globalContext();
  context.setDeterministicAlgorithms(wanted, /*warn_only=*/false);
  // Filling every new tensor with NaN is for finding faults in operators, and costs a pass over memory each.
  context.setDeterministicFillUninitializedMemory(false);
  if (context.hasCUDA()) {
    context.setDeterministicCuDNN(wanted);
    context.setBenchmarkCuDNN(false);
  }
}

}  // namespace echelon
