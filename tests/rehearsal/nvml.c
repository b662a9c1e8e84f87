// A stand-in for libnvidia-ml.so.1: all cards of the rehearsal, whatever CUDA_VISIBLE_DEVICES says, as the real one does.
//
//   REHEARSAL_NAME      of each card ("NVIDIA H200")
//   REHEARSAL_NVLINKS   links that are up (4; 0 with MIG)
//   REHEARSAL_MIG=1     each card is divided into seven slices of an eighth of its memory; CUDA sees one of them
//   REHEARSAL_NVML      "mismatch": the library is of another version than the driver; "missing" is `rehearse`'s
//   REHEARSAL_DRIVER, REHEARSAL_CAPACITY, REHEARSAL_FOREIGN_BYTES: see driver.c and cuda/share.cc
#include "cards.h"

enum {
  kSuccess = 0,
  kInvalidArgument = 2,
  kNotSupported = 3,
  kNotFound = 6,
  kInsufficientSize = 7,
  kIsLost = 15,
  kVersionMismatch = 18,
};

struct MemoryV1 {
  unsigned long long total, free, used;
};
struct MemoryV2 {
  unsigned version;
  unsigned long long total, reserved, free, used;
};
struct Process {
  unsigned pid;
  unsigned long long used;
  unsigned gpu_instance, compute_instance;
};

// A handle is a unit (cards.h) plus one.
static int unit_of(void* device) { return (int)(size_t)device - 1; }
static void* handle_of(int unit) { return (void*)(size_t)(unit + 1); }
static int is_slice(int unit) { return unit >= kMostCards; }
static int is_lost(int unit) { return __atomic_load_n(&shared_cards()->lost[card_of_unit(unit)], __ATOMIC_RELAXED); }
static int write_text(char* to, unsigned length, const char* text) {
  if (strlen(text) >= length) return kInsufficientSize;
  strcpy(to, text);
  return kSuccess;
}

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  const char* mode = getenv("REHEARSAL_NVML");
  return mode && strcmp(mode, "mismatch") == 0 ? kVersionMismatch : kSuccess;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return kSuccess; }
const char* nvmlErrorString(int code) {
  switch (code) {
    case kSuccess: return "Success";
    case kInvalidArgument: return "Invalid Argument (stand-in)";
    case kNotSupported: return "Not Supported (stand-in)";
    case kNotFound: return "Not Found (stand-in)";
    case kInsufficientSize: return "Insufficient Size (stand-in)";
    case kIsLost: return "GPU is lost (stand-in)";
    case kVersionMismatch: return "Driver/library version mismatch (stand-in)";
  }
  return "Unknown Error (stand-in)";
}

int nvmlSystemGetCudaDriverVersion_v2(int* version) {
  *version = (int)setting("REHEARSAL_DRIVER", 13000);
  return kSuccess;
}
int nvmlSystemGetCudaDriverVersion(int* version) { return nvmlSystemGetCudaDriverVersion_v2(version); }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  static const struct {
    int cuda;
    const char* driver;
  } kKnown[] = {
      {13000, "580.65.06"}, {12080, "570.86.10"}, {12040, "550.54.14"}, {12020, "535.54.03"}, {0, "520.61.05"}};
  const int cuda = (int)setting("REHEARSAL_DRIVER", 13000);
  int i = 0;
  while (kKnown[i].cuda > cuda) ++i;
  return write_text(version, length, kKnown[i].driver);
}
int nvmlSystemGetNVMLVersion(char* version, unsigned length) { return write_text(version, length, "13.580.65.06"); }

int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = (unsigned)num_cards();
  return kSuccess;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  if (index >= (unsigned)num_cards()) return kInvalidArgument;
  *device = handle_of((int)index);
  return is_lost((int)index) ? kIsLost : kSuccess;
}
int nvmlDeviceGetUUID(void* device, char* uuid, unsigned length) {
  char text[64];
  write_uuid(unit_of(device), text, sizeof text);
  return is_lost(unit_of(device)) ? kIsLost : write_text(uuid, length, text);
}
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  for (int unit = 0; unit < kMostUnits; ++unit) {
    if (card_of_unit(unit) >= num_cards() || (is_slice(unit) && !has_slices())) continue;
    char text[64];
    write_uuid(unit, text, sizeof text);
    if (strcmp(uuid, text)) continue;
    *device = handle_of(unit);
    return is_lost(unit) ? kIsLost : kSuccess;
  }
  return kNotFound;
}
int nvmlDeviceGetIndex(void* device, unsigned* index) {
  *index = (unsigned)unit_of(device);
  return is_slice((int)*index) ? kNotSupported : kSuccess;
}
int nvmlDeviceGetName(void* device, char* name, unsigned length) {
  const char* told = getenv("REHEARSAL_NAME");
  char text[96];
  snprintf(text, sizeof text, "%s%s", told ? told : "NVIDIA H200", is_slice(unit_of(device)) ? " MIG 1g.18gb" : "");
  return is_lost(unit_of(device)) ? kIsLost : write_text(name, length, text);
}

// Of a card with slices: what its slices hold.
static unsigned long long used_of(int unit) {
  unsigned long long used = held_of(unit) + foreign_bytes(unit);
  for (int slice = 0; has_slices() && !is_slice(unit) && slice < kSlices; ++slice)
    used += held_of(slice_unit(unit, slice));
  return used < unit_capacity(unit) ? used : unit_capacity(unit);
}
int nvmlDeviceGetMemoryInfo_v2(void* device, struct MemoryV2* info) {
  const int unit = unit_of(device);
  if (is_lost(unit)) return kIsLost;
  info->total = unit_capacity(unit);
  info->reserved = 0;
  info->used = used_of(unit);
  info->free = info->total - info->used;
  return kSuccess;
}
int nvmlDeviceGetMemoryInfo(void* device, struct MemoryV1* info) {
  struct MemoryV2 all;
  const int code = nvmlDeviceGetMemoryInfo_v2(device, &all);
  if (code == kSuccess) info->total = all.total, info->free = all.free, info->used = all.used;
  return code;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void* device, unsigned* count, struct Process* processes) {
  const int unit = unit_of(device);
  if (is_lost(unit)) return kIsLost;
  unsigned found = 0;
  const unsigned room = *count;
  for (int i = 0; i < kMostProcesses; ++i) {
    const struct RehearsalProcess* process = &shared_cards()->processes[i];
    const int pid = __atomic_load_n(&process->pid, __ATOMIC_ACQUIRE);
    if (pid == 0 || process->held[unit] == 0 || began_at(pid) != process->began) continue;
    if (found < room && processes) {
      const struct Process one = {(unsigned)pid, process->held[unit], ~0u, ~0u};
      processes[found] = one;
    }
    ++found;
  }
  *count = found;
  return found > room ? kInsufficientSize : kSuccess;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void* device, unsigned* count, struct Process* processes) {
  return nvmlDeviceGetComputeRunningProcesses_v3(device, count, processes);
}

int nvmlDeviceGetMigMode(void* device, unsigned* now, unsigned* pending) {
  if (is_slice(unit_of(device))) return kInvalidArgument;
  *now = *pending = (unsigned)has_slices();
  return kSuccess;
}
int nvmlDeviceGetMaxMigDeviceCount(void* device, unsigned* count) {
  (void)device;
  *count = kSlices;
  return kSuccess;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void* device, unsigned index, void** slice) {
  if (!has_slices() || is_slice(unit_of(device))) return kNotSupported;
  if (index >= kSlices) return kInvalidArgument;
  *slice = handle_of(slice_unit(unit_of(device), (int)index));
  return kSuccess;
}
int nvmlDeviceIsMigDeviceHandle(void* device, unsigned* is) {
  *is = (unsigned)is_slice(unit_of(device));
  return kSuccess;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void* slice, void** device) {
  if (!is_slice(unit_of(slice))) return kInvalidArgument;
  *device = handle_of(card_of_unit(unit_of(slice)));
  return kSuccess;
}

int nvmlDeviceGetNvLinkState(void* device, unsigned link, int* active) {
  if (is_lost(unit_of(device))) return kIsLost;
  if (has_slices()) return kNotSupported;
  *active = link < setting("REHEARSAL_NVLINKS", 4);
  return kSuccess;
}
