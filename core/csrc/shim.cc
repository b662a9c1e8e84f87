#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/autograd.h>

#include "echelon-core/src/shim.rs.h"

namespace echelon {

std::unique_ptr<at::Tensor> from_mapping(size_t address, rust::Slice<const int64_t> shape, int32_t dtype,
                                         rust::Box<Mapping> owner) {
  auto guard = std::make_shared<rust::Box<Mapping>>(std::move(owner));
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype)).device(at::kCPU);
  auto tensor = at::from_blob(reinterpret_cast<void*>(address), at::IntArrayRef(shape.data(), shape.size()),
                              [guard](void*) mutable { guard.reset(); }, options);
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

}  // namespace echelon
