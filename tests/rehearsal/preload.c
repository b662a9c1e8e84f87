// For LD_PRELOAD: a program that leaves by _exit still tells the stand-in's totals, and what the programs call of the CUDA
// runtime is the stand-in's, though libtorch brings the real library too.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

void _exit(int code) {
  void (*report)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "rehearsal_report");
  if (report) report();
  for (;;) syscall(SYS_exit_group, code);
}

enum { kNoDevice = 100 };

int cudaHostRegister(void* address, size_t bytes, unsigned flags) {
  int (*lock)(void*, size_t, unsigned) = (int (*)(void*, size_t, unsigned))dlsym(RTLD_DEFAULT, "rehearsal_lock_pages");
  return lock ? lock(address, bytes, flags) : kNoDevice;
}

int cudaHostUnregister(void* address) {
  int (*unlock)(void*) = (int (*)(void*))dlsym(RTLD_DEFAULT, "rehearsal_unlock_pages");
  return unlock ? unlock(address) : kNoDevice;
}
