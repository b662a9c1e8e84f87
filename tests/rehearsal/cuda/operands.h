// Device tensors as the kernels here see them, and what CUDA's kernels refuse.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.h"

namespace stand_in {

using at::Tensor;

// CPU tensors over the memory of device tensors; what shares a storage goes on sharing one.
class HostViews {
 public:
  Tensor of(const Tensor& tensor);
  // The same for a device tensor; a host tensor is itself.
  Tensor on_host(const Tensor& tensor) { return tensor.is_cuda() ? of(tensor) : tensor; }
  // Brings back what a kernel did to the shapes and storages of its outputs.
  void finish();
  // The device tensor for what a kernel returned.
  Tensor back(const Tensor& result, Device device);

 private:
  struct Pair {
    c10::Storage device, host;
    const void* before;
  };
  std::map<c10::StorageImpl*, Pair> storages_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// Raises what the CUDA kernels raise for operands on several devices.
class DeviceCheck {
 public:
  explicit DeviceCheck(const std::string& name);
  void see(const Tensor& tensor, const std::string& argument);
  std::optional<Device> common() const { return common_; }

 private:
  const std::string& name_;
  bool lenient_, indices_;
  std::optional<Device> common_;
};

// Raises what CUDA does where an operator has no deterministic form and one is asked for (determinism.cc). Its arguments
// are on the stack from `begin`.
void check_determinism(const std::string& name, const torch::jit::Stack& stack, size_t begin);

}  // namespace stand_in
