"""Philox4x32-10 (Salmon et al., SC 2011) and normals derived from it, inside a Triton kernel.

Applies Box–Muller to the exact uniforms (w + ½) / 2³². The logarithm keeps its relative precision near u = 1 and the angle is reduced in
integer arithmetic, so there is no slow path, no table and no stack use.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Generates four words from uint32 counters and a 64-bit key, given as two uint32 words."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius(w):
    """Computes √(−2 ln((w + ½) / 2³²)) of uint32 words."""
    u = tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # u = 2ᵉ · (1 + m) with m in [−⅓, ⅓]
    m = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # near u = 1 the float above has lost the precision of 1 − u; the integer word still has it
    m = tl.where(exponent == 0, tl.fma((w ^ 0xFFFFFFFF).to(tl.float32), -2.3283064365386963e-10, -1.1641532182693481e-10), m)
    # −2 ln(1 + m) / m³ + 2/m² − 1/m, minimax on [−⅓, ⅓]: 5e-9 relative in the logarithm
    p = tl.fma(m, 0.257833662, -0.279688766)
    p = tl.fma(p, m, 0.24368523)
    p = tl.fma(p, m, -0.280117372)
    p = tl.fma(p, m, 0.333609746)
    p = tl.fma(p, m, -0.400208118)
    p = tl.fma(p, m, 0.499995954)
    p = tl.fma(p, m, -0.66666432)
    log = tl.fma(p, m, 1.0) * m
    log = tl.fma(log, m, -2.0 * m)
    return tl.sqrt(tl.fma(exponent.to(tl.float32), -1.6525917e-07, log))  # −2 ln 2 · 2⁻²³


@triton.jit
def _cosine_sine(w):
    """Computes cos and sin of 2π (w + ½) / 2³² of uint32 words."""
    turned = w + 0x20000000  # the top two bits now hold the nearest quarter turn
    part = ((turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32)
    r = tl.fma(part, 1.4629180792671596e-09, 7.314590396335798e-10)  # in [−π/4, π/4]
    z = r * r
    # minimax in z on [0, (π/4)²]: 4e-9 and 1e-10 relative
    s = tl.fma(tl.fma(tl.fma(z, -0.000195172989, 0.00833217815), z, -0.166666549), z * r, r)
    c = tl.fma(tl.fma(tl.fma(z, 2.4433157e-05, -0.00138873163), z, 0.0416666457), z * z, tl.fma(z, -0.5, 1.0))
    odd = (turned & 0x40000000) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ ((turned + 0x40000000) & 0x80000000)).to(tl.float32, bitcast=True)
    sine = (sine.to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)).to(tl.float32, bitcast=True)
    return cosine, sine


@triton.jit
def _quad(quads, pair, image, step, k0, k1):
    """Generates the normals for the four elements of each counter."""
    zero = quads & 0
    w0, w1, w2, w3 = philox(quads, zero + pair, zero + image, zero + step, k0, k1)
    r0, r1 = _radius(w0), _radius(w2)
    c0, s0 = _cosine_sine(w1)
    c1, s1 = _cosine_sine(w3)
    return r0 * c0, r0 * s0, r1 * c1, r1 * s1


@triton.jit
def _interleave(z0, z1, z2, z3, WIDTH: tl.constexpr):
    """Interleaves z_i[n] as element 4n + i, so that a thread's four elements are adjacent and stored as one vector."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (WIDTH,))


@triton.jit
def normals(first, pair, image, step, seed, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Generates standard normals [WIDTH], float32, for elements first .. first + WIDTH − 1 (first is a multiple of 8).

    Each thread holds VECTOR adjacent elements: 4 float32 elements or 8 elements of a 16-bit type fill 16 bytes.
    """
    pair, image, step = pair.to(tl.uint32), image.to(tl.uint32), step.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    if VECTOR == 4:
        quads = (first // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)
        z0, z1, z2, z3 = _quad(quads, pair, image, step, k0, k1)
        noise = _interleave(z0, z1, z2, z3, WIDTH)
    else:
        quads = (first // 4 + 2 * tl.arange(0, WIDTH // 8)).to(tl.uint32)
        z0, z1, z2, z3 = _quad(quads, pair, image, step, k0, k1)
        z4, z5, z6, z7 = _quad(quads + 1, pair, image, step, k0, k1)
        noise = _interleave(tl.join(z0, z4), tl.join(z1, z5), tl.join(z2, z6), tl.join(z3, z7), WIDTH)
    return noise
