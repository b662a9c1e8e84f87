// What Echelon needs of libtorch and tch does not wrap. Only at::Tensor and plain values cross.
#pragma once
#include <ATen/ATen.h>
#include <memory>
#include <vector>
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

// A linear layer's weight [out, in] laid out for products with `rows` rows. Undefined where this build of libtorch has no
// such layout for its dtype; throws where this processor lacks what the layout needs.
std::unique_ptr<at::Tensor> pack_with_mkl(const at::Tensor& weight, int64_t rows);
std::unique_ptr<at::Tensor> pack_with_onednn(const at::Tensor& weight, int64_t rows);
// x [rows, in] times the packed weight, plus `bias` where it is defined.
std::unique_ptr<at::Tensor> linear_with_mkl(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight,
                                            const at::Tensor& bias, int64_t rows);
std::unique_ptr<at::Tensor> linear_with_onednn(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias);

// A flat tensor of zeros whose memory is taken page by page when first touched.
std::unique_ptr<at::Tensor> zeros_on_demand(int64_t numel, int32_t dtype);
// Takes all of that memory at once, for somebody who reads it before writing: a page that is read first is mapped to the
// kernel's zero page, and copied later with a flush of every core's address cache.
void take_pages(const at::Tensor& tensor);

void install_cpu_allocator();
// While it lives, this thread's tensors get address space instead of memory; at its end they are counted by the pages
// that were touched. For libraries that ask for several times what they use.
class Reserving {
 public:
  Reserving();
  ~Reserving();
  Reserving(const Reserving&) = delete;

 private:
  std::vector<void*> blocks_;
};
size_t live_bytes();
size_t peak_bytes();
void reset_peak_bytes();
// Bytes of the blocks that tensors are in, rounding included, and of the freed ones kept for later.
size_t taken_bytes();
// Gives the blocks that are kept for later back to the system.
void give_back_kept();
// Bytes of mapped memory that tensors are wrapped around.
size_t mapped_bytes();
// How libtorch was built.
rust::String torch_build();
}  // namespace echelon
