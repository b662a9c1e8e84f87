// A CPU allocator that counts what is live and keeps what is freed: fresh pages cost more than the work done on them.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
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

// A block begins with its own facts; the data follows on the next alignment boundary. Data and context are one pointer,
// which is what libtorch's raw_allocate asks for.
struct Header {
  size_t size;      // of the block
  size_t counted;   // as live, for whoever holds it
  size_t resident;  // memory that it takes
  bool reserved;    // address space of its own, of which memory is what was touched
};

size_t page_size() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

// Gives a block back to the system.
void give_back(void* block) {
  auto [size, counted, resident, reserved] = *static_cast<Header*>(block);
  taken -= resident;
  if (reserved)
    munmap(block, size);
  else
    std::free(block);
}

class FreeBlocks {
 public:
  void* take(size_t size, bool reserved) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(key(size, reserved));
    if (found == blocks_.end() || found->second.empty()) return nullptr;
    void* block = found->second.back();
    found->second.pop_back();
    kept_ -= static_cast<Header*>(block)->resident;
    return block;
  }
  // Keeps at most a quarter of what was ever live: what a phase needed is there for the next, and no more.
  bool keep(void* block) {
    const Header& header = *static_cast<Header*>(block);
    std::lock_guard<std::mutex> lock(mutex_);
    if (kept_ + header.resident > std::max(kKeepAtLeast, most.load() / 4)) return false;
    blocks_[key(header.size, header.reserved)].push_back(block);
    kept_ += header.resident;
    return true;
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& entry : blocks_)
      for (void* block : entry.second) give_back(block);
    blocks_.clear();
    kept_ = 0;
  }

 private:
  // Sizes are multiples of the alignment: the last bit is free.
  static size_t key(size_t size, bool reserved) { return size | static_cast<size_t>(reserved); }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> blocks_;
  size_t kept_ = 0;
};

FreeBlocks& free_blocks() {
  static auto* blocks = new FreeBlocks;
  return *blocks;
}

void* block_of(void* data) { return static_cast<char*>(data) - kAlignment; }

// Blocks that this thread has reserved and not counted yet; null outside of a `Reserving`.
thread_local std::vector<void*>* reserved_here = nullptr;

void release(void* data) {
  if (data == nullptr) return;
  void* block = block_of(data);
  const Header& header = *static_cast<Header*>(block);
  if (reserved_here != nullptr && header.reserved)
    reserved_here->erase(std::remove(reserved_here->begin(), reserved_here->end(), block), reserved_here->end());
  live -= header.counted;
  if (header.size >= kKeepFrom && free_blocks().keep(block)) return;
  give_back(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* block = reserved_here != nullptr ? reserve(bytes + kAlignment) : take(bytes + kAlignment);
    size_t counted = static_cast<Header*>(block)->counted = reserved_here != nullptr ? 0 : bytes;
    count(counted);
    void* data = static_cast<char*>(block) + kAlignment;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void* take(size_t bytes) {
    size_t size = size_class(bytes);
    void* block = size >= kKeepFrom ? free_blocks().take(size, false) : nullptr;
    if (block != nullptr) return block;
    if (posix_memalign(&block, kAlignment, size) != 0) {
      free_blocks().release();
      TORCH_CHECK(posix_memalign(&block, kAlignment, size) == 0, "out of memory: ", size, " bytes wanted, ",
                  live.load(), " bytes live in tensors");
    }
    taken += size;
    *static_cast<Header*>(block) = {size, 0, size, false};
    return block;
  }

  static void* reserve(size_t bytes) {
    size_t size = (bytes + page_size() - 1) / page_size() * page_size();
    void* block = free_blocks().take(size, true);
    if (block == nullptr) block = address_space(size);
    reserved_here->push_back(block);
    return block;
  }

  static void* address_space(size_t size) {
    void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(block != MAP_FAILED, "out of memory: ", size, " bytes of address space wanted");
    // A huge page would take what nobody touches.
    (void)madvise(block, size, MADV_NOHUGEPAGE);
    *static_cast<Header*>(block) = {size, 0, 0, true};
    return block;
  }
};

size_t resident_bytes(void* block, size_t size) {
  std::vector<unsigned char> pages((size + page_size() - 1) / page_size());
  if (mincore(block, size, pages.data()) != 0) return size;
  size_t resident = 0;
  for (unsigned char page : pages) resident += page & 1;
  return resident * page_size();
}

}  // namespace

void install_cpu_allocator() {
  static auto* allocator = new CountingAllocator;
  c10::SetCPUAllocator(allocator, /*priority=*/100);
}
size_t live_bytes() { return live.load(); }
size_t peak_bytes() { return peak.load(); }
void reset_peak_bytes() { peak = live.load(); }
size_t taken_bytes() { return taken.load(); }
void give_back_kept() { free_blocks().release(); }

Reserving::Reserving() { reserved_here = &blocks_; }

Reserving::~Reserving() {
  reserved_here = nullptr;
  for (void* block : blocks_) {
    Header& header = *static_cast<Header*>(block);
    size_t resident = resident_bytes(block, header.size);
    taken += resident - header.resident;
    count(resident);
    header.resident = header.counted = resident;
  }
}

}  // namespace echelon

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

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

void take_pages(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu() || tensor.numel() == 0) return;
  const size_t page = page_size();
  const size_t begin = reinterpret_cast<size_t>(tensor.data_ptr()) / page * page;
  const size_t end = reinterpret_cast<size_t>(tensor.data_ptr()) + tensor.nbytes();
  // Kernels before 5.14 do not know this advice: then the first write takes pages one by one.
  auto populate = [](size_t from, size_t to) {
    (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE);
  };
  // Threads of our own: without OpenMP's pragmas at::parallel_for is a plain loop.
  constexpr size_t kLeastForAThread = size_t{1} << 20;
  const size_t parts = std::clamp<size_t>((end - begin) / kLeastForAThread, 1, at::get_num_threads());
  const size_t part = (end - begin + parts * page - 1) / (parts * page) * page;
  std::vector<std::thread> others;
  for (size_t from = begin + part; from < end; from += part) others.emplace_back(populate, from, std::min(from + part, end));
  populate(begin, std::min(begin + part, end));
  for (auto& other : others) other.join();
}

}  // namespace echelon
