// Page-locked host memory: libtorch's own, which rounds up to powers of two, and what programs lock themselves. Counted.
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
  size_t live = 0, peak = 0;
};
Pinned& pinned() {
  static auto* all = new Pinned;
  return *all;
}

void add(const char* address, size_t bytes) {
  auto& all = pinned();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.blocks[address] = bytes;
  all.live += bytes, all.peak = std::max(all.peak, all.live);
}
bool remove(const char* address) {
  auto& all = pinned();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.blocks.find(address);
  if (found == all.blocks.end()) return false;
  all.live -= found->second;
  all.blocks.erase(found);
  return true;
}

struct PinnedMemory final : c10::Allocator {
  static void release(void* address) {
    if (!address) return;
    remove(static_cast<char*>(address));
    std::free(address);
  }
  c10::DataPtr allocate(size_t bytes) override {
    const size_t whole = power_of_two(bytes);
    void* address = bytes ? std::aligned_alloc(64, std::max<size_t>(whole, 64)) : nullptr;
    if (address) add(static_cast<char*>(address), whole);
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
void report_pinned(FILE* out) { std::fprintf(out, "%12zu bytes page-locked at most\n", pinned().peak); }

}  // namespace stand_in

// What cudaHostRegister and cudaHostUnregister do (../preload.c).
extern "C" int rehearsal_lock_pages(void* address, size_t bytes, unsigned) {
  constexpr int kAlreadyRegistered = 712;
  if (stand_in::is_pinned(address)) return kAlreadyRegistered;
  stand_in::add(static_cast<char*>(address), bytes);
  return 0;
}
extern "C" int rehearsal_unlock_pages(void* address) {
  constexpr int kNotRegistered = 713;
  return stand_in::remove(static_cast<char*>(address)) ? 0 : kNotRegistered;
}
