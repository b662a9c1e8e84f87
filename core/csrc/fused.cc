#include "fused.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels.h"

namespace echelon {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kWorthAThread = 1 << 14;  // numbers

// Runs `part(index, parts)` on the threads of libtorch's own OpenMP, so that no second pool competes with it.
template <class Part>
void in_parallel(int64_t parts, const Part& part) {
  using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const auto thread = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static const auto team = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (parts == 1 || !region || !thread || !team || at::in_parallel_region()) {
    for (int64_t index = 0; index < parts; ++index) part(index, parts);
    return;
  }
  std::pair<int64_t, const Part*> shared{parts, &part};
  auto body = [](void* data) {
    auto [parts, part] = *static_cast<std::pair<int64_t, const Part*>*>(data);
    for (int64_t index = thread(); index < parts; index += team()) (*part)(index, parts);
  };
  region(body, &shared, static_cast<unsigned>(parts), 0);
}

int64_t parts_for(int64_t rows, int64_t width) {
  int64_t worth = rows * width / kWorthAThread;
  return std::max<int64_t>(1, std::min<int64_t>({at::get_num_threads(), rows, worth}));
}

struct Rows {
  int64_t begin, count;
};
Rows rows_of(int64_t index, int64_t parts, int64_t rows) {
  int64_t begin = rows * index / parts;
  return {begin, rows * (index + 1) / parts - begin};
}

struct RmsNorm : Function<RmsNorm> {
  static Variable forward(AutogradContext* ctx, const Variable& input, const Variable& weight, double eps) {
    auto x = input.contiguous();
    int64_t width = x.size(-1), rows = x.numel() / std::max<int64_t>(width, 1);
    auto y = at::empty_like(x), inverse_rms = at::empty({rows}, x.options());
    in_parallel(parts_for(rows, width), [&](int64_t index, int64_t parts) {
      auto [begin, count] = rows_of(index, parts, rows);
      kernels::rms_norm(x.const_data_ptr<float>() + begin * width, weight.const_data_ptr<float>(),
                        y.mutable_data_ptr<float>() + begin * width, inverse_rms.mutable_data_ptr<float>() + begin,
                        count, width, static_cast<float>(eps));
    });
    ctx->save_for_backward({x, weight, inverse_rms});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[1], &inverse_rms = saved[2];
    auto dy = grads[0].contiguous();
    int64_t width = x.size(-1), rows = x.numel() / std::max<int64_t>(width, 1);
    int64_t parts = parts_for(rows, width);
    auto dx = at::empty_like(x), dweight = at::zeros({parts, width}, x.options());
    in_parallel(parts, [&](int64_t index, int64_t parts) {
      auto [begin, count] = rows_of(index, parts, rows);
      kernels::rms_norm_backward(dy.const_data_ptr<float>() + begin * width, x.const_data_ptr<float>() + begin * width,
                                 weight.const_data_ptr<float>(), inverse_rms.const_data_ptr<float>() + begin,
                                 dx.mutable_data_ptr<float>() + begin * width,
                                 dweight.mutable_data_ptr<float>() + index * width, count, width);
    });
    return {dx, dweight.sum(0), Variable()};
  }
};

at::Tensor rotated(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  bool rows_only = input.stride(2) == 1 && input.stride(1) == input.size(2);
  auto x = rows_only ? input : input.contiguous();
  int64_t rows = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  auto y = at::empty({rows, heads, 2 * half}, x.options());
  in_parallel(parts_for(rows, heads * 2 * half), [&](int64_t index, int64_t parts) {
    auto [begin, count] = rows_of(index, parts, rows);
    kernels::rotate(x.const_data_ptr<float>() + begin * x.stride(0), x.stride(0),
                    cos.const_data_ptr<float>() + begin * half, sin.const_data_ptr<float>() + begin * half,
                    y.mutable_data_ptr<float>() + begin * heads * 2 * half, count, heads, half, sign);
  });
  return y;
}

struct Rotate : Function<Rotate> {
  static Variable forward(AutogradContext* ctx, const Variable& x, const Variable& cos, const Variable& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1.0f);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    return {rotated(grads[0], saved[0], saved[1], -1.0f), Variable(), Variable()};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static Variable forward(AutogradContext* ctx, const Variable& gate_in, const Variable& up_in) {
    auto gate = gate_in.contiguous(), up = up_in.contiguous();
    auto y = at::empty_like(gate);
    in_parallel(parts_for(gate.numel(), 1), [&](int64_t index, int64_t parts) {
      auto [begin, count] = rows_of(index, parts, gate.numel());
      kernels::swiglu(gate.const_data_ptr<float>() + begin, up.const_data_ptr<float>() + begin,
                      y.mutable_data_ptr<float>() + begin, count);
    });
    ctx->save_for_backward({gate, up});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const auto &gate = saved[0], &up = saved[1];
    auto dy = grads[0].contiguous();
    auto dgate = at::empty_like(gate), dup = at::empty_like(up);
    in_parallel(parts_for(gate.numel(), 1), [&](int64_t index, int64_t parts) {
      auto [begin, count] = rows_of(index, parts, gate.numel());
      kernels::swiglu_backward(dy.const_data_ptr<float>() + begin, gate.const_data_ptr<float>() + begin,
                               up.const_data_ptr<float>() + begin, dgate.mutable_data_ptr<float>() + begin,
                               dup.mutable_data_ptr<float>() + begin, count);
    });
    return {dgate, dup};
  }
};

void check(bool fits, const char* what) { TORCH_CHECK(fits, what); }

bool is_f32_on_cpu(const at::Tensor& x) { return x.device().is_cpu() && x.scalar_type() == at::kFloat; }

}  // namespace

std::unique_ptr<at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check(is_f32_on_cpu(x) && is_f32_on_cpu(weight) && weight.is_contiguous() && weight.numel() == x.size(-1),
        "rms_norm: f32 x [..., H] and weight [H] on the CPU");
  return std::make_unique<at::Tensor>(RmsNorm::apply(x, weight, eps));
}

std::unique_ptr<at::Tensor> rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  auto table = [&](const at::Tensor& t) {
    return is_f32_on_cpu(t) && t.is_contiguous() && t.numel() == x.size(0) * (x.size(2) / 2);
  };
  check(x.dim() == 3 && x.size(2) % 2 == 0 && is_f32_on_cpu(x) && table(cos) && table(sin),
        "rotate: f32 x [N, heads, D] and tables [N, 1, D / 2] on the CPU");
  return std::make_unique<at::Tensor>(Rotate::apply(x, cos, sin));
}

std::unique_ptr<at::Tensor> swiglu(const at::Tensor& gate, const at::Tensor& up) {
  check(is_f32_on_cpu(gate) && is_f32_on_cpu(up) && gate.sizes() == up.sizes(),
        "swiglu: f32 gate and up of one shape on the CPU");
  return std::make_unique<at::Tensor>(SwiGlu::apply(gate, up));
}

}  // namespace echelon
