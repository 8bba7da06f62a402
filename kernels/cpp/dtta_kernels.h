/* The C ABI of dtta_fast's CPU kernels. */
#ifndef DTTA_KERNELS_H
#define DTTA_KERNELS_H

#include <stdint.h>

#if defined(_WIN32) && defined(DTTA_BUILD)
#define DTTA_API __declspec(dllexport)
#elif defined(_WIN32)
#define DTTA_API __declspec(dllimport)
#else
#define DTTA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Philox4x32-10 (Salmon et al., SC 2011): for each of `count` counters of four 32-bit words, four words of output.
 * counters, words: [count][4], which may be the same memory. key: [2]. */
DTTA_API void dtta_philox4x32_10(const uint32_t* counters, const uint32_t* key, int64_t count, uint32_t* words);

#ifdef __cplusplus
}
#endif
#endif
