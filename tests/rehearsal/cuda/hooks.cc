// What libtorch asks of CUDA outside of operators.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <vector>

#include "stand_in.h"

namespace stand_in {
namespace {

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return num_devices() > 0; }
  bool hasCUDA() const override { return num_devices() > 0; }
  bool hasCUDART() const override { return true; }
  long versionCUDART() const override { return 13000; }
  bool hasPrimaryContext(DeviceIndex device) const override { return has_context(checked(device)); }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(num_devices()); }
  int getNumGPUs() const override { return num_devices(); }
  DeviceIndex current_device() const override { return stand_in::current_device(); }
  DeviceIndex getCurrentDevice() const override { return stand_in::current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { stand_in::current_device() = checked(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    auto before = stand_in::current_device();
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? stand_in::current_device() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_memory(); }
  Device getDeviceFromPtr(void* data) const override {
    TORCH_CHECK(on_device(data),
                "The specified pointer resides on host memory and is not registered with any CUDA device. (stand-in)");
    return Device(at::kCUDA, device_of(data));
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    static std::vector<at::Generator> all(num_devices(), at::make_generator<at::CPUGeneratorImpl>());
    return all.at(device < 0 ? stand_in::current_device() : device);
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  void deviceSynchronize(DeviceIndex device) const override { wait_for_device(device); }
  std::string showConfig() const override { return "a stand-in for CUDA"; }
};

}  // namespace
}  // namespace stand_in

namespace at {
namespace {
using stand_in::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace
}  // namespace at
