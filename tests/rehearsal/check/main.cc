// checks SCENARIO: what the stand-ins must do, in one scenario (check.h).
#include "check.h"

#include <dlfcn.h>

#include <cstring>

int main(int, char** arguments) {
  using namespace check;
  setbuf(stdout, nullptr);
  const struct {
    const char* name;
    void (*run)();
    bool needs_cuda = true;
  } kScenarios[] = {
      {"versions", versions},
      {"operators", operators},
      {"segments", segments},
      {"pages", pages},
      {"shared", shared},
      {"workspaces", workspaces},
      {"determinism", determinism},
      {"polling", polling},
      {"lost", lost},
      {"visible", visible},
      {"slices", slices},
      {"old_driver", old_driver},
      {"collectives", collectives},
      {"in_progress", in_progress},
      {"management", management, false},
  };
  for (const auto& scenario : kScenarios) {
    if (std::strcmp(scenario.name, arguments[1])) continue;
    if (scenario.needs_cuda && !dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL))
      return std::printf("%s\n", dlerror()), 1;
    scenario.run();
    std::printf("%-12s %3d checks, %d failures\n", scenario.name, checks, failures);
    return failures != 0;
  }
  return std::printf("there is no scenario `%s`\n", arguments[1]), 2;
}
