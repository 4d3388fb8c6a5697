// SPDX-License-Identifier: Apache-2.0
// What this library is, and what this CPU can run of it. Compiled for the plainest CPU.
#include <stdint.h>
#include <unistd.h>

// Changed whenever a signature changes.
int shira_native_version(void) { return 12; }

// The best of the instruction sets that the other files are compiled for: 2 AVX-512, 1 AVX2, 0.
int shira_instruction_set(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
        return 1;
#endif
    return 0;
}

// Bytes of a core's second-level cache; 1 MiB where the system does not say.
int64_t shira_second_level_cache(void) {
    static int64_t size = 0;  // asking takes a while in a virtual machine
    if (!size) {
        int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        size = found > 0 ? found : 1 << 20;
    }
    return size;
}
