#include "dispatch.h"

#include <string.h>

#include <atomic>

namespace {

using dtta::KernelTable;

// Best first. f16c is not asked for: older Clangs do not know its name, and no processor has AVX2 without it.
const KernelTable* supported(const char* name) {
#ifdef DTTA_X86_KERNELS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (name == nullptr || strcmp(name, "avx512") == 0)) return &dtta::kAvx512;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && (name == nullptr || strcmp(name, "avx2") == 0)) return &dtta::kAvx2;
#endif
  return name == nullptr || strcmp(name, "portable") == 0 ? &dtta::kPortable : nullptr;
}

std::atomic<const KernelTable*> in_use{nullptr};

}  // namespace

const KernelTable& dtta::kernels() {
  const KernelTable* table = in_use.load();
  if (table == nullptr) {
    table = supported(nullptr);
    in_use.store(table);
  }
  return *table;
}

int dtta_use_instruction_set(const char* name) {
  const KernelTable* table = supported(name);
  if (table == nullptr) return DTTA_BAD_ARGUMENT;
  in_use.store(table);
  return DTTA_OK;
}

int64_t dtta_abi(void) {
  return int64_t{1000000} * DTTA_ABI_VERSION + int64_t{1000} * static_cast<int64_t>(sizeof(dtta_draws)) +
         static_cast<int64_t>(sizeof(dtta_mixture));
}

const char* dtta_instruction_set(void) { return dtta::kernels().name; }
