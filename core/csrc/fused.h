// Layers whose many passes over memory are one here, with their gradients: f32 on the CPU.
#pragma once
#include <ATen/ATen.h>
#include <memory>

namespace echelon {

// x [..., H] / rms(x) * weight [H].
std::unique_ptr<at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
// x [N, heads, D] rotated by cos and sin [N, 1, D / 2], halves as pairs.
std::unique_ptr<at::Tensor> rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);
// gate * sigmoid(gate) * up, same shapes.
std::unique_ptr<at::Tensor> swiglu(const at::Tensor& gate, const at::Tensor& up);

}  // namespace echelon
