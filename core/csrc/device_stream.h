// A stream of an accelerator beside the current one, as far as communication needs it. Device-generic: no CUDA headers.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <memory>
#include "rust/cxx.h"

namespace echelon {

// A point in a stream's work.
class StreamMark {
 public:
  explicit StreamMark(c10::Stream stream) : event_(stream.device_type()) { event_.record(stream); }
  bool is_reached() const { return event_.query(); }

 private:
  c10::Event event_;
};

class DeviceStream {
 public:
  explicit DeviceStream(c10::Stream stream) : stream_(stream) {}
  // The stream as the device's own libraries know it (a cudaStream_t).
  size_t handle() const;
  // What is enqueued from now on begins after all that the current stream of this thread has so far.
  void follow_current() const;
  // Everything enqueued so far.
  std::unique_ptr<StreamMark> mark() const;

 private:
  c10::Stream stream_;
};

// Also makes the device the calling thread's current one.
std::unique_ptr<DeviceStream> side_stream(int32_t cuda_index);
}  // namespace echelon
