// Operators compute as on the CPU, and refuse what CUDA refuses.
#include <ATen/ATen.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/cuda.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cstdio>
#include <thread>

#include "check.h"

namespace check {
namespace {

at::Tensor host(const at::Tensor& t) { return t.to(at::kCPU); }
bool near(const at::Tensor& a, const at::Tensor& b) { return at::allclose(host(a), host(b), 1e-5, 1e-6); }
int64_t live() { return c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(0).allocated_bytes[0].current; }

}  // namespace

void operators() {
  auto cuda = at::TensorOptions().device(at::kCUDA), cpu = at::TensorOptions();
  EXPECT(torch::cuda::is_available() && torch::cuda::device_count() >= 1);
  auto a = at::randn({5, 7}, cpu), b = at::randn({7, 3}, cpu);
  auto A = a.to(at::kCUDA), B = b.to(at::kCUDA);
  EXPECT(A.is_cuda() && A.device().index() == 0 && live() == 1024);
  EXPECT(near(A.matmul(B), a.matmul(b)));
  EXPECT(near(at::linear(A, B.t(), at::ones({3}, cuda)), at::linear(a, b.t(), at::ones({3}))));
  EXPECT(near(A.t().contiguous().view({-1}), a.t().contiguous().view({-1})));
  EXPECT(near((A + 1).mul_(2).exp().sum(), (a + 1).mul_(2).exp().sum()));
  EXPECT(A.narrow(0, 1, 2).data_ptr() == static_cast<char*>(A.data_ptr()) + 7 * 4);
  {  // in place through views
    auto x = A.clone(), y = a.clone();
    x.narrow(1, 2, 3).fill_(4), y.narrow(1, 2, 3).fill_(4);
    x.select(0, 1).copy_(x.select(0, 0)), y.select(0, 1).copy_(y.select(0, 0));
    x.index_put_({at::tensor({0, 2}, cuda.dtype(at::kLong))}, at::zeros({2, 7}, cuda));
    y.index_put_({at::tensor({0, 2})}, at::zeros({2, 7}));
    EXPECT(near(x, y));
  }
  {  // outputs that grow
    auto out = at::empty({0}, cuda), expected = at::empty({0});
    at::mm_out(out, A, B), at::mm_out(expected, a, b);
    EXPECT(near(out, expected) && out.is_cuda());
    auto [values, order] = A.sort(1);
    EXPECT(near(values, std::get<0>(a.sort(1))) && order.is_cuda());
    EXPECT(near(std::get<0>(A.topk(2, 1)), std::get<0>(a.topk(2, 1))));
  }
  EXPECT(near(at::cat({A, A}, 0), at::cat({a, a}, 0)));
  EXPECT(near(A.index_select(0, at::tensor({3, 1}, cuda.dtype(at::kLong))), a.index_select(0, at::tensor({3, 1}))));
  EXPECT(near(A.cumsum(1), a.cumsum(1)));
  auto sums = a.abs().cumsum(1), targets = at::rand({5, 1});
  EXPECT(at::searchsorted(sums.to(at::kCUDA), targets.to(at::kCUDA)).cpu().equal(at::searchsorted(sums, targets)));
  EXPECT(near(A.softmax(-1), a.softmax(-1)) && near(A.log_softmax(-1), a.log_softmax(-1)));
  EXPECT(near(A.masked_fill(A > 0, 1), a.masked_fill(a > 0, 1)) &&
         near(at::where(A > 0, A, 0), at::where(a > 0, a, 0)));
  EXPECT(A.to(at::kBFloat16).scalar_type() == at::kBFloat16 &&
         near(A.to(at::kBFloat16).to(at::kFloat), a.to(at::kBFloat16).to(at::kFloat)));
  EXPECT(at::arange(5, cuda.dtype(at::kLong)).cpu().equal(at::arange(5)) && at::full({2}, 3, cuda).is_cuda());
  EXPECT(A.sum().item<float>() == a.sum().item<float>() && at::nonzero(A > 0).is_cuda() && A.cpu().is_cpu());
  EXPECT(near(at::embedding(B, at::tensor({1, 0}, cuda.dtype(at::kLong))), at::embedding(b, at::tensor({1, 0}))));
  EXPECT(A.unbind(0).size() == 5 && A.split(2).size() == 3 && A.view({7, 5}).is_alias_of(A));

  {  // autograd; the backward pass is on a thread of the device's
    struct Where : torch::autograd::Function<Where> {
      static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) { return x.clone(); }
      static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                     torch::autograd::variable_list g) {
        thread() = std::this_thread::get_id();
        return {g[0]};
      }
      static std::thread::id& thread() {
        static std::thread::id id;
        return id;
      }
    };
    auto run = [&](at::Tensor x, at::Tensor w) {
      x = x.detach().clone().set_requires_grad(true), w = w.detach().clone().set_requires_grad(true);
      auto y = (Where::apply(x.matmul(w)).tanh() * 2).pow(2);
      auto loss = at::nll_loss(y.log_softmax(-1),
                               at::tensor({0, 1, 2, 1, 0}, at::TensorOptions().dtype(at::kLong).device(x.device()))) +
                  at::layer_norm(x, {7}).sum() * 0.1;
      torch::autograd::backward({loss}, {});
      return std::vector{loss.detach(), x.grad(), w.grad()};
    };
    auto on_cuda = run(A, B);
    bool elsewhere = Where::thread() != std::this_thread::get_id();
    auto on_cpu = run(a, b);
    for (int i = 0; i < 3; ++i) EXPECT(near(on_cuda[i], on_cpu[i]) && on_cuda[i].is_cuda());
    EXPECT(elsewhere && Where::thread() == std::this_thread::get_id());
  }
  {  // attention, with and without a mask, and its gradient
    auto attention = [&](at::Device device, bool masked) {
      at::manual_seed(3);
      auto q = at::randn({2, 4, 6, 8}).to(device).set_requires_grad(true), k = at::randn({2, 2, 6, 8}).to(device),
           v = at::randn({2, 2, 6, 8}).to(device);
      auto mask = at::zeros({2, 1, 1, 6}, q.options())
                      .masked_fill(at::arange(6, q.options().dtype(at::kLong)).ge(4), -INFINITY);
      auto out = at::scaled_dot_product_attention(q, k, v, masked ? std::optional(mask.detach()) : std::nullopt, 0.0,
                                                  !masked, std::nullopt, true);
      torch::autograd::backward({out.sum()}, {});
      return std::pair(out.detach(), q.grad());
    };
    for (bool masked : {false, true}) {
      auto x = attention(at::kCUDA, masked), y = attention(at::kCPU, masked);
      EXPECT(near(x.first, y.first) && near(x.second, y.second));
    }
  }
  {  // AdamW
    auto step = [&](at::Device device) {
      auto options = at::TensorOptions().device(device);
      auto p = at::ones({9}, options), g = at::full({9}, 0.5, options), m = at::zeros({9}, options),
           v = at::zeros({9}, options), t = at::ones({}, options);
      at::_fused_adamw_({p}, {g}, {m}, {v}, {}, {t}, 1e-2, 0.9, 0.99, 0.1, 1e-8, false, false);
      return at::cat({p, m, v});
    };
    EXPECT(near(step(at::kCUDA), step(at::kCPU)));
    auto p = at::ones({9}, cuda);
    EXPECT(raises(
        [&] { at::_fused_adamw_({p}, {p}, {p}, {p}, {}, {at::ones({})}, 1e-2, 0.9, 0.99, 0.1, 1e-8, false, false); },
        "same device"));
  }
  {  // pinned memory and copies that do not wait
    auto pinned = at::empty({4}, cpu.pinned_memory(true));
    EXPECT(pinned.is_pinned() && !a.is_pinned() && a.pin_memory().is_pinned());
    pinned.copy_(at::ones({4}, cuda), true);
    EXPECT(pinned.sum().item<float>() == 4 && pinned.to(at::kCUDA, /*non_blocking=*/true).is_cuda());
    EXPECT(A.to(at::kCPU, /*non_blocking=*/true).is_pinned());
  }
  // Operands on two devices
  EXPECT(raises([&] { A.matmul(b); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { a.matmul(B); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { A + a; }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { at::cat({A, a}); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { A.index_select(0, at::tensor({1})); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { A.gather(0, at::zeros({1, 7}, at::kLong)); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { at::embedding(B, at::tensor({1})); }, "Expected all tensors to be on the same device"));
  EXPECT(raises([&] { a.index({at::tensor({1}, cuda.dtype(at::kLong))}); }, "indices should be either on cpu"));
  EXPECT(raises([&] { A.masked_fill(a > 0, 1); }, "same device"));
  EXPECT(raises([&] { A.add_(a); }, "same device"));
  EXPECT(raises([&] { a.add_(A); }, "same device"));
  EXPECT(raises([&] { at::where(A > 0, a, A); }, "same device"));
  EXPECT(near(A * at::scalar_tensor(2.0f), a * 2) && near(A.index({at::tensor({1})}), a.index({at::tensor({1})})));
  EXPECT(raises([&] { at::empty({1 << 30}, cuda.dtype(at::kDouble)); }, "CUDA out of memory"));
  {  // memory comes back; peaks are kept; storages empty and fill again
    int64_t before = live();
    auto* allocator = c10::getDeviceAllocator(at::kCUDA);
    allocator->resetPeakStats(0);
    {
      auto big = at::zeros({1 << 20}, cuda);
    }
    EXPECT(live() == before && allocator->getDeviceStats(0).allocated_bytes[0].peak == before + (4 << 20));
    auto flat = at::ones({100}, cuda), part = flat.narrow(0, 50, 10);
    auto* storage = flat.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(c10::GetAllocator(at::kCUDA)->allocate(0)), storage->set_nbytes(0);
    EXPECT(live() == before);
    storage->set_data_ptr_noswap(c10::GetAllocator(at::kCUDA)->allocate(400)), storage->set_nbytes(400);
    flat.fill_(3);
    EXPECT(part.sum().item<float>() == 30 && at::isnan(at::empty({100}, cuda)).any().item<bool>());
  }
  {  // streams and events
    c10::impl::VirtualGuardImpl guard(at::kCUDA);
    auto side = guard.getStreamFromGlobalPool(at::Device(at::kCUDA, 0));
    auto submit = reinterpret_cast<void (*)(void*, void (*)(void*), void*)>(dlsym(RTLD_DEFAULT, "rehearsal_submit"));
    EXPECT(submit && side.native_handle());
    submit(side.native_handle(), [](void*) { usleep(100000); }, nullptr);
    c10::Event mark(at::kCUDA);
    mark.record(side);
    EXPECT(!mark.query());
    mark.synchronize();
    EXPECT(mark.query());
  }
  if (torch::cuda::device_count() > 1) {
    auto other = a.to(at::Device(at::kCUDA, 1));
    EXPECT(other.device().index() == 1 && near(other.to(at::kCUDA), a) && near(other + 1, a + 1) &&
           (other + 1).device().index() == 1);
    EXPECT(raises([&] { A + other; }, "same device") && raises([&] { A.matmul(other.t()); }, "same device"));
  }
  {  // the host may not touch it
    pid_t child = fork();
    if (child == 0) {
      volatile float x = *static_cast<float*>(A.data_ptr());
      (void)x;
      _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
  }
}

}  // namespace check
