// bfloat16 and float16 in whole numbers, for code without instructions for them. Internal linkage: read under several sets of flags.
#ifndef DTTA_HALF_H
#define DTTA_HALF_H

#include <stdint.h>
#include <string.h>

namespace dtta {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float from_bfloat16(uint16_t half) { return bits_float(uint32_t{half} << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = float_bits(x), top = bits >> 16;
  const uint32_t rounded = (bits + 0x7FFFu + (top & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? top | 0x40u : rounded);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7FFFu;
  if (rest >= 0x7C00u) return bits_float(sign | 0x7F800000u | (rest << 13));                     // infinity, NaN
  if (rest < 0x0400u) return bits_float(sign | float_bits(static_cast<float>(rest) * 0x1p-24f));  // subnormal
  return bits_float(sign | ((rest << 13) + 0x38000000u));
}

inline uint16_t to_float16(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (rest > 0x7F800000u) {
    half = 0x7E00u | ((rest >> 13) & 0x3FFu);
  } else if (rest >= 0x47800000u) {
    half = 0x7C00u;
  } else if (rest < 0x38800000u) {
    half = float_bits(bits_float(rest) + 0.5f) - 0x3F000000u;  // the sum's last bit is the smallest subnormal: it does the rounding
  } else {
    half = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace dtta
#endif
