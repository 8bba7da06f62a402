// Philox4x32-10 and its normals in vectors: triton/philox.py's polynomials, in its order.
namespace dtta {
namespace DTTA_ISA {

DTTA_INLINE void philox(const Word& quads, uint32_t pair, uint32_t image, uint32_t step, uint64_t seed, Word* words) {
  Wide c0 = widen(quads), c1 = widen(splat_word(pair)), c2 = widen(splat_word(image)), c3 = widen(splat_word(step));
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
    c0 = exclusive3(high(p1), c1, k0);
    c1 = p1;
    c2 = exclusive3(high(p0), c3, k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = narrow(c0);
  words[1] = narrow(c1);
  words[2] = narrow(c2);
  words[3] = narrow(c3);
}

// sqrt(-2 ln((w + 1/2) / 2^32))
DTTA_INLINE Float radius(const Word& w) {
  const Float u = fma(from_unsigned(w), splat(2.3283064365386963e-10f), splat(1.1641532182693481e-10f));
  const Word bits = as_word(u);
  const Word exponent = both(subtract_words(bits, splat_word(0x3F2AAAABu)), splat_word(0xFF800000u));  // u = 2^e (1 + m), |m| <= 1/3
  Float m = subtract(as_float(subtract_words(bits, exponent)), splat(1.0f));
  // near u = 1 the float above has lost what is left of 1 - u; the word has not
  const Float rest = from_unsigned(exclusive(w, splat_word(0xFFFFFFFFu)));
  m = select(is_zero(exponent), fma(rest, splat(-2.3283064365386963e-10f), splat(-1.1641532182693481e-10f)), m);
  Float p = fma(m, splat(0.257833662f), splat(-0.279688766f));
  p = fma(p, m, splat(0.24368523f));
  p = fma(p, m, splat(-0.280117372f));
  p = fma(p, m, splat(0.333609746f));
  p = fma(p, m, splat(-0.400208118f));
  p = fma(p, m, splat(0.499995954f));
  p = fma(p, m, splat(-0.66666432f));
  Float log = multiply(fma(p, m, splat(1.0f)), m);
  log = fma(log, m, multiply(splat(-2.0f), m));
  return root(fma(from_signed(exponent), splat(-1.6525917e-07f), log));  // -2 ln 2 / 2^23
}

// cos and sin of 2 pi (w + 1/2) / 2^32
DTTA_INLINE void cosine_sine(const Word& w, Float* cosine, Float* sine) {
  const Word turned = add_words(w, splat_word(0x20000000u));  // the two top bits are now the nearest quarter turn
  const Float part = from_signed(subtract_words(both(turned, splat_word(0x3FFFFFFFu)), splat_word(0x20000000u)));
  const Float r = fma(part, splat(1.4629180792671596e-09f), splat(7.314590396335798e-10f));  // in [-pi/4, pi/4]
  const Float z = multiply(r, r);
  const Float odd_part = fma(fma(z, splat(-0.000195172989f), splat(0.00833217815f)), z, splat(-0.166666549f));
  const Float even_part = fma(fma(z, splat(2.4433157e-05f), splat(-0.00138873163f)), z, splat(0.0416666457f));
  const Float s = fma(odd_part, multiply(z, r), r);
  const Float c = fma(even_part, multiply(z, z), fma(z, splat(-0.5f), splat(1.0f)));
  const Mask even = is_zero(both(turned, splat_word(0x40000000u)));
  const Word top = splat_word(0x80000000u);
  const Word flip = both(add_words(turned, splat_word(0x40000000u)), top);
  *cosine = as_float(exclusive(as_word(select(even, c, s)), flip));
  *sine = as_float(exclusive(as_word(select(even, s, c)), both(turned, top)));
}

// What is the same for all elements of a row.
struct Stream {
  uint32_t pair, image, step;
  uint64_t seed;
};

// The normals of elements first .. first + 4 kWidth - 1, first a multiple of 4. Lane p of a vector of counters is at
// quad_order()[p], so that a transposition inside each 128-bit block puts consecutive elements side by side.
DTTA_INLINE void normals(const Stream& stream, int64_t first, Float* z) {
  Word words[4];
  const Word quads = add_words(quad_order(), splat_word(static_cast<uint32_t>(first >> 2)));
  philox(quads, stream.pair, stream.image, stream.step, stream.seed, words);
  const Float r0 = radius(words[0]), r1 = radius(words[2]);
  Float c0, s0, c1, s1;
  cosine_sine(words[1], &c0, &s0);
  cosine_sine(words[3], &c1, &s1);
  transpose(multiply(r0, c0), multiply(r0, s0), multiply(r1, c1), multiply(r1, s1), z);
}

}  // namespace DTTA_ISA
}  // namespace dtta
