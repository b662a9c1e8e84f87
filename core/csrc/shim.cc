#include "shim.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>

#include "echelon-core/src/shim.rs.h"

namespace echelon {

namespace {
std::atomic<size_t> mapped{0};
}

size_t mapped_bytes() { return mapped.load(); }

std::unique_ptr<at::Tensor> from_mapping(size_t address, rust::Slice<const int64_t> shape, int32_t dtype,
                                         rust::Box<Mapping> owner) {
  auto guard = std::make_shared<rust::Box<Mapping>>(std::move(owner));
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype)).device(at::kCPU);
  at::IntArrayRef sizes(shape.data(), shape.size());
  size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  auto release = [guard, bytes](void*) mutable {
    guard.reset();
    mapped -= bytes;
  };
  mapped += bytes;
  auto tensor = at::from_blob(reinterpret_cast<void*>(address), sizes, release, options);
  return std::make_unique<at::Tensor>(std::move(tensor));
}

void set_grad(const at::Tensor& leaf, const at::Tensor& grad) { leaf.mutable_grad() = grad; }

void clear_grad(const at::Tensor& leaf) { leaf.mutable_grad().reset(); }

void backward_from(const at::Tensor& output, const at::Tensor& grad) {
  torch::autograd::backward({output}, {grad}, /*retain_graph=*/false, /*create_graph=*/false);
}

void fused_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& step, double lr, double beta1, double beta2,
                 double weight_decay, double eps) {
  at::NoGradGuard no_grad;
  at::_fused_adamw_({param}, {grad}, {exp_avg}, {exp_avg_sq}, {}, {step}, lr, beta1, beta2, weight_decay, eps,
                    /*amsgrad=*/false, /*maximize=*/false);
}

namespace {
auto device_bytes(int32_t cuda_index) {
  auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(cuda_index));
  return stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
}
}  // namespace

size_t device_live_bytes(int32_t cuda_index) { return device_bytes(cuda_index).current; }
size_t device_peak_bytes(int32_t cuda_index) { return device_bytes(cuda_index).peak; }
void device_reset_peak_bytes(int32_t cuda_index) {
  c10::getDeviceAllocator(c10::DeviceType::CUDA)->resetPeakStats(static_cast<c10::DeviceIndex>(cuda_index));
}

namespace {
constexpr auto kMklPack = "mkl::_mkl_reorder_linear_weight";
constexpr auto kMklLinear = "mkl::_mkl_linear";
constexpr auto kOneDnnPack = "mkldnn::_reorder_linear_weight";
constexpr auto kOneDnnLinear = "mkldnn::_linear_pointwise";

// The operator, where it is registered and runs on the CPU: not every build of libtorch has MKL and oneDNN.
std::optional<c10::OperatorHandle> cpu_operator(const char* name) {
  auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!found || !found->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
  return found;
}

// MKL's layout is the faster one on Intel's processors alone, and takes several times the weights' memory on others. The
// choice follows from the machine, not from a measurement: the same run gives the same bits again.
bool packs_with_mkl(const at::Tensor& weight) {
  if (weight.scalar_type() != at::kFloat) return false;
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
#else
  static const bool intel = false;
#endif
  return intel && cpu_operator(kMklPack) && cpu_operator(kMklLinear);
}

}  // namespace

std::unique_ptr<at::Tensor> pack_linear(const at::Tensor& weight, int64_t rows) {
  at::NoGradGuard no_grad;
  using Mkl = at::Tensor(const at::Tensor&, int64_t);
  using OneDnn = at::Tensor(const at::Tensor&, std::optional<int64_t>);
  at::Tensor packed;
  const bool has_layout = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16;
  if (!weight.device().is_cpu() || !has_layout) return std::make_unique<at::Tensor>();
  if (packs_with_mkl(weight)) {
    packed = cpu_operator(kMklPack)->typed<Mkl>().call(weight, rows);
  } else {
    auto pack = cpu_operator(kOneDnnPack);
    if (pack && cpu_operator(kOneDnnLinear)) packed = pack->typed<OneDnn>().call(weight, rows);
  }
  return std::make_unique<at::Tensor>(std::move(packed));
}

std::unique_ptr<at::Tensor> packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight,
                                          const at::Tensor& bias, int64_t rows) {
  using Mkl = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         int64_t);
  using OneDnn = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  at::NoGradGuard no_grad;
  std::optional<at::Tensor> added;
  if (bias.defined()) added = bias;
  auto out = packs_with_mkl(weight)
                 ? cpu_operator(kMklLinear)->typed<Mkl>().call(x, packed, weight, added, rows)
                 : cpu_operator(kOneDnnLinear)->typed<OneDnn>().call(
                       x, packed, added, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt);
  return std::make_unique<at::Tensor>(std::move(out));
}

}  // namespace echelon
