// Vectors of 16 for AVX-512.
#include <immintrin.h>
#include <stdint.h>

namespace dtta {
namespace DTTA_ISA {

constexpr int kWidth = 16;
using Float = __m512;
using Word = __m512i;
using Mask = __mmask16;

DTTA_INLINE Float splat(float x) { return _mm512_set1_ps(x); }
DTTA_INLINE Word splat_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
DTTA_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
DTTA_INLINE Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
DTTA_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
DTTA_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
DTTA_INLINE Float root(Float a) { return _mm512_sqrt_ps(a); }
DTTA_INLINE Word add_words(Word a, Word b) { return _mm512_add_epi32(a, b); }
DTTA_INLINE Word subtract_words(Word a, Word b) { return _mm512_sub_epi32(a, b); }
DTTA_INLINE Word both(Word a, Word b) { return _mm512_and_si512(a, b); }
DTTA_INLINE Word exclusive(Word a, Word b) { return _mm512_xor_si512(a, b); }
DTTA_INLINE Float as_float(Word a) { return _mm512_castsi512_ps(a); }
DTTA_INLINE Word as_word(Float a) { return _mm512_castps_si512(a); }
DTTA_INLINE Float from_unsigned(Word a) { return _mm512_cvtepu32_ps(a); }
DTTA_INLINE Float from_signed(Word a) { return _mm512_cvtepi32_ps(a); }
DTTA_INLINE Mask is_zero(Word a) { return _mm512_testn_epi32_mask(a, a); }
DTTA_INLINE Mask is_positive(Float a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ); }
DTTA_INLINE Float select(Mask mask, Float yes, Float no) { return _mm512_mask_blend_ps(mask, no, yes); }

// 32-bit words in the low halves of 64-bit lanes, so that a product needs no shuffle; the high halves are anything
struct Wide {
  __m512i even, odd;
};
DTTA_INLINE Wide widen(Word a) { return {a, _mm512_srli_epi64(a, 32)}; }
DTTA_INLINE Word narrow(const Wide& a) {
  return as_word(_mm512_mask_moveldup_ps(as_float(a.even), 0xAAAA, as_float(a.odd)));
}
DTTA_INLINE Wide product(const Wide& a, uint32_t b) {
  return {_mm512_mul_epu32(a.even, splat_word(b)), _mm512_mul_epu32(a.odd, splat_word(b))};
}
DTTA_INLINE Wide high(const Wide& a) { return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)}; }
DTTA_INLINE Wide exclusive3(const Wide& a, const Wide& b, uint32_t c) {
  return {_mm512_ternarylogic_epi32(a.even, b.even, splat_word(c), 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, splat_word(c), 0x96)};
}

DTTA_INLINE Word quad_order() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
DTTA_INLINE void transpose(Float z0, Float z1, Float z2, Float z3, Float* out) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z0, z1)), b = _mm512_castps_pd(_mm512_unpacklo_ps(z2, z3));
  const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(z0, z1)), d = _mm512_castps_pd(_mm512_unpackhi_ps(z2, z3));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

DTTA_INLINE Float load_float32(const float* from) { return _mm512_loadu_ps(from); }
DTTA_INLINE Float load_bfloat16(const uint16_t* from) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}
DTTA_INLINE Float load_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
DTTA_INLINE void store_float32(float* to, Float a) { _mm512_storeu_ps(to, a); }
DTTA_INLINE void store_bfloat16(uint16_t* to, Float a) {
  const Word bits = as_word(a), top = _mm512_srli_epi32(bits, 16);
  const Word rounded = _mm512_srli_epi32(add_words(add_words(bits, splat_word(0x7FFF)), both(top, splat_word(1))), 16);
  const Mask nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);  // rounding could carry a NaN into infinity
  const Word words = _mm512_mask_or_epi32(rounded, nan, top, splat_word(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
}
DTTA_INLINE void store_float16(uint16_t* to, Float a) {
  const __m256i halves = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

}  // namespace DTTA_ISA
}  // namespace dtta
