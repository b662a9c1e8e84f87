// Device memory: its addresses, and libtorch's caching allocator on it.
//
// The allocator reserves segments of the card and divides them, as CUDACachingAllocator.cpp of libtorch 2.11 does with its
// default settings: requests are rounded up to 512 bytes; those of up to 1 MiB come from segments of 2 MiB, those of less
// than 10 MiB from segments of 20 MiB, larger ones from segments of their own in multiples of 2 MiB. What is freed stays
// reserved, in its pool and for its stream, until `emptyCache` or until the card is full. With `expandable_segments:True`
// (PYTORCH_CUDA_ALLOC_CONF, PYTORCH_ALLOC_CONF) a pool is one segment that grows and shrinks by pages of those sizes.
// Left out: the other settings, private pools, and the delay that `record_stream` asks for.
#include <c10/core/AllocatorConfig.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <unordered_map>

#include "stand_in.h"

namespace stand_in {
namespace {

constexpr size_t kGrain = 512, kMiB = size_t{1} << 20;
constexpr size_t kSmall = kMiB, kSmallSegment = 2 * kMiB, kLargeSegment = 20 * kMiB, kOwnSegment = 10 * kMiB;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// ---- Addresses ----

char* bus = nullptr;  // of device 0; device i begins `span` further on
ptrdiff_t delta = 0;  // from an address that tensors show to the one that the kernels here use
size_t span = 0;

// ---- The allocator ----

struct Block {
  size_t at, size, requested = 0;
  c10::StreamId stream;
  bool is_small, is_expandable, is_mapped = true, is_allocated = false;
  bool is_fresh = true;  // has pages that nobody wrote to yet
  Block *before = nullptr, *after = nullptr;

  bool is_split() const { return before || after; }
};
struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->stream, a->size, a->at) < std::tie(b->stream, b->size, b->at);
  }
};
struct ByAddress {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->stream, a->at) < std::tie(b->stream, b->at);
  }
};
struct Pool {
  bool is_small;
  std::set<Block*, BySize> free;
  std::set<Block*, ByAddress> unmapped;  // of expandable segments

  size_t page() const { return is_small ? kSmallSegment : kLargeSegment; }
};

// Where on a device's addresses segments lie.
class Addresses {
 public:
  explicit Addresses(size_t all) { gaps_[0] = all; }
  size_t take(size_t length) {
    for (auto gap = gaps_.begin(); gap != gaps_.end(); ++gap) {
      auto [at, room] = *gap;
      if (room < length) continue;
      gaps_.erase(gap);
      if (room > length) gaps_[at + length] = room - length;
      return at;
    }
    TORCH_CHECK(false, "stand-in: no address space is left on a device");
  }
  void give_back(size_t at, size_t length) {
    auto next = gaps_.lower_bound(at);
    if (next != gaps_.end() && at + length == next->first) length += next->second, next = gaps_.erase(next);
    if (next != gaps_.begin() && std::prev(next)->first + std::prev(next)->second == at)
      std::prev(next)->second += length;
    else
      gaps_[at] = length;
  }

 private:
  std::map<size_t, size_t> gaps_;
};

// The allocator of one device.
class Memory {
 public:
  explicit Memory(DeviceIndex device) : device_(device), addresses_(span) {}

  size_t allocate(size_t bytes, c10::StreamId stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = rounded(bytes, kGrain);
    Pool& pool = size <= kSmall ? small_ : large_;
    Block* block = find_free(pool, size, stream);
    if (!block) block = grow(pool, size, stream);
    if (!block) {
      empty_cache();
      ++stats_.num_alloc_retries;
      block = grow(pool, size, stream);
    }
    if (!block) raise_out_of_memory(segment_size(size));
    if (should_split(*block, size)) pool.free.insert(split(block, size));
    block->is_allocated = true;
    block->requested = bytes;
    live_[block->at] = block;
    if (block->is_fresh) fill(*block), block->is_fresh = false;  // fresh memory is no zeros
    change(stats_.allocation, pool, 1), change(stats_.active, pool, 1);
    change(stats_.allocated_bytes, pool, block->size), change(stats_.active_bytes, pool, block->size);
    change(stats_.requested_bytes, pool, bytes);
    if (int64_t now = stats_.allocated_bytes[0].current; now > fullest_.bytes) {
      if (wants_sites() && now > fullest_.bytes * 1.02) fullest_.where = stack_here();
      fullest_.bytes = now;
    }
    return block->at;
  }

  void free(size_t at) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = live_.find(at);
    Block* block = found->second;
    live_.erase(found);
    Pool& pool = block->is_small ? small_ : large_;
    change(stats_.allocation, pool, -1), change(stats_.active, pool, -1);
    change(stats_.allocated_bytes, pool, -int64_t(block->size)),
        change(stats_.active_bytes, pool, -int64_t(block->size));
    change(stats_.requested_bytes, pool, -int64_t(block->requested));
    fill(*block);  // NaN, -1: who reads on is found out
    block->is_allocated = false;
    merge_into(block, block->before), merge_into(block, block->after);
    pool.free.insert(block);
  }

  void give_back_unused() {
    std::lock_guard<std::mutex> lock(mutex_);
    empty_cache();
  }

  c10::CachingDeviceAllocator::DeviceStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    auto now = stats_;
    for (const Pool* pool : {&small_, &large_})
      for (const Block* block : pool->free)
        if (block->is_split())
          change(now.inactive_split, *pool, 1), change(now.inactive_split_bytes, *pool, block->size);
    return now;
  }
  void reset(bool peaks) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : {&stats_.allocation, &stats_.segment, &stats_.active, &stats_.allocated_bytes,
                       &stats_.reserved_bytes, &stats_.active_bytes, &stats_.requested_bytes})
      for (auto& one : *stat) peaks ? one.reset_peak() : one.reset_accumulated();
    if (!peaks) stats_.num_alloc_retries = stats_.num_ooms = 0;
  }
  FullestMoment fullest() {
    std::lock_guard<std::mutex> lock(mutex_);
    return fullest_;
  }

 private:
  using StatArray = c10::CachingAllocator::StatArray;
  static void change(StatArray& stat, const Pool& pool, int64_t by) {
    for (int kind : {0, pool.is_small ? 1 : 2}) by < 0 ? stat[kind].decrease(-by) : stat[kind].increase(by);
  }
  static size_t segment_size(size_t size) {
    if (size <= kSmall) return kSmallSegment;
    return size < kOwnSegment ? kLargeSegment : rounded(size, kSmallSegment);
  }
  static bool should_split(const Block& block, size_t size) {
    return block.size - size >= (block.is_small || block.is_expandable ? kGrain : kSmall + 1);
  }
  static bool grows_by_pages() { return c10::CachingAllocator::AcceleratorAllocatorConfig::use_expandable_segments(); }
  char* backing(const Block& block) const { return bus + device_ * span + block.at + delta; }
  void fill(const Block& block) const { std::memset(backing(block), 0xff, block.size); }

  Block* find_free(Pool& pool, size_t size, c10::StreamId stream) {
    Block key{};
    key.stream = stream, key.size = size;
    auto found = pool.free.lower_bound(&key);
    if (found == pool.free.end() || (*found)->stream != stream) return nullptr;
    Block* block = *found;
    pool.free.erase(found);
    return block;
  }

  // A free block of at least `size` in memory that is taken from the card now; null: the card has no more.
  Block* grow(Pool& pool, size_t size, c10::StreamId stream) {
    use(device_);
    if (grows_by_pages()) return map_pages(pool, size, stream);
    const size_t length = segment_size(size);
    if (!take(device_, length)) return nullptr;
    auto* block = new Block;
    *block = {addresses_.take(length), length, 0, stream, pool.is_small, /*is_expandable=*/false};
    changed_reserve(pool, length), change(stats_.segment, pool, 1);
    return block;
  }
  void changed_reserve(Pool& pool, int64_t by) {
    change(stats_.reserved_bytes, pool, by);
    ++(by < 0 ? stats_.num_device_free : stats_.num_device_alloc);
  }

  // Cuts a block; the rest, which is returned, is in no set yet.
  static Block* split(Block* block, size_t size) {
    auto* rest = new Block(*block);
    rest->at += size, rest->size -= size;
    rest->before = block;
    block->size = size, block->after = rest;
    if (rest->after) rest->after->before = rest;
    return rest;
  }
  // Takes a free neighbour into a block that is in no set.
  void merge_into(Block* block, Block* other) {
    if (!other || other->is_allocated || other->is_mapped != block->is_mapped) return;
    Pool& pool = block->is_small ? small_ : large_;
    other->is_mapped ? pool.free.erase(other) : pool.unmapped.erase(other);
    if (other == block->before) {
      block->at = other->at;
      block->before = other->before;
      if (block->before) block->before->after = block;
    } else {
      block->after = other->after;
      if (block->after) block->after->before = block;
    }
    block->size += other->size;
    block->is_fresh |= other->is_fresh;
    delete other;
  }

  // Gives back what no block is in.
  void empty_cache() {
    for (Pool* pool : {&small_, &large_}) {
      std::vector<Block*> all(pool->free.begin(), pool->free.end());
      for (Block* block : all) {
        if (block->is_expandable) {
          unmap_pages(*pool, block);
        } else if (!block->is_split()) {
          pool->free.erase(block);
          drop_pages(*pool, block->at, block->size);
          addresses_.give_back(block->at, block->size);
          change(stats_.segment, *pool, -1);
          delete block;
        }
      }
    }
  }
  void drop_pages(Pool& pool, size_t at, size_t length) {
    (void)madvise(bus + device_ * span + at + delta, length, MADV_DONTNEED);
    give_back(device_, length);
    changed_reserve(pool, -int64_t(length));
  }

  // Expandable segments: blocks that are not mapped are address space only.
  Block* map_pages(Pool& pool, size_t size, c10::StreamId stream) {
    Block* block = find_growing(pool, size, stream);
    if (block->is_mapped)
      pool.free.erase(block);
    else if (!map(pool, block, std::min(block->size, size)))
      return nullptr;
    while (block->size < size)
      if (!grow_into_next(pool, block, size - block->size)) return pool.free.insert(block), nullptr;
    return block;
  }
  // The first of a row of free and of unmapped blocks that together are large enough.
  Block* find_growing(Pool& pool, size_t size, c10::StreamId stream) {
    for (Block* block : pool.unmapped) {
      if (block->stream != stream) continue;
      Block* first = block->before && !block->before->is_allocated ? block->before : block;
      size_t room = 0;
      for (Block* next = first; next && !next->is_allocated && room < size; next = next->after) room += next->size;
      if (room >= size) return first;
    }
    // libtorch reserves addresses for an eighth more than the card has.
    const size_t length = rounded(capacity(device_) + capacity(device_) / 8, pool.page());
    auto* block = new Block;
    *block = {addresses_.take(length), length, 0, stream, pool.is_small, /*is_expandable=*/true, /*is_mapped=*/false};
    pool.unmapped.insert(block);
    change(stats_.segment, pool, 1);
    return block;
  }
  // Maps the first pages of an unmapped block, which then is in no set; what follows stays unmapped.
  bool map(Pool& pool, Block* block, size_t size) {
    const size_t length = std::min(rounded(size, pool.page()), block->size);
    if (!take(device_, length)) return false;
    pool.unmapped.erase(block);
    if (length < block->size) pool.unmapped.insert(split(block, length));
    block->is_mapped = true;
    merge_into(block, block->before), merge_into(block, block->after);
    changed_reserve(pool, length);
    return true;
  }
  // `block` is free, in no set, and followed by an unmapped one.
  bool grow_into_next(Pool& pool, Block* block, size_t size) {
    Block* next = block->after;
    const size_t length = std::min(rounded(size, pool.page()), next->size);
    if (!take(device_, length)) return false;
    pool.unmapped.erase(next);
    if (length < next->size) pool.unmapped.insert(split(next, length));
    next->is_mapped = true;
    pool.free.insert(next);
    merge_into(block, next);
    merge_into(block, block->after);
    changed_reserve(pool, length);
    return true;
  }
  // Gives back the whole pages in a free block.
  void unmap_pages(Pool& pool, Block* block) {
    const size_t begin = rounded(block->at, pool.page()), end = (block->at + block->size) / pool.page() * pool.page();
    if (begin >= end) return;
    pool.free.erase(block);
    if (begin > block->at) {
      Block* rest = split(block, begin - block->at);
      pool.free.insert(block);
      block = rest;
    }
    if (end < block->at + block->size) pool.free.insert(split(block, end - block->at));
    drop_pages(pool, block->at, block->size);
    block->is_mapped = false, block->is_fresh = true;
    merge_into(block, block->before), merge_into(block, block->after);
    if (block->is_split()) {
      pool.unmapped.insert(block);
      return;
    }
    addresses_.give_back(block->at, block->size);
    change(stats_.segment, pool, -1);
    delete block;
  }

  [[noreturn]] void raise_out_of_memory(size_t wanted) {
    using c10::CachingAllocator::format_size;
    ++stats_.num_ooms;
    std::ostringstream processes;
    for (auto [process, held] : holders(device_)) {
      if (process == getpid())
        processes << "Including non-PyTorch memory, this process";
      else
        processes << "Process " << process;
      processes << " has " << format_size(held) << " memory in use. ";
    }
    const size_t allocated = stats_.allocated_bytes[0].current, reserved = stats_.reserved_bytes[0].current;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", format_size(wanted), ". GPU ",
                     static_cast<int>(device_), " has a total capacity of ", format_size(capacity(device_)),
                     " of which ", format_size(free_bytes(device_)), " is free. ", processes.str(),
                     "Of the allocated memory ", format_size(allocated), " is allocated by PyTorch, and ",
                     format_size(reserved - allocated),
                     " is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
                     "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
                     "Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-"
                     "with-pytorch-cuda-alloc-conf) (stand-in)");
  }

  const DeviceIndex device_;
  std::mutex mutex_;
  Addresses addresses_;
  Pool small_{true, {}, {}}, large_{false, {}, {}};
  std::unordered_map<size_t, Block*> live_;
  c10::CachingDeviceAllocator::DeviceStats stats_;
  FullestMoment fullest_{0, {}};
};

Memory& memory_of(DeviceIndex device) {
  static auto* all = [] {
    auto* made = new std::vector<std::unique_ptr<Memory>>;
    for (int device = 0; device < num_devices(); ++device)
      made->push_back(std::make_unique<Memory>(static_cast<DeviceIndex>(device)));
    return made;
  }();
  return *all->at(device);
}

void release(void* address) {
  if (address) memory_of(device_of(address)).free(offset_on_device(address));
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    DeviceIndex device = current_device();
    char* address = nullptr;
    if (bytes) address = bus + device * span + memory_of(device).allocate(bytes, current_stream(device));
    return {address, address, &release, Device(c10::DeviceType::CUDA, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(host_address(to), host_address(const_cast<void*>(from)), bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    for (int device = 0; device < num_devices(); ++device)
      memory_of(static_cast<DeviceIndex>(device)).give_back_unused();
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    return memory_of(checked(device)).stats();
  }
  void resetAccumulatedStats(DeviceIndex device) override { memory_of(checked(device)).reset(/*peaks=*/false); }
  void resetPeakStats(DeviceIndex device) override { memory_of(checked(device)).reset(/*peaks=*/true); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    use(device);
    return {free_bytes(device), capacity(device)};
  }
};

struct sigaction before_us;
void on_fault(int number, siginfo_t* info, void* context) {
  if (!on_device(info->si_addr)) {
    sigaction(SIGSEGV, &before_us, nullptr);  // not ours: it faults again
    return;
  }
  char text[160];
  int length = std::snprintf(text, sizeof text, "\nstand-in: the host touched device memory at cuda:%d + %zu\n",
                             int{device_of(info->si_addr)}, offset_on_device(info->si_addr));
  if (write(2, text, length) < 0) _exit(134);
  void* frames[60];
  backtrace_symbols_fd(frames, backtrace(frames, 60), 2);
  signal(SIGSEGV, SIG_DFL);
}

struct Beginning {
  Beginning() {
    size_t largest = 0;
    for (int device = 0; device < num_devices(); ++device)
      largest = std::max(largest, capacity(static_cast<DeviceIndex>(device)));
    span = std::max<size_t>(size_t{16} << 30, rounded(largest * 16, kMiB));
    const size_t all = span * std::max(num_devices(), 1);
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    bus = static_cast<char*>(mmap(nullptr, all, PROT_NONE, kFlags, -1, 0));
    char* behind = static_cast<char*>(mmap(nullptr, all, PROT_READ | PROT_WRITE, kFlags, -1, 0));
    TORCH_CHECK(bus != MAP_FAILED && behind != MAP_FAILED, "stand-in: no address space");
    delta = behind - bus;
    c10::SetAllocator(c10::DeviceType::CUDA, &device_memory());
    struct sigaction ours{};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &ours, &before_us);
    std::atexit(report);
  }
} beginning;

}  // namespace

bool on_device(const void* address) { return bus && address >= bus && address < bus + span * num_devices(); }
void* host_address(void* address) { return on_device(address) ? static_cast<char*>(address) + delta : address; }
DeviceIndex device_of(const void* address) {
  return static_cast<DeviceIndex>((static_cast<const char*>(address) - bus) / span);
}
size_t offset_on_device(const void* address) { return (static_cast<const char*>(address) - bus) % span; }

c10::DeviceAllocator& device_memory() {
  static auto* allocator = new DeviceMemory;
  return *allocator;
}
FullestMoment fullest_moment(DeviceIndex device) { return memory_of(device).fullest(); }
void report_memory(FILE* out) {
  for (int device = 0; device < num_devices(); ++device) {
    const auto stats = memory_of(static_cast<DeviceIndex>(device)).stats();
    std::fprintf(out,
                 "%12ld bytes allocated at most on cuda:%d, %ld at the end; reserved %ld at most, %ld at the end; %ld "
                 "out-of-memory errors, %ld times the cache was given back for more\n",
                 memory_of(static_cast<DeviceIndex>(device)).fullest().bytes, device, stats.allocated_bytes[0].current,
                 stats.reserved_bytes[0].peak, stats.reserved_bytes[0].current, stats.num_ooms,
                 stats.num_alloc_retries);
  }
  report_pinned(out);
}

}  // namespace stand_in

// For the other stand-ins.
extern "C" void* rehearsal_host_address(void* address) { return stand_in::host_address(address); }
