// The fallback: an operator without a kernel here runs the CPU's, on the memory behind the device tensors.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_set>

#include "operands.h"

namespace stand_in {
namespace {

using Names = std::unordered_set<std::string>;

// Operators whose CUDA kernels take numbers from the host and check devices themselves.
const auto& kUnchecked = *new Names{
#include "unchecked.inc"
};
const auto& kTakesHostIndices = *new Names{"aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_",
                                           "aten::_index_put_impl_", "aten::index_put"};
// Operators whose result the host needs before it goes on.
const auto& kWaits = *new Names{"aten::equal",       "aten::nonzero",
                                "aten::nonzero.out", "aten::masked_select",
                                "aten::_unique2",    "aten::is_nonzero",
                                "aten::_unique",     "aten::masked_select.out",
                                "aten::bincount",    "aten::repeat_interleave.Tensor"};
const auto& kMultipliesMatrices = *new Names{"aten::mm",          "aten::mm.out",   "aten::addmm",
                                             "aten::addmm.out",   "aten::addmm_",   "aten::_addmm_activation",
                                             "aten::bmm",         "aten::bmm.out",  "aten::baddbmm",
                                             "aten::baddbmm.out", "aten::baddbmm_", "aten::addmv",
                                             "aten::addmv.out",   "aten::addmv_",   "aten::mv",
                                             "aten::dot",         "aten::vdot",     "aten::addbmm"};

std::string full_name(const c10::OperatorHandle& op) {
  auto name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// A device tensor over a storage.
Tensor wrapped(const c10::Storage& storage, const Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                         c10::DispatchKeySet(c10::DispatchKey::CUDA), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// Calls `visit` on every tensor among the arguments.
template <class Visit>
void for_each_tensor(const c10::FunctionSchema& schema, const torch::jit::Stack& stack, size_t begin, Visit visit) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& value = stack[begin + i];
    const auto& argument = schema.arguments()[i].name();
    if (value.isTensor()) {
      visit(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) visit(tensor, argument);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        if (tensor) visit(*tensor, argument);
    }
  }
}

// The argument as the CPU's kernel takes it.
void bring_to_host(HostViews& views, c10::IValue& value, Device& device) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = views.on_host(value.toTensor());
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors)
      if (tensor.defined()) tensor = views.on_host(tensor);
    value = tensors;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      tensors.push_back(tensor && tensor->defined() ? std::optional<Tensor>(views.on_host(*tensor)) : tensor);
    value = tensors;
  } else if (value.isDevice() && value.toDevice().is_cuda()) {
    if (value.toDevice().has_index()) device = value.toDevice();
    value = Device(at::kCPU);
  }
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = full_name(op);
  const size_t num_arguments = schema.arguments().size(), begin = stack->size() - num_arguments;
  DeviceCheck check(name);
  std::string shapes;
  for_each_tensor(schema, *stack, begin, [&](const Tensor& tensor, const std::string& argument) {
    check.see(tensor, argument);
    if (trace() && tensor.defined()) shapes += c10::str(" ", tensor.sizes());
  });
  check_determinism(name, *stack, begin);

  HostViews views;
  Device device(at::kCUDA, current_device());
  if (check.common() && check.common()->is_cuda()) device = *check.common();
  for (size_t i = 0; i < num_arguments; ++i) bring_to_host(views, (*stack)[begin + i], device);
  count_launch(device.index(), name + shapes);
  if (kMultipliesMatrices.count(name)) take_workspace(device.index());
  if (kWaits.count(name)) count_wait_for_launches(device.index(), name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  views.finish();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = views.back(value.toTensor(), device);
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = views.back(tensor, device);
      value = tensors;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace

Tensor HostViews::of(const Tensor& tensor) {
  auto* device_storage = tensor.storage().unsafeGetStorageImpl();
  auto found = storages_.find(device_storage);
  if (found == storages_.end()) {
    auto* kept = new c10::Storage(tensor.storage());
    c10::DataPtr data(
        host_address(device_storage->mutable_data()), kept,
        [](void* storage) { delete static_cast<c10::Storage*>(storage); }, Device(at::kCPU));
    c10::Storage host(c10::make_intrusive<c10::StorageImpl>(
        c10::StorageImpl::use_byte_size_t(), device_storage->nbytes(), std::move(data), c10::GetAllocator(at::kCPU),
        /*resizable=*/true));
    found = storages_.emplace(device_storage, Pair{tensor.storage(), host, host.data()}).first;
  }
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second.host),
                                                       c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  pairs_.emplace_back(tensor, view);
  return view;
}

void HostViews::finish() {
  for (auto& [device_storage, pair] : storages_) {
    if (pair.host.data() == pair.before) continue;
    c10::DeviceGuard guard(pair.device.device());
    auto fresh = device_memory().allocate(pair.host.nbytes());
    if (pair.host.nbytes()) std::memcpy(host_address(fresh.get()), pair.host.data(), pair.host.nbytes());
    pair.device.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    pair.device.unsafeGetStorageImpl()->set_nbytes(pair.host.nbytes());
  }
  for (auto& [tensor, view] : pairs_)
    if (tensor.sizes() != view.sizes() || tensor.strides() != view.strides())
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
}

Tensor HostViews::back(const Tensor& result, Device device) {
  if (!result.defined() || !result.device().is_cpu()) return result;
  for (auto& [tensor, view] : pairs_)
    if (view.is_same(result)) return tensor;
  for (auto& [device_storage, pair] : storages_)
    if (result.storage().unsafeGetStorageImpl() == pair.host.unsafeGetStorageImpl())
      return wrapped(pair.device, result);
  c10::OptionalDeviceGuard guard(device);
  auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  Tensor copy = at::detail::empty_strided_generic(dense.sizes(), dense.strides(), &device_memory(),
                                                  c10::DispatchKeySet(c10::DispatchKey::CUDA), dense.scalar_type());
  if (dense.numel()) std::memcpy(host_address(copy.mutable_data_ptr()), dense.const_data_ptr(), dense.nbytes());
  return copy;
}

DeviceCheck::DeviceCheck(const std::string& name)
    : name_(name), lenient_(kUnchecked.count(name) > 0), indices_(kTakesHostIndices.count(name) > 0) {}

void DeviceCheck::see(const Tensor& tensor, const std::string& argument) {
  if (!tensor.defined()) return;
  if (lenient_ && tensor.device().is_cpu() && tensor.dim() == 0) return;
  if (indices_ && argument == "indices" && tensor.device().is_cpu()) {
    count(kMixedIndex, name_);
    count(kHostToDevice, "index from the host", tensor.nbytes());
    count_wait_for_launches(common_ && common_->is_cuda() ? common_->index() : current_device(), "index from the host");
    return;
  }
  if (!common_) common_ = tensor.device();
  if (*common_ == tensor.device()) return;
  TORCH_CHECK(!indices_ || argument != "indices",
              "indices should be either on cpu or on the same device as the indexed tensor (", *common_,
              ") (stand-in)");
  TORCH_CHECK(!lenient_, "Expected all tensors to be on the same device, but found at least two devices, ", *common_,
              " and ", tensor.device(), "! (", name_, ", ", argument, ") (stand-in)");
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", argument, " is on ", tensor.device(),
              ", different from other tensors on ", *common_, " (when checking argument in method wrapper_CUDA_", name_,
              ") (stand-in)");
}

}  // namespace stand_in
