// What the programs did with the device: totals, and where in the program it was done.
//
//   REHEARSAL_REPORT     file to append totals to at exit ("-": stderr)
//   REHEARSAL_SITES      file to append to at exit where launches, waits and uploads were, and where the memory was
//                        fullest (see sites.py)
//   REHEARSAL_ALL_NAMES  totals of every operator, not of the 40 most frequent
//   REHEARSAL_TRACE      file to append every launch, wait and copy to
#include <dlfcn.h>
#include <execinfo.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "stand_in.h"

namespace stand_in {
namespace {

const char* const kKindNames[kKinds] = {
    "launches",           "host waits for the device", "copies host to device", "copies device to host",
    "copies on a device", "copies between devices",    "of the copies: pinned", "index tensors taken from the host"};
// The word in the file of sites; null: not kept there.
const char* const kSiteNames[kKinds] = {"launches", "waits", "uploads"};

// These outlive the end of the process, when threads still compute.
struct Counters {
  std::atomic<uint64_t> totals[kKinds]{}, bytes[kKinds]{};
  std::mutex mutex;
  std::map<std::pair<int, std::string>, uint64_t> by_name;
  std::map<std::tuple<int, std::string, Frames>, uint64_t> sites;
};
Counters& counters() {
  static auto* all = new Counters;
  return *all;
}

void write_site(FILE* file, uint64_t times, const char* kind, const std::string& name, const Frames& frames) {
  std::fprintf(file, "%lu\t%s\t%s", times, kind, name.c_str());
  for (void* frame : frames)
    if (Dl_info info; dladdr(frame, &info) && info.dli_fname)
      std::fprintf(file, "\t%s %lx", info.dli_fname,
                   static_cast<char*>(frame) - static_cast<char*>(info.dli_fbase) - 1);
  std::fprintf(file, "\n");
}

void write_sites() {
  FILE* file = std::fopen(std::getenv("REHEARSAL_SITES"), "a");
  if (!file) return;
  flock(fileno(file), LOCK_EX);  // processes of a rehearsal end at once
  for (auto& [site, times] : counters().sites)
    write_site(file, times, kSiteNames[std::get<0>(site)], std::get<1>(site), std::get<2>(site));
  for (int device = 0; device < num_devices(); ++device) {
    auto fullest = fullest_moment(static_cast<DeviceIndex>(device));
    write_site(file, fullest.bytes, "fullest", "cuda:" + std::to_string(device), fullest.where);
  }
  std::fclose(file);
}

}  // namespace

FILE* trace() {
  static FILE* file = std::getenv("REHEARSAL_TRACE") ? std::fopen(std::getenv("REHEARSAL_TRACE"), "a") : nullptr;
  return file;
}
bool wants_sites() {
  static const bool wants = std::getenv("REHEARSAL_SITES") != nullptr;
  return wants;
}
Frames stack_here() {
  Frames frames(128);
  frames.resize(backtrace(frames.data(), frames.size()));
  return frames;
}

void count(Kind kind, const std::string& name, size_t bytes) {
  auto& all = counters();
  ++all.totals[kind];
  all.bytes[kind] += bytes;
  Frames frames;
  if (wants_sites() && kSiteNames[kind]) frames = stack_here();
  std::lock_guard<std::mutex> lock(all.mutex);
  ++all.by_name[{kind, name}];
  if (!frames.empty()) ++all.sites[{kind, name, std::move(frames)}];
  if (trace()) std::fprintf(trace(), "%d %d %s %zu %s\n", getpid(), gettid(), kKindNames[kind], bytes, name.c_str());
}

void report() {
  static std::atomic<bool> told{false};
  const char* path = std::getenv("REHEARSAL_REPORT");
  if (!path || told.exchange(true)) return;
  FILE* out = std::strcmp(path, "-") ? std::fopen(path, "a") : stderr;
  if (!out) return;
  flock(fileno(out), LOCK_EX);
  auto& all = counters();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::fprintf(out, "--- stand-in for CUDA, process %d (%s)\n", getpid(), program_invocation_short_name);
  for (int kind = 0; kind < kKinds; ++kind)
    std::fprintf(out, "%12lu %s (%lu bytes)\n", all.totals[kind].load(), kKindNames[kind], all.bytes[kind].load());
  report_memory(out);
  std::vector<std::pair<uint64_t, std::pair<int, std::string>>> rows;
  for (auto& [name, times] : all.by_name) rows.push_back({times, name});
  std::sort(rows.rbegin(), rows.rend());
  size_t shown = std::getenv("REHEARSAL_ALL_NAMES") ? rows.size() : std::min<size_t>(rows.size(), 40);
  for (size_t i = 0; i < shown; ++i)
    std::fprintf(out, "%12lu   %s: %s\n", rows[i].first, kKindNames[rows[i].second.first],
                 rows[i].second.second.c_str());
  std::fflush(out);
  flock(fileno(out), LOCK_UN);
  if (wants_sites()) write_sites();
  if (trace()) std::fflush(trace());
}

}  // namespace stand_in

// For programs that leave by _exit (../preload.c).
extern "C" void rehearsal_report() { stand_in::report(); }
