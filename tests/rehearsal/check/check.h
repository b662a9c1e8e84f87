// Checks of the stand-ins: each scenario is a process of its own, with the settings that `rehearse check` gives it.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

namespace check {

inline int checks = 0, failures = 0;

template <class Condition>
void expect(Condition&& condition, const char* text, const char* file, int line) {
  ++checks;
  try {
    if (condition()) return;
    std::printf("FAILED %s:%d: %s\n", file, line, text);
  } catch (const std::exception& error) {
    std::printf("THREW %s:%d: %s\n   %.400s\n", file, line, text, error.what());
  }
  ++failures;
}

// Whether `body` raises an error with these words in it.
template <class Body>
bool raises(Body&& body, const char* words) {
  try {
    body();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return true;
    std::printf("   raised instead: %.400s\n", error.what());
  }
  return false;
}

void operators();   // one or two devices, the allocator's defaults
void versions();    // libtorch is the one that the stand-ins are made for
void segments();    // the allocator's segments
void pages();       // its expandable segments
void shared();      // one card, several processes
void workspaces();  // of cuBLAS, and the context
void determinism();
void polling();
void lost();     // a card
void visible();  // CUDA_VISIBLE_DEVICES
void slices();   // MIG
void old_driver();
void collectives();  // NCCL
void in_progress();  // NCCL, not blocking
void management();   // NVML

}  // namespace check

#define EXPECT(...) check::expect([&]() -> bool { return (__VA_ARGS__); }, #__VA_ARGS__, __FILE__, __LINE__)
