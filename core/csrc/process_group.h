// c10d, as far as Echelon uses it: a TCP store to meet at, and groups of ranks with asynchronous collectives.
#pragma once
#include <ATen/ATen.h>
#include <future>
#include <memory>
#include "rust/cxx.h"

namespace c10d {
class Backend;
class Store;
class Work;
}  // namespace c10d

namespace echelon {

// Where ranks meet: a key-value store over TCP. The server lives as long as this object.
class MeetingStore {
 public:
  explicit MeetingStore(c10::intrusive_ptr<c10d::Store> store, uint16_t port);
  ~MeetingStore();
  uint16_t port() const { return port_; }
  void set(rust::Str key, rust::Slice<const uint8_t> value) const;
  // Waits until the key is there.
  rust::Vec<uint8_t> get(rust::Str key, int64_t timeout_ms) const;
  bool has(rust::Str key) const;
  // Adds to a counter, which begins at 0, and returns what it is then.
  int64_t add(rust::Str key, int64_t amount) const;
  // Moves a counter from `from` to the next number, where it still stands there.
  bool advance(rust::Str key, int64_t from) const;
  void remove(rust::Str key) const;
  const c10::intrusive_ptr<c10d::Store>& store() const { return store_; }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  uint16_t port_;
};

// An operation in flight. It keeps the tensors that it reads and writes.
class PendingWork {
 public:
  PendingWork(std::vector<c10::intrusive_ptr<c10d::Work>> works, std::vector<at::Tensor> tensors);
  ~PendingWork();
  // False when the time is up; throws what the operation failed with.
  bool wait(int64_t timeout_ms) const;
  // Waits on a thread of its own from now on.
  void wait_aside();

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::vector<at::Tensor> tensors_;
  std::shared_future<void> handed_over_;
};

// The ranks of one group. Every rank calls the same operations in the same order.
class RankGroup {
 public:
  RankGroup(c10::intrusive_ptr<c10d::Backend> backend, int32_t rank, int32_t size);
  ~RankGroup();
  std::unique_ptr<PendingWork> all_reduce(const at::Tensor& tensor) const;
  std::unique_ptr<PendingWork> all_gather(const at::Tensor& gathered, const at::Tensor& shard) const;
  // The same without a copy of it all on the way; `shard` may be this rank's part of `gathered`.
  std::unique_ptr<PendingWork> all_gather_in_place(const at::Tensor& gathered, const at::Tensor& shard) const;
  std::unique_ptr<PendingWork> all_to_all(const at::Tensor& received, const at::Tensor& sent) const;
  std::unique_ptr<PendingWork> broadcast(const at::Tensor& tensor, int64_t root) const;
  std::unique_ptr<PendingWork> send(const at::Tensor& tensor, int32_t to, int32_t tag) const;
  std::unique_ptr<PendingWork> recv(const at::Tensor& tensor, int32_t from, int32_t tag) const;
  std::unique_ptr<PendingWork> barrier() const;
  // Ends every operation in flight with an error, here and at the peers. The group is of no use afterwards.
  void abort() const;

 private:
  c10::intrusive_ptr<c10d::Backend> backend_;
  int32_t rank_, size_;
};

std::unique_ptr<MeetingStore> meet_at(rust::Str host, uint16_t port, int32_t listener, int64_t timeout_ms);
// Joins the group whose ranks meet under `prefix`; `address` is the interface that other ranks reach this one at.
std::unique_ptr<RankGroup> join_gloo(const MeetingStore& store, rust::Str prefix, int32_t rank, int32_t size,
                                     rust::Str address, int64_t connect_ms);

// Takes or gives back the memory of a tensor's storage; views of it stay valid. Contents are not kept.
void allocate_storage(const at::Tensor& tensor);
void free_storage(const at::Tensor& tensor);
// The same memory without a history: writing to it is unknown to graphs that saved the tensor.
std::unique_ptr<at::Tensor> unversioned(const at::Tensor& tensor);

}  // namespace echelon
