#define USE_C10D_GLOO
#include "process_group.h"

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

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
  return std::make_unique<PendingWork>(std::move(work), std::move(tensors));
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

PendingWork::PendingWork(c10::intrusive_ptr<c10d::Work> work, std::vector<at::Tensor> tensors)
    : work_(std::move(work)), tensors_(std::move(tensors)) {}
PendingWork::~PendingWork() = default;

bool PendingWork::is_done() const { return work_->isCompleted(); }

bool PendingWork::wait(int64_t timeout_ms) const {
  try {
    return work_->wait(milliseconds(timeout_ms));
  } catch (const std::exception& error) {
    if (!work_->isCompleted()) return false;
    throw;
  }
}

RankGroup::RankGroup(c10::intrusive_ptr<c10d::Backend> backend) : backend_(std::move(backend)) {}
RankGroup::~RankGroup() = default;

std::unique_ptr<PendingWork> RankGroup::all_reduce(const at::Tensor& tensor) const {
  std::vector<at::Tensor> tensors{tensor.detach()};
  return pending(backend_->allreduce(tensors), tensors);
}

std::unique_ptr<PendingWork> RankGroup::all_gather(const at::Tensor& gathered, const at::Tensor& shard) const {
  auto out = bytes_of(gathered), in = bytes_of(shard);
  return pending(backend_->_allgather_base(out, in), {out, in});
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
  return pending(backend_->send(tensors, to, tag), tensors);
}

std::unique_ptr<PendingWork> RankGroup::recv(const at::Tensor& tensor, int32_t from, int32_t tag) const {
  std::vector<at::Tensor> tensors{bytes_of(tensor)};
  return pending(backend_->recv(tensors, from, tag), tensors);
}

std::unique_ptr<PendingWork> RankGroup::barrier() const { return pending(backend_->barrier(), {}); }

std::unique_ptr<MeetingStore> meet_at(rust::Str host, uint16_t port, bool serve, int64_t timeout_ms) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = serve;
  options.waitWorkers = false;
  options.timeout = milliseconds(timeout_ms);
  auto store = c10::make_intrusive<c10d::TCPStore>(text(host), options);
  uint16_t bound = store->getPort();
  return std::make_unique<MeetingStore>(std::move(store), bound);
}

std::unique_ptr<RankGroup> join_gloo(const MeetingStore& store, rust::Str name, int32_t rank, int32_t size,
                                     rust::Str address, int64_t timeout_ms) {
  auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(text(address)));
  auto named = c10::make_intrusive<c10d::PrefixStore>(text(name), store.store());
  named->setTimeout(milliseconds(timeout_ms));
  auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(named, rank, size, options);
  return std::make_unique<RankGroup>(std::move(backend));
}

void allocate_storage(const at::Tensor& tensor) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  size_t bytes = tensor.numel() * tensor.element_size();
  if (storage->nbytes() == bytes) return;
  storage->set_data_ptr_noswap(c10::GetAllocator(storage->device_type())->allocate(bytes));
  storage->set_nbytes(bytes);
}

void free_storage(const at::Tensor& tensor) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(c10::GetAllocator(storage->device_type())->allocate(0));
  storage->set_nbytes(0);
}

std::unique_ptr<at::Tensor> unversioned(const at::Tensor& tensor) {
  return std::make_unique<at::Tensor>(tensor.variable_data());
}

}  // namespace echelon
