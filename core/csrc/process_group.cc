#define USE_C10D_GLOO
#include "process_group.h"

#include <c10/core/DeviceGuard.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <thread>

#include "echelon-core/src/collective.rs.h"

namespace echelon {
namespace {

std::string text(rust::Str value) { return std::string(value.data(), value.size()); }
std::chrono::milliseconds milliseconds(int64_t count) { return std::chrono::milliseconds(count); }

// Bytes, so that every dtype travels unchanged.
at::Tensor bytes_of(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "a collective needs contiguous tensors");
  return tensor.detach().view({-1}).view(at::kByte);
}

std::unique_ptr<PendingWork> pending(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors) {
  return std::make_unique<PendingWork>(std::vector{std::move(work)}, std::move(tensors));
}

}  // namespace

MeetingStore::MeetingStore(c10::intrusive_ptr<c10d::Store> store, uint16_t port)
    : store_(std::move(store)), port_(port) {}
MeetingStore::~MeetingStore() = default;

void MeetingStore::set(rust::Str key, rust::Slice<const uint8_t> value) const {
  store_->set(text(key), std::vector<uint8_t>(value.begin(), value.end()));
}

rust::Vec<uint8_t> MeetingStore::get(rust::Str key, int64_t timeout_ms) const {
  store_->wait({text(key)}, milliseconds(timeout_ms));
  rust::Vec<uint8_t> value;
  for (uint8_t byte : store_->get(text(key))) value.push_back(byte);
  return value;
}

bool MeetingStore::has(rust::Str key) const { return store_->check({text(key)}); }

int64_t MeetingStore::add(rust::Str key, int64_t amount) const { return store_->add(text(key), amount); }

bool MeetingStore::advance(rust::Str key, int64_t from) const {
  auto to = std::to_string(from + 1);
  return store_->add(text(key), 0) == from && store_->compareSet(text(key), std::to_string(from), to) == to;
}

void MeetingStore::remove(rust::Str key) const { store_->deleteKey(text(key)); }

PendingWork::PendingWork(std::vector<c10::intrusive_ptr<c10d::Work>> works, std::vector<at::Tensor> tensors)
    : works_(std::move(works)), tensors_(std::move(tensors)) {}
PendingWork::~PendingWork() = default;

bool PendingWork::wait(int64_t timeout_ms) const {
  if (handed_over_.valid()) {
    if (handed_over_.wait_for(milliseconds(timeout_ms)) == std::future_status::timeout) return false;
    handed_over_.get();
    return true;
  }
  const auto end = std::chrono::steady_clock::now() + milliseconds(timeout_ms);
  for (const auto& work : works_) {
    // Gloo takes no time at all for "as long as it takes".
    auto left = std::chrono::ceil<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    try {
      if (!work->wait(std::max(left, milliseconds(1)))) return false;
    } catch (const std::exception&) {
      // c10d says by an error that the time is up, and the operation may have completed since: its own outcome counts.
      if (!work->isCompleted()) return false;
      work->wait(milliseconds(1));
    }
  }
  return true;
}

// Gloo runs a collective on threads of its own, but waits for a single message on the caller's, and closes every
// connection when that wait times out. A thread of our own waits instead: who waits for it may look up and wait on.
void PendingWork::wait_aside() {
  std::promise<void> promise;
  handed_over_ = promise.get_future().share();
  std::thread([works = works_, tensors = tensors_, promise = std::move(promise)]() mutable {
    try {
      for (const auto& work : works) work->wait();
      promise.set_value();
    } catch (...) {
      promise.set_exception(std::current_exception());
    }
  }).detach();
}

RankGroup::RankGroup(c10::intrusive_ptr<c10d::Backend> backend, int32_t rank, int32_t size)
    : backend_(std::move(backend)), rank_(rank), size_(size) {}
RankGroup::~RankGroup() = default;

std::unique_ptr<PendingWork> RankGroup::all_reduce(const at::Tensor& tensor) const {
  std::vector<at::Tensor> tensors{tensor.detach()};
  return pending(backend_->allreduce(tensors), tensors);
}

std::unique_ptr<PendingWork> RankGroup::all_gather(const at::Tensor& gathered, const at::Tensor& shard) const {
  auto out = bytes_of(gathered), in = bytes_of(shard);
  return pending(backend_->_allgather_base(out, in), {out, in});
}

// Gloo's own all-gather works on a copy of everything; here every rank's part is broadcast to where it belongs.
std::unique_ptr<PendingWork> RankGroup::all_gather_in_place(const at::Tensor& gathered, const at::Tensor& shard) const {
  auto out = bytes_of(gathered), in = bytes_of(shard);
  auto parts = out.view({size_, -1}).unbind();
  if (!parts[rank_].is_alias_of(in)) parts[rank_].copy_(in);
  std::vector<c10::intrusive_ptr<c10d::Work>> works;
  for (int32_t root = 0; root < size_ && out.numel() > 0; ++root) {
    std::vector<at::Tensor> tensors{parts[root]};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    works.push_back(backend_->broadcast(tensors, options));
  }
  return std::make_unique<PendingWork>(std::move(works), std::vector<at::Tensor>{out, in});
}

std::unique_ptr<PendingWork> RankGroup::all_to_all(const at::Tensor& received, const at::Tensor& sent) const {
  auto out = bytes_of(received), in = bytes_of(sent);
  std::vector<int64_t> even;
  return pending(backend_->alltoall_base(out, in, even, even), {out, in});
}

std::unique_ptr<PendingWork> RankGroup::broadcast(const at::Tensor& tensor, int64_t root) const {
  std::vector<at::Tensor> tensors{bytes_of(tensor)};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  return pending(backend_->broadcast(tensors, options), tensors);
}

std::unique_ptr<PendingWork> RankGroup::send(const at::Tensor& tensor, int32_t to, int32_t tag) const {
  std::vector<at::Tensor> tensors{bytes_of(tensor)};
  auto work = pending(backend_->send(tensors, to, tag), tensors);
  work->wait_aside();
  return work;
}

std::unique_ptr<PendingWork> RankGroup::recv(const at::Tensor& tensor, int32_t from, int32_t tag) const {
  std::vector<at::Tensor> tensors{bytes_of(tensor)};
  auto work = pending(backend_->recv(tensors, from, tag), tensors);
  work->wait_aside();
  return work;
}

std::unique_ptr<PendingWork> RankGroup::barrier() const { return pending(backend_->barrier(), {}); }

// Gloo closes all connections, and ends what waits on them, when one wait runs out of time: so this waits a millisecond
// for what nobody sends. A rank whose connection is gone already refuses, and the next one is tried.
void RankGroup::abort() const {
  constexpr int32_t kNobodySends = 0x7ffffff0;
  for (int32_t from = 0; from < size_; ++from) {
    if (from == rank_) continue;
    try {
      std::vector<at::Tensor> nothing{at::zeros({1}, at::kByte)};
      backend_->recv(nothing, from, kNobodySends)->wait(milliseconds(1));
    } catch (const std::exception&) {
      // That it fails is the purpose.
    }
  }
}

std::unique_ptr<MeetingStore> meet_at(rust::Str host, uint16_t port, int32_t listener, int64_t timeout_ms) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = listener >= 0;
  if (listener >= 0) options.masterListenFd = listener;  // c10d would listen on every interface
  options.waitWorkers = false;
  options.timeout = milliseconds(timeout_ms);
  auto store = c10::make_intrusive<c10d::TCPStore>(text(host), options);
  uint16_t bound = store->getPort();
  return std::make_unique<MeetingStore>(std::move(store), bound);
}

std::unique_ptr<RankGroup> join_gloo(const MeetingStore& store, rust::Str prefix, int32_t rank, int32_t size,
                                     rust::Str address, int64_t connect_ms) {
  auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(connect_ms));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(text(address)));
  auto named = c10::make_intrusive<c10d::PrefixStore>(text(prefix), store.store());
  named->setTimeout(milliseconds(connect_ms));
  auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(named, rank, size, options);
  // Operations end by the ranks' own judgement of progress, long before this.
  backend->setTimeout(std::chrono::hours(24));
  return std::make_unique<RankGroup>(std::move(backend), rank, size);
}

namespace {
// Memory of `bytes` on the storage's own device: an allocator takes it on the thread's current one.
void give_memory(c10::StorageImpl* storage, size_t bytes) {
  c10::OptionalDeviceGuard guard;
  if (!storage->device().is_cpu()) guard.reset_device(storage->device());
  storage->set_data_ptr_noswap(c10::GetAllocator(storage->device_type())->allocate(bytes));
  storage->set_nbytes(bytes);
}
}  // namespace

void allocate_storage(const at::Tensor& tensor) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  size_t bytes = tensor.numel() * tensor.element_size();
  if (storage->nbytes() != bytes) give_memory(storage, bytes);
}

void free_storage(const at::Tensor& tensor) { give_memory(tensor.storage().unsafeGetStorageImpl(), 0); }

std::unique_ptr<at::Tensor> unversioned(const at::Tensor& tensor) {
  return std::make_unique<at::Tensor>(tensor.variable_data());
}

}  // namespace echelon
