"""The number formats of small states, in NumPy, to the bit: what every kernel must give.

All arithmetic is float32 (+ - *) and uint32/int32; denormal float32 inputs count as zero with their sign kept, and no
decoded value is denormal. bits(x) is the int32 with the bytes of x, value(i) the float32 with the bytes of i.

**Random words.** mix64(z) is what SplitMix64 returns from state z. Each (seed, step, parameter, stream, element >> 32)
has a key

    key = mix64(mix64(mix64(mix64(seed) + step) + parameter) + 2 * (element >> 32) + stream)       (mod 2**64)

with stream 0 for moments and 1 for bfloat16 parameters. Each 128 elements share 16 hashes, one for each lane:

    lane = uint32(element >> 7) * 16 + (element & 15)
    x = lane * 0x9E3779B9 + low32(key);  x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15
    x += high32(key);                    x *= 0x735A2D97;  x ^= x >> 15

and the word of the element is x after (element >> 4) & 7 steps x = x * 0x915F77F5 + 0x6A09E667 (all mod 2**32). So a
kernel that goes through 128 elements 16 at a time hashes once and then multiplies and adds once for each 16. element is
the index in the parameter (its low 32 bits; the others are in the key): the word depends on neither threads, lanes nor
where a parameter was split. Only the high 20 bits of a word are used: the low ones of a congruence are regular.

**8-bit moments.** Blocks of `block` consecutive elements, the last one shorter, each with a scale byte f for m and
one for v. The scale is 2**(f - 127); byte 0 is scale 0, so zeroed memory is a state of zeros; byte 255 is scale NaN.
Bytes 1 to 34 and 254 are never written; a file that has one is damaged.

           code                                         b       B    A
    m      sign << 7 | 4 exponent and 3 mantissa bits   2**-15  896  0x1000FF
    v      5 exponent and 3 mantissa bits, no sign      2**-31  768  0x0FFFFF

    scale    top = max over the block of bits(x) & 0x7FFFFFFF    (as integers, so that a NaN is the largest)
             f = max((top + A) >> 23, 35);  if f > 253 then f = 255 and all codes of the block are 0
    random   r = word >> 12, the same for m and v
    encode   y = abs(x) * 2**(127 - f) + b;  c = ((bits(y) + r) >> 20) - B
             m:  code = (bits(x) >> 24 & 0x80) | c          v:  code = max(c, x > 0)
    decode   y = value((c + B) << 20) - b;  x = y * scale    (m: c = code & 127, and then the sign bit of x is set)

Scales are powers of two and nothing underflows, so the fused forms fma(abs(x), 2**(127 - f), b) and
fma(y, scale, -b * scale) give the same bits. B is 0 in the low 7 (m) or 8 (v) bits, so truncation to them replaces
the subtraction, and | the addition. bits(y) + r < bits(2) since A makes y at most 1.875, hence c never exceeds 127 (m), 255 (v) and needs no clamp; r = 0
truncates. Adding b makes code 0 stand for 0 exactly and the values below b equally spaced (b/8 * scale apart). The
expectation over r of what is read is y - b, which is x * 2**(127 - f) rounded to float32 after adding b; only a v in
(0, b/8 * scale) reads higher, as code 1: nonzero v never becomes 0. Least value of code 1: m 2**-110, v 2**-126.
f > 253 means a NaN, an infinity, or a magnitude above about 1.875 * 2**126: the whole block then reads as NaN. v is >= 0
(or NaN); v of -0.0 is stored as 0.

**bfloat16, rounded at random.** h = (bits(x) + r) >> 16 with r = word >> 16: the same for m and v, stream 1 for
parameters. A NaN gives (bits(x) >> 16) | 0x40. An infinity stays; a magnitude above the largest bfloat16 may become
infinite. Nearest even, for comparison: r = 0x7FFF + (bits(x) >> 16 & 1).

**Split master.** high = (bits(p) + 0x8000) >> 16 is the bfloat16 that the model uses, low = bits(p) - (high << 16) the int16
beside it: bits(p) = (high << 16) + low. A low below 0 beside a high of 0 or -0, which
only a write from outside leaves, counts as 0. Ties go away from zero, not to even: to even, both neighbours of an even high at
distance 0x8000 would have to be kept by one int16. A NaN gives high = (bits(p) >> 16) | 0x40, low = 0. A p above the
largest bfloat16 may have an infinite high, and is still exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WORD = 0xFFFFFFFFFFFFFFFF
FACTORS, TERMS = np.ones(8, np.uint32), np.zeros(8, np.uint32)  # of 0 to 7 steps x = x * 0x915F77F5 + 0x6A09E667
for _step in range(1, 8):
    FACTORS[_step] = int(FACTORS[_step - 1]) * 0x915F77F5 & 0xFFFFFFFF
    TERMS[_step] = int(TERMS[_step - 1]) * 0x915F77F5 + 0x6A09E667 & 0xFFFFFFFF


class Code(NamedTuple):
    """One column of the table above."""

    b: np.float32
    B: int
    A: int
    signed: bool


M = Code(np.float32(2.0**-15), 896, 0x1000FF, True)
V = Code(np.float32(2.0**-31), 768, 0x0FFFFF, False)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def value(i: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(i).astype(np.uint32).view(np.float32)


def mix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def key(seed: int, step: int, parameter: int, stream: int = 0, high: int = 0) -> int:
    inner = mix64(mix64(mix64(seed & WORD) + step & WORD) + parameter & WORD)
    return mix64(inner + 2 * high + stream & WORD)


def words(key: int, elements: np.ndarray) -> np.ndarray:
    """The random words of elements (their low 32 bits), as uint32."""
    elements = elements.astype(np.uint32)
    x = (elements >> 7) * np.uint32(16) + (elements & 15)
    x = x * np.uint32(0x9E3779B9) + np.uint32(key & 0xFFFFFFFF)
    x ^= x >> 16
    x *= np.uint32(0x21F0AAAD)
    x ^= x >> 15
    x += np.uint32(key >> 32)
    x *= np.uint32(0x735A2D97)
    x ^= x >> 15
    steps = elements >> 4 & 7
    return x * FACTORS[steps] + TERMS[steps]


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormals become zeros of their sign."""
    i = bits(x)
    return value(np.where(i & 0x7F800000 == 0, i & 0x80000000, i))


def scale_byte(code: Code, x: np.ndarray) -> int:
    """The scale byte of one block."""
    top = int((bits(flushed(x)) & 0x7FFFFFFF).max())
    f = max(top + code.A >> 23, 35)
    return f if f <= 253 else 255


def encode(code: Code, x: np.ndarray, f: int, r: np.ndarray) -> np.ndarray:
    """The codes of one block; r: random bits below 2**20."""
    if f == 255:
        return np.zeros(x.shape, np.uint8)
    x = flushed(x)
    with np.errstate(under="ignore"):
        y = value(bits(x) & 0x7FFFFFFF) * value(np.uint32((254 - f) << 23)) + code.b
    c = (bits(y) + r.astype(np.uint32) >> 20).astype(np.int64) - code.B
    c = c | (bits(x) >> 24 & 0x80) if code.signed else np.maximum(c, x > 0)
    return c.astype(np.uint8)


def decode(code: Code, c: np.ndarray, f: int) -> np.ndarray:
    """The float32 values of one block."""
    c = c.astype(np.uint32)
    scale = value(np.uint32(0x7FC00000 if f == 255 else f << 23))
    x = (value((c & 127 if code.signed else c) + code.B << 20) - code.b) * scale
    return value(bits(x) | (c & 0x80) << 24) if code.signed else x


def store(code: Code, x: np.ndarray, block: int, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of a whole moment; word: those of its elements."""
    parts = [slice(first, first + block) for first in range(0, x.size, block)]
    scales = np.array([scale_byte(code, x[part]) for part in parts], np.uint8)
    codes = [encode(code, x[part], int(f), word[part] >> 12) for part, f in zip(parts, scales, strict=True)]
    return np.concatenate(codes) if codes else np.empty(0, np.uint8), scales


def read(code: Code, codes: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """The float32 values of a whole moment."""
    parts = [decode(code, codes[i * block : (i + 1) * block], int(f)) for i, f in enumerate(scales)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def bfloat16(x: np.ndarray, r: np.ndarray | None) -> np.ndarray:
    """The bfloat16s of x as uint16; r: random bits below 2**16, None for nearest even."""
    i = bits(flushed(x))
    added = 0x7FFF + (i >> 16 & 1) if r is None else r.astype(np.uint32)
    return np.where(i & 0x7FFFFFFF > 0x7F800000, i >> 16 | 0x40, i + added >> 16).astype(np.uint16)


def from_bfloat16(h: np.ndarray) -> np.ndarray:
    return value(h.astype(np.uint32) << 16)


def split(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 high halves (as uint16) and int16 low halves of float32 parameters."""
    i = bits(p)
    nan = i & 0x7FFFFFFF > 0x7F800000
    high = np.where(nan, i >> 16 | 0x40, i + np.uint32(0x8000) >> 16).astype(np.uint16)
    low = np.where(nan, 0, i - (high.astype(np.uint32) << 16)).astype(np.uint32).astype(np.uint16).view(np.int16)
    return high, low


def joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    magnitude = ((high & 0x7FFF).astype(np.int32) << 16) + low
    return value((high & 0x8000).astype(np.uint32) << 16 | np.maximum(magnitude, 0).astype(np.uint32))
