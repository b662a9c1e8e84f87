#include "kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

namespace echelon::kernels {
namespace {

constexpr int64_t kLanes = 16;  // sums run in this many lanes, so that they can be vectorised and have one order

inline float sum(const float* lanes) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// e^x to about 2 ulp: 2^n times a polynomial of the rest (Cephes' coefficients).
inline __attribute__((always_inline)) float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  float n = __builtin_rintf(x * 1.44269504088896341f);
  float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  float value = p * rest * rest + rest + 1.0f;
  int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return value * power;
}

inline __attribute__((always_inline)) float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace

FOR_EVERY_CPU void rms_norm(const float* x, const float* weight, float* y, float* inverse_rms, int64_t rows,
                            int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    for (; i < width; ++i) lanes[0] += x[i] * x[i];
    float inverse = 1.0f / std::sqrt(sum(lanes) / static_cast<float>(width) + eps);
    inverse_rms[row] = inverse;
    for (i = 0; i < width; ++i) y[i] = x[i] * inverse * weight[i];
  }
}

FOR_EVERY_CPU void rms_norm_backward(const float* dy, const float* x, const float* weight, const float* inverse_rms,
                                     float* dx, float* dweight, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, dy += width, x += width, dx += width) {
    float inverse = inverse_rms[row];
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        lanes[lane] += dy[i + lane] * weight[i + lane] * x[i + lane];
    for (; i < width; ++i) lanes[0] += dy[i] * weight[i] * x[i];
    float along = sum(lanes) * inverse * inverse * inverse / static_cast<float>(width);
    for (i = 0; i < width; ++i) {
      dx[i] = dy[i] * weight[i] * inverse - x[i] * along;
      dweight[i] += dy[i] * x[i] * inverse;
    }
  }
}

FOR_EVERY_CPU void rotate(const float* x, int64_t row_stride, const float* cos, const float* sin, float* y, int64_t rows,
                          int64_t heads, int64_t half, float sign) {
  for (int64_t row = 0; row < rows; ++row, x += row_stride, cos += half, sin += half)
    for (int64_t head = 0; head < heads; ++head, y += 2 * half) {
      const float* in = x + head * 2 * half;
      for (int64_t i = 0; i < half; ++i) {
        float left = in[i], right = in[i + half], s = sign * sin[i];
        y[i] = left * cos[i] - right * s;
        y[i + half] = right * cos[i] + left * s;
      }
    }
}

FOR_EVERY_CPU void swiglu(const float* gate, const float* up, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

FOR_EVERY_CPU void swiglu_backward(const float* dy, const float* gate, const float* up, float* dgate, float* dup,
                                   int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    float s = sigmoid(gate[i]);
    dup[i] = dy[i] * gate[i] * s;
    dgate[i] = dy[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
  }
}

}  // namespace echelon::kernels
