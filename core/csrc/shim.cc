#include "shim.h"

#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
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

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

std::unique_ptr<at::Tensor> pack_with_mkl(const at::Tensor& weight, int64_t rows) {
  at::NoGradGuard no_grad;
  auto pack = cpu_operator(kMklPack);
  if (!weight.device().is_cpu() || weight.scalar_type() != at::kFloat || !pack || !cpu_operator(kMklLinear))
    return std::make_unique<at::Tensor>();
  // MKL asks for up to four times the weights' memory, and touches one to two times.
  Reserving reserving;
  return std::make_unique<at::Tensor>(pack->typed<at::Tensor(const at::Tensor&, int64_t)>().call(weight, rows));
}

std::unique_ptr<at::Tensor> pack_with_onednn(const at::Tensor& weight, int64_t rows) {
  at::NoGradGuard no_grad;
  auto pack = cpu_operator(kOneDnnPack);
  const bool has_layout = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16;
  if (!weight.device().is_cpu() || !has_layout || !pack || !cpu_operator(kOneDnnLinear))
    return std::make_unique<at::Tensor>();
  using Pack = at::Tensor(const at::Tensor&, std::optional<int64_t>);
  return std::make_unique<at::Tensor>(pack->typed<Pack>().call(weight, rows));
}

std::unique_ptr<at::Tensor> linear_with_mkl(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight,
                                            const at::Tensor& bias, int64_t rows) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            int64_t);
  at::NoGradGuard no_grad;
  auto linear = cpu_operator(kMklLinear)->typed<Linear>();
  return std::make_unique<at::Tensor>(linear.call(x, packed, weight, if_defined(bias), rows));
}

std::unique_ptr<at::Tensor> linear_with_onednn(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  at::NoGradGuard no_grad;
  auto linear = cpu_operator(kOneDnnLinear)->typed<Linear>();
  c10::List<std::optional<at::Scalar>> no_scalars;
  return std::make_unique<at::Tensor>(linear.call(x, packed, if_defined(bias), "none", no_scalars, std::nullopt));
}

rust::String torch_build() { return at::show_config(); }

}  // namespace echelon
