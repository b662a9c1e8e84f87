// A stand-in for libcuda.so.1, the driver's library.
//
//   REHEARSAL_DRIVER    the CUDA version that the driver knows, as cuDriverGetVersion tells it (13000)
#include "cards.h"

int cuInit(unsigned flags) {
  (void)flags;
  const int no_device = 100;
  return num_cards() > 0 ? 0 : no_device;
}
int cuDriverGetVersion(int* version) {
  *version = (int)setting("REHEARSAL_DRIVER", 13000);
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = num_cards();
  return 0;
}
