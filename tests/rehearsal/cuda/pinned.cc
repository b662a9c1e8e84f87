// Pinned host memory: real pages, but counted. libtorch's own rounds up to powers of two and keeps what is freed.
#include <c10/core/Allocator.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "stand_in.h"

namespace stand_in {
namespace {

size_t power_of_two(size_t n) { return n <= 1 ? n : size_t{1} << (64 - __builtin_clzll(n - 1)); }

struct Pinned {
  std::mutex mutex;
  std::map<const char*, size_t> blocks;
  size_t live = 0, rounded = 0, peak = 0, rounded_peak = 0;
};
Pinned& pinned() {
  static auto* all = new Pinned;
  return *all;
}

struct PinnedMemory final : c10::Allocator {
  static void release(void* address) {
    if (!address) return;
    auto& all = pinned();
    std::lock_guard<std::mutex> lock(all.mutex);
    auto found = all.blocks.find(static_cast<char*>(address));
    all.live -= found->second, all.rounded -= power_of_two(found->second);
    all.blocks.erase(found);
    std::free(address);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* address = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (address) {
      auto& all = pinned();
      std::lock_guard<std::mutex> lock(all.mutex);
      all.blocks[static_cast<char*>(address)] = bytes;
      all.live += bytes, all.rounded += power_of_two(bytes);
      all.peak = std::max(all.peak, all.live), all.rounded_peak = std::max(all.rounded_peak, all.rounded);
    }
    return {address, address, &PinnedMemory::release, Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedMemory::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

c10::Allocator& pinned_memory() {
  static auto* allocator = new PinnedMemory;
  return *allocator;
}
bool is_pinned(const void* address) {
  auto& all = pinned();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto next = all.blocks.upper_bound(static_cast<const char*>(address));
  return next != all.blocks.begin() && address < std::prev(next)->first + std::prev(next)->second;
}
void report_pinned(FILE* out) {
  std::fprintf(out, "%12zu bytes pinned at most, %zu as libtorch rounds them\n", pinned().peak, pinned().rounded_peak);
}

}  // namespace stand_in
