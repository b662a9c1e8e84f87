// Devices, streams and events.
//
// Kernels run when they are launched. A side stream has a thread, for work that other stand-ins (NCCL) bring: what is on it
// is not done before it is. A program that polls the default stream after launches is told once that they still run, as it
// would be by a GPU: so polled waits are counted, each event's once.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "stand_in.h"

namespace stand_in {
namespace {

using c10::Stream;
constexpr auto kCuda = c10::DeviceType::CUDA;

struct Queue {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> waiting;
  uint64_t submitted = 0, completed = 0;
  bool has_thread = false;

  void submit(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex);
    waiting.push_back(std::move(work));
    ++submitted;
    if (!has_thread) std::thread([this] { run(); }).detach();
    has_thread = true;
    changed.notify_all();
  }
  void run() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return !waiting.empty(); });
      auto work = std::move(waiting.front());
      waiting.pop_front();
      lock.unlock();
      work();
      work = nullptr;
      lock.lock();
      ++completed;
      changed.notify_all();
    }
  }
  uint64_t now() {
    std::lock_guard<std::mutex> lock(mutex);
    return submitted;
  }
  bool reached(uint64_t mark) {
    std::lock_guard<std::mutex> lock(mutex);
    return completed >= mark;
  }
  void wait(uint64_t mark) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return completed >= mark; });
  }
};
constexpr int kStreams = 33;  // 0 is the default one
struct Streams {
  std::array<Queue, kStreams> queues;
  std::atomic<uint64_t> launches{0},
      waited_for{0};  // of the default stream: launches, and those that the host knows done
};
Streams& streams_of(DeviceIndex device) {
  static auto* all = new std::vector<Streams>(num_devices());
  return all->at(checked(device));
}
Queue& queue_of(const Stream& stream) { return streams_of(stream.device_index()).queues[stream.id()]; }

// A place in a stream.
struct Mark {
  DeviceIndex device;
  c10::StreamId stream;
  uint64_t at, launches;
  bool was_told_unfinished = false;

  Queue& queue() const { return streams_of(device).queues[stream]; }
  bool runs_in_pretence() const { return stream == 0 && streams_of(device).waited_for < launches; }
  void know_done() const {
    auto& known = streams_of(device).waited_for;
    for (auto seen = known.load(); stream == 0 && seen < launches && !known.compare_exchange_weak(seen, launches);) {
    }
  }
  // The first "not yet" is a wait; that of launches that have run is the only one.
  bool query() {
    const bool is_done = queue().reached(at);
    if (is_done && (was_told_unfinished || !runs_in_pretence())) return know_done(), true;
    if (!was_told_unfinished) count(kWait, "polled event");
    was_told_unfinished = true;
    return false;
  }
  void wait(const char* what) {
    if (!was_told_unfinished) count(kWait, what);
    queue().wait(at);
    know_done();
  }
};
Mark mark_of(const Stream& stream) {
  auto& streams = streams_of(stream.device_index());
  return {stream.device_index(), stream.id(), streams.queues[stream.id()].now(), streams.launches};
}

auto& stream_of_thread(DeviceIndex device) {
  thread_local std::array<c10::StreamId, 64> streams{};
  return streams[checked(device)];
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCuda; }
  Device exchangeDevice(Device device) const override {
    Device before(kCuda, current_device());
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kCuda, current_device()); }
  void setDevice(Device device) const override { current_device() = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device() = device.index(); }
  Stream getStream(Device device) const override {
    auto index = device.has_index() ? device.index() : current_device();
    return Stream(Stream::UNSAFE, Device(kCuda, index), stream_of_thread(index));
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    static std::atomic<int> next{0};
    auto index = device.has_index() ? device.index() : current_device();
    use(index);
    return Stream(Stream::UNSAFE, Device(kCuda, index), 1 + next++ % (kStreams - 1));
  }
  Stream getNewStream(Device device, int) const override { return getStreamFromGlobalPool(device, false); }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    stream_of_thread(stream.device_index()) = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const Stream stream) const override { return stream.id() ? &queue_of(stream) : nullptr; }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(num_devices()); }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }

  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    use(stream.device_index());
    if (!*event) *event = new Mark;
    *static_cast<Mark*>(*event) = mark_of(stream);
  }
  void block(void* event, const Stream& stream) const override {
    if (!event) return;
    auto mark = *static_cast<Mark*>(event);
    auto& queue = queue_of(stream);
    if (&mark.queue() == &queue || mark.queue().reached(mark.at)) return;
    if (stream.id() == 0) return mark.queue().wait(mark.at);  // kernels run when they are launched
    queue.submit([mark] { mark.queue().wait(mark.at); });
  }
  bool queryEvent(void* event) const override {
    if (!event) return true;
    use(static_cast<Mark*>(event)->device);
    return static_cast<Mark*>(event)->query();
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    use(static_cast<Mark*>(event)->device);
    static_cast<Mark*>(event)->wait("event");
  }
  bool queryStream(const Stream& stream) const override {
    use(stream.device_index());
    auto mark = mark_of(stream);
    if (mark.queue().reached(mark.at) && !mark.runs_in_pretence()) return true;
    // As an event that is recorded and asked at once; who asks in a loop is told once for all that is enqueued so far.
    thread_local Mark asked{};
    auto same = [&] {
      return asked.device == mark.device && asked.stream == mark.stream && asked.at == mark.at &&
             asked.launches == mark.launches;
    };
    if (!same()) asked = mark;
    return asked.query();
  }
  void synchronizeStream(const Stream& stream) const override {
    use(stream.device_index());
    mark_of(stream).wait("stream");
  }
  void synchronizeDevice(DeviceIndex device) const override { wait_for_device(device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

DeviceIndex& current_device() {
  thread_local DeviceIndex device = 0;
  return device;
}
c10::StreamId current_stream(DeviceIndex device) { return stream_of_thread(device); }

void count_launch(DeviceIndex device, const std::string& name) {
  use_for_launch(device);
  ++streams_of(device).launches;
  count(kLaunch, name);
}
void count_wait_for_launches(DeviceIndex device, const std::string& name) {
  use(device);
  mark_of(Stream(Stream::DEFAULT, Device(kCuda, device))).wait(name.c_str());
}
void wait_for_device(DeviceIndex device) {
  count_wait_for_launches(device < 0 ? current_device() : device, "device");
  for (auto& queue : streams_of(device < 0 ? current_device() : device).queues) queue.wait(queue.now());
}

}  // namespace stand_in

// For the other stand-ins: work on a stream, whose handle this is.
extern "C" void rehearsal_submit(void* stream, void (*work)(void*), void* argument) {
  if (!stream) return work(argument);
  static_cast<stand_in::Queue*>(stream)->submit([=] { work(argument); });
}
