// DTTA_INLINE: inlined whatever the compiler's own measure, so that a row's constants leave the loop over its tiles.
#ifndef DTTA_INLINE
#ifdef _MSC_VER
#define DTTA_INLINE __forceinline
#else
#define DTTA_INLINE inline __attribute__((always_inline))
#endif
#endif
