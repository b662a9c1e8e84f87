// Which cards this process sees, and what is true of them: $REHEARSAL_DEVICES, the driver, $CUDA_VISIBLE_DEVICES.
#include <c10/util/Exception.h>

#include <dlfcn.h>

#include <algorithm>

#include "../cards.h"
#include "stand_in.h"

namespace stand_in {
namespace {

constexpr int kCudaOfLibtorch = 13000;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == ',')
      parts.emplace_back();
    else if (c != ' ')
      parts.back() += c;
  }
  return parts;
}

// As the CUDA runtime reads the variable: numbers or beginnings of UUIDs, up to the first that is none; none at all when
// one comes twice.
std::vector<int> visible_units() {
  std::vector<int> all, cards;
  for (int card = 0; card < num_cards(); ++card) {
    cards.push_back(has_slices() ? slice_unit(card, 0) : card);
    for (int slice = 0; has_slices() && slice < kSlices; ++slice) all.push_back(slice_unit(card, slice));
    if (!has_slices()) all.push_back(card);
  }
  const char* wanted = std::getenv("CUDA_VISIBLE_DEVICES");
  if (!wanted) {
    if (has_slices() && cards.size() > 1) cards.resize(1);  // CUDA enumerates one slice
    return cards;
  }
  std::vector<int> seen;
  for (const auto& name : split(wanted)) {
    std::vector<int> found;
    char* end = nullptr;
    long index = std::strtol(name.c_str(), &end, 10);
    if (!name.empty() && *end == 0) {
      if (index >= 0 && index < static_cast<long>(cards.size())) found.push_back(cards[index]);
    } else if (name.size() > 4) {
      for (int unit : all) {
        char uuid[64];
        write_uuid(unit, uuid, sizeof uuid);
        if (std::string(uuid).compare(0, name.size(), name) == 0) found.push_back(unit);
      }
    }
    if (found.size() != 1) break;
    if (std::count(seen.begin(), seen.end(), found[0])) return {};
    seen.push_back(found[0]);
    if (has_slices()) break;
  }
  return seen;
}

// Of the driver's library, as libtorch's CUDA runtime asks it; 0: none.
int driver_version() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  auto get = library ? reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion")) : nullptr;
  int version = 0;
  return get && get(&version) == 0 ? version : 0;
}
std::string trouble_with_driver() {
  int version = driver_version();
  if (version >= kCudaOfLibtorch) return "";
  if (version == 0)
    return "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver "
           "from "
           "http://www.nvidia.com/Download/index.aspx (stand-in)";
  return "The NVIDIA driver on your system is too old (found version " + std::to_string(version) +
         "). Please update your GPU driver by downloading and installing a new version from the URL: "
         "http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to install a PyTorch "
         "version that has been compiled with your version of the CUDA driver. (stand-in)";
}
const std::vector<int>& units() {
  static const auto* all = [] {
    auto* found = new std::vector<int>;
    if (auto trouble = trouble_with_driver(); trouble.empty())
      *found = visible_units();
    else
      TORCH_WARN("CUDA initialization: ", trouble);
    return found;
  }();
  return *all;
}

}  // namespace

size_t number_from(const char* name, size_t otherwise) { return setting(name, otherwise); }
int num_devices() { return static_cast<int>(units().size()); }
int unit_of(DeviceIndex device) { return units().at(device); }
size_t capacity(DeviceIndex device) { return unit_capacity(unit_of(device)); }
void raise_cuda(int code, const std::string& message, const std::string& name) {
  throw c10::AcceleratorError(
      {__func__, __FILE__, __LINE__}, code,
      "CUDA error: " + message + " (stand-in)\nSearch for `" + name +
          "' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\n"
          "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might "
          "be "
          "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to "
          "enable "
          "device-side assertions.\n");
}
DeviceIndex checked(DeviceIndex device) {
  if (num_devices() == 0) {
    auto trouble = trouble_with_driver();
    TORCH_CHECK(false, trouble.empty() ? "No CUDA GPUs are available (stand-in)" : trouble);
  }
  if (device < 0 || device >= num_devices()) raise_cuda(101, "invalid device ordinal", "cudaErrorInvalidDevice");
  return device;
}

}  // namespace stand_in
