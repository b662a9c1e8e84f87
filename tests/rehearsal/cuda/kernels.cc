// Operators with kernels of their own: memory, views, copies, attention.
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "operands.h"

namespace stand_in {
namespace {

Device wanted(std::optional<Device> device) {
  auto found = device.value_or(Device(at::kCUDA));
  return Device(at::kCUDA, checked(found.has_index() ? found.index() : current_device()));
}
Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(wanted(device));
  return at::detail::empty_generic(size, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(wanted(device));
  return at::detail::empty_strided_generic(size, stride, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(c10::get_default_dtype_as_scalartype()));
}
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous, "stand-in: resize_ in another memory format");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (self.storage_offset() + self.numel()) * self.element_size();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (self.numel() && needed > storage->nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto fresh = device_memory().allocate(needed);
    if (storage->nbytes()) device_memory().copy_data(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(needed);
  }
  return self;
}
Tensor& set_storage_part(Tensor& self, c10::Storage storage, int64_t offset, at::IntArrayRef size,
                         at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  if (stride.data() && !stride.empty()) {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    self.unsafeGetTensorImpl()->set_storage_offset(offset);
  }
  return self;
}
Tensor& set_storage(Tensor& self, c10::Storage storage) {
  int64_t length = storage.nbytes() / self.element_size();
  return set_storage_part(self, std::move(storage), 0, {length}, {});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  c10::Storage nothing(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0,
                                                             device_memory().allocate(0), &device_memory(), true));
  return set_storage_part(self, std::move(nothing), 0, {0}, {});
}
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_same(source)) return self;
  size_t bytes = self.numel() * self.element_size();
  bool from_device = source.is_cuda(), to_device = self.is_cuda();
  const std::string what = c10::str(source.scalar_type(), " to ", self.scalar_type(), " ", self.sizes());
  if (from_device && to_device) {
    count(source.device() == self.device() ? kOnDevice : kBetweenDevices, what, bytes);
    use(source.device().index());
    count_launch(self.device().index(), "aten::copy_");
  } else {
    const DeviceIndex device = (to_device ? self : source).device().index();
    use(device);
    bool is_pinned_copy = is_pinned((to_device ? source : self).const_data_ptr());
    count(to_device ? kHostToDevice : kDeviceToHost, what, bytes);
    if (is_pinned_copy) count(kPinnedCopy, what, bytes);
    if (!non_blocking) count_wait_for_launches(device, to_device ? "copy to the device" : "copy to the host");
  }
  if (self.numel() == 0) return self;
  HostViews views;
  auto to = views.on_host(self), from = views.on_host(source);
  to.copy_(from);
  return self;
}
c10::Scalar local_scalar_dense(const Tensor& self) {
  count_wait_for_launches(self.device().index(), "item");
  count(kDeviceToHost, "item", self.element_size());
  HostViews views;
  return at::_local_scalar_dense(views.of(self));
}
Tensor view(const Tensor& self, at::IntArrayRef size) { return at::cpu::view(self, size); }
Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::cpu::_reshape_alias(self, size, stride);
}
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::cpu::unfold(self, dim, size, step);
}
void record_stream(Tensor&, c10::Stream) {}

// One kernel each way, as the GPU has it, instead of the twenty that libtorch's plain form takes.
int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                         double dropout, bool, std::optional<double>, bool) {
  auto fits = [](const Tensor& x) { return x.dim() == 4 && x.stride(3) == 1 && x.scalar_type() != at::kDouble; };
  bool one_head_count = q.size(1) == k.size(1) && k.size(1) == v.size(1);
  bool fused = fits(q) && fits(k) && fits(v) && one_head_count && dropout == 0 && q.size(3) % 4 == 0 &&
               !(mask && mask->requires_grad());
  return static_cast<int64_t>(fused ? at::SDPBackend::efficient_attention : at::SDPBackend::math);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                     const std::optional<Tensor>& bias, bool, double dropout,
                                                     bool causal, std::optional<double> scale) {
  const std::string name = "aten::_scaled_dot_product_efficient_attention";
  DeviceCheck check(name);
  check.see(q, "query"), check.see(k, "key"), check.see(v, "value");
  if (bias) check.see(*bias, "attn_bias");
  count_launch(q.device().index(), name);
  HostViews views;
  std::optional<Tensor> mask;
  if (bias) mask = views.of(*bias);
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(views.of(q), views.of(k), views.of(v), dropout,
                                                                     causal, mask, scale);
  auto nothing = [&] { return empty({}, at::kLong, {}, q.device(), {}, {}); };
  return {views.back(out, q.device()), views.back(sums, q.device()), nothing(), nothing()};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& bias, const Tensor& out,
                                                              const Tensor& sums, const Tensor&, const Tensor&,
                                                              double dropout, std::array<bool, 4>, bool causal,
                                                              std::optional<double> scale) {
  count_launch(q.device().index(), "aten::_scaled_dot_product_efficient_attention_backward");
  HostViews views;
  std::optional<Tensor> mask;
  if (bias.defined()) mask = views.of(bias);
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      views.of(grad), views.of(q), views.of(k), views.of(v), views.of(out), views.of(sums), dropout, causal, mask,
      scale);
  return {views.back(dq, q.device()), views.back(dk, q.device()), views.back(dv, q.device()), Tensor()};
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("_scaled_dot_product_efficient_attention", attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", attention_backward);
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_part);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("view", view);
  library.impl("as_strided", as_strided);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("record_stream", record_stream);
}

}  // namespace
}  // namespace stand_in

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &stand_in::choose_attention)
}
