#include "device_stream.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace echelon {

size_t DeviceStream::handle() const { return reinterpret_cast<size_t>(stream_.native_handle()); }

void DeviceStream::follow_current() const {
  c10::impl::VirtualGuardImpl device(stream_.device_type());
  c10::Event now(stream_.device_type());
  now.record(device.getStream(stream_.device()));
  now.block(stream_);
}

std::unique_ptr<StreamMark> DeviceStream::mark() const { return std::make_unique<StreamMark>(stream_); }

std::unique_ptr<DeviceStream> side_stream(int32_t cuda_index) {
  c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(cuda_index));
  c10::impl::VirtualGuardImpl guard(device.type());
  guard.setDevice(device);
  return std::make_unique<DeviceStream>(guard.getStreamFromGlobalPool(device));
}

}  // namespace echelon
