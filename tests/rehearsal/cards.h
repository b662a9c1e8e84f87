// The cards of a rehearsal as all of its processes see them: what each process holds of a card, and which card is lost.
// In C, for every stand-in. The file is $REHEARSAL_SHARED/cards; without that folder a process has cards of its own.
#ifndef REHEARSAL_CARDS_H
#define REHEARSAL_CARDS_H

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kMostCards = 16, kSlices = 7, kMostUnits = kMostCards * (1 + kSlices), kMostProcesses = 256 };

// A unit is a card (its index) or a MIG slice of one (`slice_unit`).
struct RehearsalProcess {
  int pid;
  unsigned long long began;  // in the kernel's ticks: a process id may come again
  unsigned long long held[kMostUnits];
};
struct RehearsalCards {
  unsigned long long launches[kMostUnits];
  int lost[kMostUnits];
  struct RehearsalProcess processes[kMostProcesses];
};

static inline unsigned long long setting(const char* name, unsigned long long otherwise) {
  const char* text = getenv(name);
  return text && *text ? strtoull(text, NULL, 10) : otherwise;
}
static inline int num_cards(void) {
  unsigned long long wanted = setting("REHEARSAL_DEVICES", 1);
  return wanted < kMostCards ? (int)wanted : kMostCards;
}
static inline int has_slices(void) { return setting("REHEARSAL_MIG", 0) != 0; }
static inline int slice_unit(int card, int slice) { return kMostCards + card * kSlices + slice; }
static inline int card_of_unit(int unit) { return unit < kMostCards ? unit : (unit - kMostCards) / kSlices; }
static inline unsigned long long unit_capacity(int unit) {
  unsigned long long card = setting("REHEARSAL_CAPACITY", 2ull << 30);
  return unit < kMostCards ? card : card / 8;  // as an H200's 1g.18gb
}
// "GPU-5a1e0000-…", as NVML tells and CUDA_VISIBLE_DEVICES takes it.
static inline void write_uuid(int unit, char* text, size_t length) {
  if (unit < kMostCards)
    snprintf(text, length, "GPU-5a1e0000-0000-4000-8000-%012x", unit);
  else
    snprintf(text, length, "MIG-5a1e0000-0000-4000-8000-%06x%06x", card_of_unit(unit), (unit - kMostCards) % kSlices);
}

static inline struct RehearsalCards* shared_cards(void) {
  static struct RehearsalCards* cards = NULL;
  struct RehearsalCards* known = __atomic_load_n(&cards, __ATOMIC_ACQUIRE);
  if (known) return known;
  const char* folder = getenv("REHEARSAL_SHARED");
  int file = -1, flags = MAP_SHARED | MAP_ANONYMOUS;
  if (folder) {
    char path[512];
    snprintf(path, sizeof path, "%s/cards", folder);
    file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof *cards)) {
      fprintf(stderr, "stand-in: cannot open %s\n", path);
      abort();
    }
    flags = MAP_SHARED;
  }
  void* mapped = mmap(NULL, sizeof *cards, PROT_READ | PROT_WRITE, flags, file, 0);
  if (file >= 0) close(file);
  if (mapped == MAP_FAILED) abort();
  struct RehearsalCards* none = NULL;
  if (!__atomic_compare_exchange_n(&cards, &none, (struct RehearsalCards*)mapped, 0, __ATOMIC_ACQ_REL,
                                   __ATOMIC_ACQUIRE)) {
    munmap(mapped, sizeof *cards);
    return none;
  }
  return (struct RehearsalCards*)mapped;
}

// When the process began; 0: it is gone, or dead and not yet reaped.
static inline unsigned long long began_at(int pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE* file = fopen(path, "re");
  if (!file) return 0;
  size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[length] = 0;
  char* after_name = strrchr(text, ')');
  char state;
  unsigned long long began;
  if (!after_name ||
      sscanf(after_name + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &state,
             &began) != 2)
    return 0;
  return state == 'Z' || state == 'X' ? 0 : began;
}

// Calls `visit` for each live process's share; forgets the dead.
static inline unsigned long long held_of(int unit) {
  struct RehearsalCards* cards = shared_cards();
  unsigned long long all = 0;
  for (int i = 0; i < kMostProcesses; ++i) {
    struct RehearsalProcess* process = &cards->processes[i];
    int pid = __atomic_load_n(&process->pid, __ATOMIC_ACQUIRE);
    unsigned long long held = __atomic_load_n(&process->held[unit], __ATOMIC_RELAXED);
    if (pid == 0 || held == 0) continue;
    if (began_at(pid) == process->began) all += held;
  }
  return all;
}
// What others than rehearsed programs hold of a card.
static inline unsigned long long foreign_bytes(int unit) {
  return unit < kMostCards ? setting("REHEARSAL_FOREIGN_BYTES", 0) : 0;
}
static inline unsigned long long free_of(int unit) {
  unsigned long long taken = held_of(unit) + foreign_bytes(unit), all = unit_capacity(unit);
  return taken < all ? all - taken : 0;
}

#endif
