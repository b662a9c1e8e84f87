// A CPU allocator that counts what is live and keeps what is freed: fresh pages cost more than the work done on them.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "shim.h"

namespace echelon {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeepFrom = size_t{1} << 16;   // smaller blocks are malloc's business
constexpr size_t kKeepAtLeast = size_t{1} << 28;

// What tensors hold, the most of it at once since the last reset and ever, and what the blocks that they are in and
// those kept for later take.
std::atomic<size_t> live{0}, peak{0}, most{0}, taken{0};

void raise_to(std::atomic<size_t>& highest, size_t now) {
  for (size_t seen = highest.load(); now > seen && !highest.compare_exchange_weak(seen, now);) {
  }
}

void count(size_t bytes) {
  size_t now = live += bytes;
  raise_to(peak, now);
  raise_to(most, now);
}

// Sizes are rounded up to eighths of a power of two, so that blocks of nearly equal size replace each other.
size_t size_class(size_t bytes) {
  if (bytes < kKeepFrom) return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  size_t step = (size_t{1} << (63 - __builtin_clzll(bytes))) / 8;
  return (bytes + step - 1) / step * step;
}

class FreeBlocks {
 public:
  void* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(size);
    if (found == blocks_.end() || found->second.empty()) return nullptr;
    void* block = found->second.back();
    found->second.pop_back();
    kept_ -= size;
    return block;
  }
  // Keeps at most a quarter of what was ever live: what a phase needed is there for the next, and no more.
  bool keep(void* block, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (kept_ + size > std::max(kKeepAtLeast, most.load() / 4)) return false;
    blocks_[size].push_back(block);
    kept_ += size;
    return true;
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& entry : blocks_)
      for (void* block : entry.second) std::free(block);
    taken -= kept_;
    blocks_.clear();
    kept_ = 0;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> blocks_;
  size_t kept_ = 0;
};

FreeBlocks& free_blocks() {
  static auto* blocks = new FreeBlocks;
  return *blocks;
}

// A block begins with its size and the bytes that were asked for; the data follows on the next alignment boundary. Data
// and context are one pointer, which is what libtorch's raw_allocate asks for.
struct Header {
  size_t size, bytes;
};

void release(void* data) {
  if (data == nullptr) return;
  void* block = static_cast<char*>(data) - kAlignment;
  auto [size, bytes] = *static_cast<Header*>(block);
  live -= bytes;
  if (size >= kKeepFrom && free_blocks().keep(block, size)) return;
  std::free(block);
  taken -= size;
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    size_t size = size_class(bytes + kAlignment);
    void* block = size >= kKeepFrom ? free_blocks().take(size) : nullptr;
    if (block == nullptr) block = fresh(size);
    *static_cast<Header*>(block) = {size, bytes};
    count(bytes);
    void* data = static_cast<char*>(block) + kAlignment;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void* fresh(size_t size) {
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, size) != 0) {
      free_blocks().release();
      TORCH_CHECK(posix_memalign(&data, kAlignment, size) == 0, "out of memory: ", size, " bytes wanted, ", live.load(),
                  " bytes live in tensors");
    }
    taken += size;
    return data;
  }
};

}  // namespace

void install_cpu_allocator() {
  static auto* allocator = new CountingAllocator;
  c10::SetCPUAllocator(allocator, /*priority=*/100);
}
size_t live_bytes() { return live.load(); }
size_t peak_bytes() { return peak.load(); }
void reset_peak_bytes() { peak = live.load(); }
size_t taken_bytes() { return taken.load(); }

}  // namespace echelon

#include <ATen/ATen.h>
#include <sys/mman.h>

namespace echelon {

// The kernel gives zero pages when they are first touched: state that a run may never use costs nothing at its start.
std::unique_ptr<at::Tensor> zeros_on_demand(int64_t numel, int32_t dtype) {
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(dtype)).device(at::kCPU);
  size_t bytes = std::max<size_t>(numel * options.dtype().itemsize(), 1);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(data != MAP_FAILED, "out of memory: ", bytes, " bytes wanted");
  count(bytes);
  taken += bytes;
  auto unmap = [bytes](void* data) {
    munmap(data, bytes);
    live -= bytes;
    taken -= bytes;
  };
  return std::make_unique<at::Tensor>(at::from_blob(data, {numel}, unmap, options));
}

}  // namespace echelon
