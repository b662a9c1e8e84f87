#pragma once
#include <chrono>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
constexpr auto kNoTimeout = std::chrono::milliseconds(0);
constexpr auto kTimeoutDefault = std::chrono::seconds(30);
}  // namespace gloo
