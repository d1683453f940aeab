#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace gapo {
namespace cpu {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef GAPO_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kBaseline);
  return found;
}

}  // namespace

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
  for (const Kernels* set : available()) names.push_back(set->name);
  return names;
}

const Kernels& kernels(const char* name) {
  static const std::vector<const Kernels*> sets = available();
  if (name == nullptr || *name == '\0') return *sets.front();
  std::string accepted;
  for (const Kernels* set : sets) {
    if (set->name == std::string(name)) return *set;
    accepted += std::string(accepted.empty() ? "" : ", ") + set->name;
  }
  throw std::invalid_argument("isa: found " + std::string(name) +
                              ", accepted on this processor: " + accepted);
}

}  // namespace cpu
}  // namespace gapo
