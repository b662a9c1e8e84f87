// Devices as a program meets them: memory, what processes share, waits, losses, what is visible.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/AllocatorConfig.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/version.h>

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "check.h"

namespace check {
namespace {

constexpr int64_t kMiB = 1 << 20;
const auto kCuda = at::kCUDA;

c10::DeviceAllocator& allocator() { return *c10::getDeviceAllocator(kCuda); }
int64_t allocated() { return allocator().getDeviceStats(0).allocated_bytes[0].current; }
int64_t reserved() { return allocator().getDeviceStats(0).reserved_bytes[0].current; }
int64_t segments_now() { return allocator().getDeviceStats(0).segment[0].current; }
int64_t free_now() { return static_cast<int64_t>(allocator().getMemoryInfo(0).first); }
int64_t total() { return static_cast<int64_t>(allocator().getMemoryInfo(0).second); }
at::Tensor bytes(int64_t count) { return at::empty({count}, at::TensorOptions().device(kCuda).dtype(at::kByte)); }
int num_devices() { return c10::impl::VirtualGuardImpl(kCuda).deviceCount(); }

// The exit status of `body` in a process that begins before this one has used a device; -1 when a signal ended it.
template <class Body>
int in_process(Body body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

void versions() {
  constexpr uint64_t kMade = (2ull << 56) | (11ull << 48);
  auto told = [](uint64_t version) {
    std::printf("   libtorch %d.%d\n", int(version >> 56), int(version >> 48 & 255));
  };
  if ((aoti_torch_abi_version() ^ kMade) >> 48)
    std::printf("the stand-ins are made for libtorch 2.11; at run time it is:\n"), told(aoti_torch_abi_version());
  EXPECT((TORCH_ABI_VERSION ^ kMade) >> 48 == 0);
  EXPECT((aoti_torch_abi_version() ^ kMade) >> 48 == 0);
}

void segments() {
  EXPECT(reserved() == 0 && free_now() == total());
  {
    auto small = bytes(1), also_small = bytes(513);
    EXPECT(allocated() == 512 + 1024 && reserved() == 2 * kMiB && free_now() == total() - 2 * kMiB);
    auto stats = allocator().getDeviceStats(0);
    EXPECT(stats.allocated_bytes[1].current == 1536 && stats.allocated_bytes[2].current == 0);
    EXPECT(stats.requested_bytes[0].current == 514 && stats.inactive_split_bytes[0].current == 2 * kMiB - 1536);
    auto middle = bytes(3 * kMiB), second = bytes(4 * kMiB);
    EXPECT(reserved() == 22 * kMiB && segments_now() == 2);  // both in one segment of 20 MiB
    // The rest of the segment, 13 MiB, does not take it: one of its own of 14 MiB, too little of which is left to split.
    auto large = bytes(13 * kMiB + 1);
    EXPECT(reserved() == 36 * kMiB && allocated() == 1536 + 7 * kMiB + 14 * kMiB);
    auto fits = bytes(13 * kMiB - 512);
    EXPECT(reserved() == 36 * kMiB && allocated() == 1536 + 34 * kMiB);
  }
  EXPECT(allocated() == 0 && reserved() == 36 * kMiB && segments_now() == 3);
  {
    auto again = bytes(20 * kMiB);
    EXPECT(reserved() == 36 * kMiB);  // blocks merge in their segment
  }
  {
    auto held = bytes(5 * kMiB);  // in the smallest that fits, which it keeps
    allocator().emptyCache({0, 0});
    EXPECT(reserved() == 14 * kMiB && segments_now() == 1 && free_now() == total() - 14 * kMiB);
  }
  allocator().emptyCache({0, 0});
  EXPECT(reserved() == 0 && free_now() == total());

  // What is cached is given back before an error.
  {
    auto one = bytes(90 * kMiB), two = bytes(90 * kMiB);
  }
  auto other = bytes(200 * kMiB);
  EXPECT(reserved() == 200 * kMiB && allocator().getDeviceStats(0).num_alloc_retries == 1);
  EXPECT(raises(
      [] { bytes(total()); },
      "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 256.00 MiB of which 56.00 MiB "
      "is free. Including non-PyTorch memory, this process has 200.00 MiB memory in use. Of the allocated memory "
      "200.00 MiB is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If reserved but "
      "unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"));
  EXPECT(raises([] { bytes(total()); }, "(stand-in)") && allocator().getDeviceStats(0).num_ooms == 2);
  auto nan = at::empty({1 << 20}, at::TensorOptions().device(kCuda));
  EXPECT(nan.isnan().all().item<bool>());
}

void pages() {
  EXPECT(c10::CachingAllocator::AcceleratorAllocatorConfig::use_expandable_segments());
  auto a = bytes(3 * kMiB);
  EXPECT(reserved() == 20 * kMiB);
  auto b = bytes(30 * kMiB), c = bytes(10 * kMiB);
  EXPECT(reserved() == 60 * kMiB && segments_now() == 1);
  b.reset();
  {
    auto larger = bytes(40 * kMiB);  // the gap does not take it: behind what there is
    EXPECT(reserved() == 100 * kMiB && segments_now() == 1);
    auto in_gap = bytes(29 * kMiB);
    EXPECT(reserved() == 100 * kMiB);
  }
  allocator().emptyCache({0, 0});
  EXPECT(reserved() == 60 * kMiB);  // the gap keeps pages that others are in: 20 of its 30 MiB
  a.reset(), c.reset();
  auto tiny = bytes(100);
  EXPECT(reserved() == 62 * kMiB && segments_now() == 2);
  allocator().emptyCache({0, 0});
  EXPECT(reserved() == 2 * kMiB && segments_now() == 1);
  tiny.reset();
  allocator().emptyCache({0, 0});
  EXPECT(reserved() == 0 && segments_now() == 0 && free_now() == total());
  // A segment may take all of the card, whatever was in it before.
  {
    auto first = bytes(100 * kMiB), second = bytes(100 * kMiB);
  }
  EXPECT(bytes(220 * kMiB).numel() == 220 * kMiB && allocator().getDeviceStats(0).num_alloc_retries == 0);
  EXPECT(raises([] { bytes(300 * kMiB); }, "CUDA out of memory"));
  EXPECT(at::ones({1 << 20}, at::TensorOptions().device(kCuda)).sum().item<float>() == 1 << 20);
}

void shared() {
  int ready[2], done[2];
  if (pipe(ready) || pipe(done)) return;
  const pid_t child = fork();
  if (child == 0) {
    auto held = bytes(100 * kMiB);
    char byte = 1;
    if (write(ready[1], &byte, 1) != 1 || read(done[0], &byte, 1) != 1) _exit(1);
    for (;;) pause();
  }
  char byte;
  EXPECT(read(ready[0], &byte, 1) == 1);
  EXPECT(free_now() == total() - 100 * kMiB - 16 * kMiB);  // REHEARSAL_FOREIGN_BYTES
  const std::string other = "Process " + std::to_string(child) + " has 100.00 MiB memory in use. ";
  EXPECT(raises([] { bytes(150 * kMiB); }, other.c_str()));
  kill(child, SIGKILL);
  while (free_now() != total() - 16 * kMiB) usleep(10000);  // a zombie holds nothing
  EXPECT(bytes(150 * kMiB).numel() > 0);
  int status;
  waitpid(child, &status, 0);
  EXPECT(WIFSIGNALED(status));
}

void workspaces() {
  c10::impl::VirtualGuardImpl guard(kCuda);
  EXPECT(free_now() == total() - 64 * kMiB);  // the context
  auto a = at::ones({4, 4}, at::TensorOptions().device(kCuda));
  const int64_t before = allocated();
  auto multiply = [&] { return a.mm(a).defined(); };
  EXPECT(multiply() && allocated() == before + 8 * kMiB);
  EXPECT(multiply() && allocated() == before + 8 * kMiB);
  auto stream = guard.getStreamFromGlobalPool(at::Device(kCuda, 0));
  guard.exchangeStream(stream);
  EXPECT(multiply() && allocated() == before + 16 * kMiB);
  guard.exchangeStream(guard.getDefaultStream(at::Device(kCuda, 0)));
  std::thread(multiply).join();
  EXPECT(allocated() == before + 24 * kMiB);
  std::thread(multiply).join();  // takes over the handle of the one that ended
  EXPECT(allocated() == before + 24 * kMiB);
}

void determinism() {
  auto x = at::rand({4, 5}, at::TensorOptions().device(kCuda));
  auto index = at::zeros({4, 5}, at::TensorOptions().device(kCuda).dtype(at::kLong));
  auto refused = [&](const char* name, auto body) {
    at::globalContext().setDeterministicAlgorithms(false, false);
    body();
    at::globalContext().setDeterministicAlgorithms(true, false);
    return raises(body, (std::string(name) + " does not have a deterministic implementation, but you set "
                                             "'torch.use_deterministic_algorithms(True)'")
                            .c_str());
  };
  EXPECT(refused("_histc_cuda with floating point input", [&] { at::histc(x); }));
  EXPECT(refused("median CUDA with indices output", [&] { at::median(x, 1); }));
  EXPECT(refused("scatter_reduce_cuda_prod_", [&] { x.clone().scatter_reduce_(0, index, x, "prod"); }));
  EXPECT(refused("scatter_reduce_cuda_kernel", [&] { x.clone().scatter_(0, index, x, "add"); }));
  EXPECT(refused("_bincount_cuda", [&] { at::bincount(index.view(-1), x.view(-1)); }));
  EXPECT(refused("put_", [&] { x.clone().put_(index, x); }));
  EXPECT(refused("reflection_pad1d_backward_out_cuda",
                 [&] { at::reflection_pad1d_backward(at::ones({4, 7}, x.options()), x, {1, 1}); }));
  // What has a deterministic form in 2.11.
  EXPECT(x.cumsum(1).defined() && at::bincount(index.view(-1)).defined() &&
         x.clone().scatter_add_(0, index, x).defined());
  EXPECT(x.index_add(0, index[0].slice(0, 0, 4), x).defined() && x.mm(x.t()).defined() && x.median().defined());
  EXPECT(x.clone().index_put_({index[0]}, x[0], true).defined() && std::get<0>(x.sort(1)).defined());
  at::globalContext().setDeterministicAlgorithms(false, false);
}

void polling() {
  c10::Event mark(kCuda);
  c10::impl::VirtualGuardImpl guard(kCuda);
  auto stream = guard.getDefaultStream(at::Device(kCuda, 0));
  auto x = at::ones({4}, at::TensorOptions().device(kCuda));
  mark.record(stream);
  EXPECT(!mark.query() && mark.query() && mark.query());  // launches run on, once
  c10::Event after(kCuda);
  after.record(stream);
  EXPECT(after.query());  // nothing was launched since
  x.add_(1);
  EXPECT(!guard.queryStream(stream) && guard.queryStream(stream) && guard.queryStream(stream));
  x.add_(1);
  guard.synchronizeStream(stream);
  EXPECT(guard.queryStream(stream));
  x.add_(1);
  EXPECT(x.sum().item<float>() == 16 && guard.queryStream(stream));  // `item` waited
  // On a side stream others bring the work: asked often, it is one wait.
  auto side = guard.getStreamFromGlobalPool(at::Device(kCuda, 0));
  auto submit = reinterpret_cast<void (*)(void*, void (*)(void*), void*)>(dlsym(RTLD_DEFAULT, "rehearsal_submit"));
  submit(side.native_handle(), [](void*) { usleep(100000); }, nullptr);
  c10::Event there(kCuda);
  there.record(side);
  EXPECT(!there.query() && !there.query());
  while (!there.query()) usleep(1000);
  EXPECT(there.query());
}

void lost() {
  auto x = at::ones({4}, at::TensorOptions().device(kCuda));
  int good = 0;
  auto use = [&] {
    for (; good < 1000; ++good) x.add_(1);
  };
  const char* message = "CUDA error: unspecified launch failure";
  EXPECT(raises(use, message) && good > 5 && good < 10);
  EXPECT(raises(use, message) && raises([&] { x.cpu(); }, message) && raises([&] { bytes(30 * kMiB); }, message));
  EXPECT(raises([&] { c10::impl::VirtualGuardImpl(kCuda).synchronizeDevice(0); }, message));
  EXPECT(at::ones({4}, at::TensorOptions().device(at::Device(kCuda, 1))).sum().item<float>() == 4);  // the other card
  x.reset();  // memory can be let go
  auto nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW);
  auto handle = reinterpret_cast<int (*)(unsigned, void**)>(dlsym(nvml, "nvmlDeviceGetHandleByIndex_v2"));
  void* device;
  constexpr int kIsLost = 15;
  EXPECT(handle(0, &device) == kIsLost && handle(1, &device) == 0);
}

// As many as CUDA_VISIBLE_DEVICES says.
void visible() {
  EXPECT(num_devices() == static_cast<int>(std::strtol(std::getenv("CHECK_EXPECTED"), nullptr, 10)));
  if (num_devices() == 0) EXPECT(raises([] { bytes(1); }, "No CUDA GPUs are available"));
}

void slices() {
  EXPECT(num_devices() == 1 && total() == 32 * kMiB);
  auto held = bytes(20 * kMiB);
  EXPECT(free_now() == 12 * kMiB && raises([] { bytes(13 * kMiB); }, "total capacity of 32.00 MiB"));
}

void old_driver() {
  EXPECT(num_devices() == 0);
  EXPECT(raises([] { bytes(1); }, std::getenv("CHECK_EXPECTED")));
}

}  // namespace check
