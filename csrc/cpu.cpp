#include "cpu.h"

#include "octavo_c.h"

#if defined(OCTAVO_X86) && defined(_MSC_VER)
#include <windows.h>
#endif

namespace octavo {
namespace {

int detect() {
#if defined(OCTAVO_X86) && defined(_MSC_VER)
    if (IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE)) return OCTAVO_ISA_AVX512;
    if (IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE)) return OCTAVO_ISA_AVX2;
#elif defined(OCTAVO_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (!__builtin_cpu_supports("avx512f")) return OCTAVO_ISA_AVX2;
        const bool vbmi = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                          __builtin_cpu_supports("avx512vnni");
        return vbmi ? OCTAVO_ISA_VBMI : OCTAVO_ISA_AVX512;
    }
#endif
    return OCTAVO_ISA_BASELINE;
}

}  // namespace

int best_isa() {
    static const int isa = detect();
    return isa;
}

}  // namespace octavo

extern "C" {

int octavo_abi(void) { return OCTAVO_ABI; }

const char* octavo_version(void) { return OCTAVO_VERSION; }

int octavo_isa(void) { return octavo::best_isa(); }
}
