// Vectors of 8 as plain arrays, in loops that a compiler can vectorise, but for fmaf: on x86 without FMA it is a call a lane.
#include <math.h>
#include <stdint.h>

#include "half.h"

namespace dtta {
namespace DTTA_ISA {

constexpr int kWidth = 8;
struct Float {
  float lane[kWidth];
};
struct Word {
  uint32_t lane[kWidth];
};
using Mask = Word;

#define DTTA_LANES(Type, expression)                       \
  Type out;                                                \
  for (int i = 0; i < kWidth; ++i) out.lane[i] = (expression); \
  return out

DTTA_INLINE Float splat(float x) { DTTA_LANES(Float, x); }
DTTA_INLINE Word splat_word(uint32_t x) { DTTA_LANES(Word, x); }
DTTA_INLINE Float add(const Float& a, const Float& b) { DTTA_LANES(Float, a.lane[i] + b.lane[i]); }
DTTA_INLINE Float subtract(const Float& a, const Float& b) { DTTA_LANES(Float, a.lane[i] - b.lane[i]); }
DTTA_INLINE Float multiply(const Float& a, const Float& b) { DTTA_LANES(Float, a.lane[i] * b.lane[i]); }
DTTA_INLINE Float fma(const Float& a, const Float& b, const Float& c) { DTTA_LANES(Float, fmaf(a.lane[i], b.lane[i], c.lane[i])); }
DTTA_INLINE Float root(const Float& a) { DTTA_LANES(Float, sqrtf(a.lane[i])); }
DTTA_INLINE Word add_words(const Word& a, const Word& b) { DTTA_LANES(Word, a.lane[i] + b.lane[i]); }
DTTA_INLINE Word subtract_words(const Word& a, const Word& b) { DTTA_LANES(Word, a.lane[i] - b.lane[i]); }
DTTA_INLINE Word both(const Word& a, const Word& b) { DTTA_LANES(Word, a.lane[i] & b.lane[i]); }
DTTA_INLINE Word exclusive(const Word& a, const Word& b) { DTTA_LANES(Word, a.lane[i] ^ b.lane[i]); }
DTTA_INLINE Float as_float(const Word& a) { DTTA_LANES(Float, bits_float(a.lane[i])); }
DTTA_INLINE Word as_word(const Float& a) { DTTA_LANES(Word, float_bits(a.lane[i])); }
DTTA_INLINE Float from_unsigned(const Word& a) { DTTA_LANES(Float, static_cast<float>(a.lane[i])); }
DTTA_INLINE Float from_signed(const Word& a) { DTTA_LANES(Float, static_cast<float>(static_cast<int32_t>(a.lane[i]))); }
DTTA_INLINE Mask is_zero(const Word& a) { DTTA_LANES(Word, a.lane[i] == 0); }
DTTA_INLINE Mask is_positive(const Float& a) { DTTA_LANES(Word, a.lane[i] > 0.0f); }
DTTA_INLINE Float select(const Mask& mask, const Float& yes, const Float& no) {
  DTTA_LANES(Float, mask.lane[i] ? yes.lane[i] : no.lane[i]);
}

struct Wide {
  uint64_t lane[kWidth];
};
DTTA_INLINE Wide widen(const Word& a) { DTTA_LANES(Wide, a.lane[i]); }
DTTA_INLINE Word narrow(const Wide& a) { DTTA_LANES(Word, static_cast<uint32_t>(a.lane[i])); }
DTTA_INLINE Wide product(const Wide& a, uint32_t b) { DTTA_LANES(Wide, (a.lane[i] & 0xFFFFFFFFu) * b); }
DTTA_INLINE Wide high(const Wide& a) { DTTA_LANES(Wide, a.lane[i] >> 32); }
DTTA_INLINE Wide exclusive3(const Wide& a, const Wide& b, uint32_t c) { DTTA_LANES(Wide, a.lane[i] ^ b.lane[i] ^ c); }

DTTA_INLINE Word quad_order() { return {{0, 2, 4, 6, 1, 3, 5, 7}}; }
DTTA_INLINE void transpose(const Float& z0, const Float& z1, const Float& z2, const Float& z3, Float* out) {
  for (int j = 0; j < 4; ++j) {
    for (int block = 0; block < 2; ++block) {
      const int from = 4 * block + j;
      out[j].lane[4 * block] = z0.lane[from];
      out[j].lane[4 * block + 1] = z1.lane[from];
      out[j].lane[4 * block + 2] = z2.lane[from];
      out[j].lane[4 * block + 3] = z3.lane[from];
    }
  }
}

DTTA_INLINE Float load_float32(const float* from) { DTTA_LANES(Float, from[i]); }
DTTA_INLINE Float load_bfloat16(const uint16_t* from) { DTTA_LANES(Float, from_bfloat16(from[i])); }
DTTA_INLINE Float load_float16(const uint16_t* from) { DTTA_LANES(Float, from_float16(from[i])); }
DTTA_INLINE void store_float32(float* to, const Float& a) {
  for (int i = 0; i < kWidth; ++i) to[i] = a.lane[i];
}
DTTA_INLINE void store_bfloat16(uint16_t* to, const Float& a) {
  for (int i = 0; i < kWidth; ++i) to[i] = to_bfloat16(a.lane[i]);
}
DTTA_INLINE void store_float16(uint16_t* to, const Float& a) {
  for (int i = 0; i < kWidth; ++i) to[i] = to_float16(a.lane[i]);
}

#undef DTTA_LANES

}  // namespace DTTA_ISA
}  // namespace dtta
