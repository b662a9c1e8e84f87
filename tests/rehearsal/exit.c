// For LD_PRELOAD: a program that leaves by _exit still tells the stand-in's totals.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

void _exit(int code) {
  void (*report)(void) = (void (*)(void))dlsym(RTLD_DEFAULT, "rehearsal_report");
  if (report) report();
  for (;;) syscall(SYS_exit_group, code);
}
