// Loops over rows of f32 numbers, each compiled for several instruction sets and chosen when the program starts.
#pragma once
#include <cstdint>

namespace echelon::kernels {

// y = x / rms(x) * weight, rows of `width`; keeps 1 / rms per row.
void rms_norm(const float* x, const float* weight, float* y, float* inverse_rms, int64_t rows, int64_t width, float eps);
// dx, and adds into dweight [width].
void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* inverse_rms, float* dx,
                       float* dweight, int64_t rows, int64_t width);

// Rotates rows [heads, 2 * half] by cos and sin [half] of their row; `sign` -1 rotates back. x may be strided by row.
void rotate(const float* x, int64_t row_stride, const float* cos, const float* sin, float* y, int64_t rows, int64_t heads,
            int64_t half, float sign);

// y = gate * sigmoid(gate) * up.
void swiglu(const float* gate, const float* up, float* y, int64_t n);
void swiglu_backward(const float* dy, const float* gate, const float* up, float* dgate, float* dup, int64_t n);

}  // namespace echelon::kernels
