// What Echelon needs of libtorch and tch does not wrap. Only at::Tensor and plain values cross.
#pragma once
#include <ATen/ATen.h>
#include <memory>
#include "rust/cxx.h"

namespace echelon {
struct Mapping;  // Rust: keeps mapped memory alive

// A tensor over memory that `owner` keeps alive; `owner` is dropped with the tensor's storage.
std::unique_ptr<at::Tensor> from_mapping(size_t address, rust::Slice<const int64_t> shape, int32_t dtype,
                                         rust::Box<Mapping> owner);
// Makes `grad` the gradient of `leaf`: backward passes then add into it in place.
void set_grad(const at::Tensor& leaf, const at::Tensor& grad);
void clear_grad(const at::Tensor& leaf);
// Backward from `output` with the incoming gradient `grad`; frees the graph.
void backward_from(const at::Tensor& output, const at::Tensor& grad);
// One AdamW step in one pass over memory; `step` is a scalar f32 tensor that counts steps.
void fused_adamw(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& step, double lr, double beta1, double beta2,
                 double weight_decay, double eps);

// A linear layer's weight [out, in] laid out for products with `rows` rows; undefined where this build has no such layout.
std::unique_ptr<at::Tensor> pack_linear(const at::Tensor& weight, int64_t rows);
// x [rows, in] times the packed weight, plus `bias` where it is defined.
std::unique_ptr<at::Tensor> packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight,
                                          const at::Tensor& bias, int64_t rows);

// A flat tensor of zeros whose memory is taken page by page when first touched.
std::unique_ptr<at::Tensor> zeros_on_demand(int64_t numel, int32_t dtype);

void install_cpu_allocator();
size_t live_bytes();
size_t peak_bytes();
void reset_peak_bytes();
// Bytes of the blocks that tensors are in, rounding included, and of the freed ones kept for later.
size_t taken_bytes();
// Bytes of mapped memory that tensors are wrapped around.
size_t mapped_bytes();
// Live and peak of a device whose caching allocator keeps count (CUDA).
size_t device_live_bytes(int32_t cuda_index);
size_t device_peak_bytes(int32_t cuda_index);
void device_reset_peak_bytes(int32_t cuda_index);
}  // namespace echelon
