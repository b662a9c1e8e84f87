// What Echelon needs of a CUDA device beside tensors: which one is current, its memory, and host memory that it copies
// from at full speed. Through libtorch's device-generic interfaces and the CUDA runtime that libtorch loads: no CUDA headers.
#pragma once
#include <ATen/ATen.h>
#include <memory>
#include "rust/cxx.h"

namespace echelon {

// Makes the device the calling thread's current one.
void set_current_device(int32_t cuda_index);

// Bytes in tensors: now, and at most since the last reset.
size_t device_live_bytes(int32_t cuda_index);
size_t device_peak_bytes(int32_t cuda_index);
void device_reset_peak_bytes(int32_t cuda_index);
// Bytes that the caching allocator holds of the device, those in tensors among them.
size_t device_reserved_bytes(int32_t cuda_index);
// Bytes of the device that nobody holds, and all of them.
size_t device_free_bytes(int32_t cuda_index);
size_t device_total_bytes(int32_t cuda_index);
// Gives blocks that no tensor is in back to the device, for other processes and libraries.
void device_give_back_kept(int32_t cuda_index);

// A flat tensor of zeros in page-locked host memory: exactly its bytes, in whole pages. libtorch's own allocator for such
// memory takes the next power of two, and keeps what is freed.
std::unique_ptr<at::Tensor> pinned_zeros(int64_t numel, int32_t dtype);
// Bytes of it that are live.
size_t pinned_bytes();

// Operators without a deterministic form on the device throw from now on, and those with one use it.
void use_deterministic_algorithms(bool wanted);
}  // namespace echelon
