// Vectors of 8 for AVX2, FMA and F16C.
#include <immintrin.h>
#include <stdint.h>

namespace dtta {
namespace DTTA_ISA {

constexpr int kWidth = 8;
using Float = __m256;
using Word = __m256i;
using Mask = __m256;

DTTA_INLINE Float splat(float x) { return _mm256_set1_ps(x); }
DTTA_INLINE Word splat_word(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
DTTA_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
DTTA_INLINE Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
DTTA_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
DTTA_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
DTTA_INLINE Float root(Float a) { return _mm256_sqrt_ps(a); }
DTTA_INLINE Word add_words(Word a, Word b) { return _mm256_add_epi32(a, b); }
DTTA_INLINE Word subtract_words(Word a, Word b) { return _mm256_sub_epi32(a, b); }
DTTA_INLINE Word both(Word a, Word b) { return _mm256_and_si256(a, b); }
DTTA_INLINE Word exclusive(Word a, Word b) { return _mm256_xor_si256(a, b); }
DTTA_INLINE Float as_float(Word a) { return _mm256_castsi256_ps(a); }
DTTA_INLINE Word as_word(Float a) { return _mm256_castps_si256(a); }
DTTA_INLINE Float from_signed(Word a) { return _mm256_cvtepi32_ps(a); }
// both halves are exact, so the fma rounds once, as the missing instruction would
DTTA_INLINE Float from_unsigned(Word a) {
  return fma(from_signed(_mm256_srli_epi32(a, 16)), splat(65536.0f), from_signed(both(a, splat_word(0xFFFF))));
}
DTTA_INLINE Mask is_zero(Word a) { return as_float(_mm256_cmpeq_epi32(a, _mm256_setzero_si256())); }
DTTA_INLINE Mask is_positive(Float a) { return _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ); }
DTTA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm256_blendv_ps(no, yes, mask); }

// 32-bit words in the low halves of 64-bit lanes, so that a product needs no shuffle; the high halves are anything
struct Wide {
  __m256i even, odd;
};
DTTA_INLINE Wide widen(Word a) { return {a, _mm256_srli_epi64(a, 32)}; }
DTTA_INLINE Word narrow(const Wide& a) { return _mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA); }
DTTA_INLINE Wide product(const Wide& a, uint32_t b) {
  return {_mm256_mul_epu32(a.even, splat_word(b)), _mm256_mul_epu32(a.odd, splat_word(b))};
}
DTTA_INLINE Wide high(const Wide& a) { return {_mm256_srli_epi64(a.even, 32), _mm256_srli_epi64(a.odd, 32)}; }
DTTA_INLINE Wide exclusive3(const Wide& a, const Wide& b, uint32_t c) {
  return {exclusive(exclusive(a.even, b.even), splat_word(c)), exclusive(exclusive(a.odd, b.odd), splat_word(c))};
}

DTTA_INLINE Word quad_order() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
DTTA_INLINE void transpose(Float z0, Float z1, Float z2, Float z3, Float* out) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z0, z1)), b = _mm256_castps_pd(_mm256_unpacklo_ps(z2, z3));
  const __m256d c = _mm256_castps_pd(_mm256_unpackhi_ps(z0, z1)), d = _mm256_castps_pd(_mm256_unpackhi_ps(z2, z3));
  out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
  out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
  out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
  out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
}

DTTA_INLINE __m128i load_half(const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
DTTA_INLINE Float load_float32(const float* from) { return _mm256_loadu_ps(from); }
DTTA_INLINE Float load_bfloat16(const uint16_t* from) {
  return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16));
}
DTTA_INLINE Float load_float16(const uint16_t* from) { return _mm256_cvtph_ps(load_half(from)); }
DTTA_INLINE void store_float32(float* to, Float a) { _mm256_storeu_ps(to, a); }
DTTA_INLINE void store_bfloat16(uint16_t* to, Float a) {
  const Word bits = as_word(a), top = _mm256_srli_epi32(bits, 16);
  const Word rounded = _mm256_srli_epi32(add_words(add_words(bits, splat_word(0x7FFF)), both(top, splat_word(1))), 16);
  const Mask nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);  // rounding could carry a NaN into infinity
  const Word words = as_word(select(nan, as_float(_mm256_or_si256(top, splat_word(0x40))), as_float(rounded)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
DTTA_INLINE void store_float16(uint16_t* to, Float a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace DTTA_ISA
}  // namespace dtta
