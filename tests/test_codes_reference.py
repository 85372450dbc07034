"""The formats of small states keep their promises: they round-trip, round without bias, and hide neither zeros nor NaNs."""

import codes_reference as ref
import ml_dtypes
import numpy as np
import pytest

ALL = np.arange(256, dtype=np.uint8)
CODES = pytest.mark.parametrize("code", [ref.M, ref.V], ids=["m", "v"])
# Statistical tests: fixed seeds, so they pass or fail for ever; a bound of 5 standard deviations would reject a right
# generator with probability 6e-7 for each figure compared.
SIGMAS = 5


def extremes(size):
    """Random bits that truncate, round up wherever they can, and anything between."""
    rng = np.random.default_rng(3)
    return [np.zeros(size), np.full(size, 0xFFFFF), *rng.integers(0, 1 << 20, (20, size))]


def magnitudes(code, f):
    return ref.decode(code, ALL[:128] if code.signed else ALL, f)


@CODES
@pytest.mark.parametrize("f", [35, 36, 100, 127, 200, 253])
def test_every_code_is_read_and_stored_as_itself_under_any_random_bits(code, f):
    x = ref.decode(code, ALL, f)
    assert ref.scale_byte(code, x) == f
    for r in extremes(256):
        np.testing.assert_array_equal(ref.encode(code, x, f, r), ALL)


@CODES
@pytest.mark.parametrize("f", [35, 127, 253])
def test_codes_are_in_the_order_of_their_values_from_zero_and_never_denormal(code, f):
    x = magnitudes(code, f)
    assert x[0] == 0
    assert (np.diff(x) > 0).all()
    assert x[1] >= np.finfo(np.float32).tiny
    if code.signed:
        np.testing.assert_array_equal(ref.decode(code, ALL[128:], f).view(np.uint32), (-x).view(np.uint32))


@CODES
def test_the_distance_of_neighbours_starts_at_an_eighth_of_b_and_doubles_every_eight_codes(code):
    x = magnitudes(code, 127)
    np.testing.assert_allclose(np.diff(x), code.b / 8 * 2.0 ** (np.arange(x.size - 1) // 8), rtol=1e-4)


@CODES
@pytest.mark.parametrize("f", [0, 35, 127, 253])
def test_the_scale_may_be_multiplied_in_before_b_is_taken_away(code, f):
    """Products by powers of two are exact, so a fused multiply-add gives these bits too."""
    codes = ALL[:128] if code.signed else ALL
    y, scale = ref.value(codes.astype(np.uint32) + code.B << 20), ref.value(np.uint32(f << 23))
    np.testing.assert_array_equal(ref.decode(code, codes, f), y * scale - code.b * scale)


@CODES
def test_the_largest_of_a_block_is_never_cut(code):
    rng = np.random.default_rng(0)
    for top in [*np.exp(rng.uniform(-60, 60, 3000)), 1.875, np.nextafter(np.float32(1.875), np.float32(2)), 1.9999999]:
        x = np.float32([top])
        f = ref.scale_byte(code, x)
        low, high = (ref.decode(code, ref.encode(code, x, f, np.array([r])), f)[0] for r in (0, 0xFFFFF))
        assert low <= x[0] * np.float32(1.0001)
        assert high >= x[0] * np.float32(0.9999)
        assert high <= low * 1.1251


@CODES
def test_rounding_is_unbiased(code):
    """The mean of 4000 readings, for every interval between two magnitudes."""
    rng = np.random.default_rng(1)
    levels, repeats = magnitudes(code, 127), 4000
    low, high = levels[1:-1], levels[2:]
    x = (low + rng.uniform(0.05, 0.95, low.size) * (high - low)).astype(np.float32)
    if code.signed:
        x[::2] *= -1
    total = np.zeros(x.size)
    for step in range(repeats):
        r = ref.words(ref.key(1, step, 2), np.arange(x.size)) >> 12
        total += ref.decode(code, ref.encode(code, x, 127, r), 127)
    deviation = np.sqrt((np.abs(x) - low) * (high - np.abs(x)) / repeats)
    assert np.abs((total / repeats - x) / deviation).max() < SIGMAS


@CODES
def test_rounding_over_all_random_bits_has_the_mean_of_the_value(code):
    every = np.arange(1 << 20)
    for x in np.float32([1.0001, 0.3, 0.077, 1e-3, 1.5e-5]):
        low, high = (
            ref.decode(code, ref.encode(code, np.float32([x]), 127, np.array([r])), 127)[0] for r in (0, 0xFFFFF)
        )
        read = ref.decode(code, ref.encode(code, np.full(every.size, x), 127, every), 127)
        assert abs(read.mean(dtype=float) - x) <= (high - low) * 2.0**-19 + x * 2.0**-23


@pytest.mark.parametrize("f", [35, 127, 253])
def test_v_above_zero_is_never_stored_as_zero(f):
    largest = magnitudes(ref.V, f)[-1]
    for ratio in (1.0, 1e-3, 1e-12, 1e-30, 1e-37):
        x = np.float32([largest, max(largest * ratio, np.finfo(np.float32).tiny), 0.0])
        for r in extremes(3):
            read = ref.decode(ref.V, ref.encode(ref.V, x, f, r), f)
            assert (read[:2] > 0).all()
            assert read[2] == 0


@CODES
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, 3e38])
@pytest.mark.parametrize("place", [0, 70, 99])
def test_what_a_block_cannot_hold_makes_all_of_it_nan(code, bad, place):
    x = np.linspace(0.5, 1, 100, dtype=np.float32)
    x[place] = bad
    codes, scales = ref.store(code, x, 64, ref.words(ref.key(0, 0, 0), np.arange(100)))
    read = ref.read(code, codes, scales, 64)
    hit = slice(0, 64) if place < 64 else slice(64, 100)
    assert np.isnan(read[hit]).all()
    assert np.isnan(read).sum() == read[hit].size
    assert not codes[hit].any()


@CODES
def test_zeroed_memory_is_a_state_of_zeros(code):
    assert not ref.read(code, np.zeros(100, np.uint8), np.zeros(2, np.uint8), 64).any()
    assert not ref.read(code, *ref.store(code, np.zeros(100, np.float32), 64, np.zeros(100, np.uint32)), 64).any()


@CODES
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_a_short_last_block_has_a_scale_of_its_own(code, size, block):
    x = np.exp(np.linspace(-3, 9, size)).astype(np.float32)
    codes, scales = ref.store(code, x, block, np.zeros(size, np.uint32))
    assert scales.size == -(-size // block)
    np.testing.assert_allclose(ref.read(code, codes, scales, block), x, rtol=0.13, atol=x.max(initial=0) * 2.0**-18)


@CODES
def test_tiny_blocks_are_kept_as_far_as_float32_reaches(code):
    x = np.float32([1.5 * 2.0**-93, 2.0**-120, 2.0**-126, 0])
    read = ref.decode(code, ref.encode(code, x, ref.scale_byte(code, x), np.zeros(4)), 35)
    assert abs(read[0] / x[0] - 1) < 0.13
    if not code.signed:
        assert (read[:3] > 0).all()


def test_bfloat16_rounds_up_as_often_as_the_sixteen_bits_say():
    every = np.arange(1 << 16)
    for x in np.float32([1.00001, -0.3, 1e-30, 3e30]):
        assert ref.from_bfloat16(ref.bfloat16(np.full(every.size, x), every)).mean(dtype=float) == pytest.approx(
            float(x), rel=1e-12
        )


def test_bfloat16_keeps_nan_infinity_and_zero_under_any_random_bits():
    x = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0, 0x80000000], np.uint32).view(
        np.float32
    )
    for r in (0, 0xFFFF):
        read = ref.from_bfloat16(ref.bfloat16(x, np.full(x.size, r)))
        assert np.isnan(read[:3]).all()
        np.testing.assert_array_equal(read[3:].view(np.uint32), x[3:].view(np.uint32))


def test_bfloat16_to_nearest_is_that_of_ml_dtypes():
    x = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32).view(np.float32)
    x = ref.flushed(x[~np.isnan(x)])
    x[:4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF], np.uint32).view(np.float32)
    np.testing.assert_array_equal(ref.bfloat16(x, None), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_the_halves_of_a_split_master_are_the_exact_float32():
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32)
    edges = np.array([0, 0x8000, 0x18000, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 1], np.uint32)
    p = np.concatenate([random, edges, np.arange(0x3F7F0000, 0x3F820000, dtype=np.uint32)]).view(np.float32)
    high, low = ref.split(p)
    finite = ~np.isnan(p)
    np.testing.assert_array_equal(ref.joined(high, low)[finite].view(np.uint32), p[finite].view(np.uint32))
    assert np.isnan(ref.from_bfloat16(high[~finite])).all()
    assert np.isnan(ref.joined(high, low)[~finite]).all()


def test_the_high_half_is_the_nearest_bfloat16():
    p = np.random.default_rng(1).standard_normal(1 << 16).astype(np.float32)
    high, nearest = ref.split(p)[0], ref.bfloat16(p, None)
    tie = ref.bits(p) & 0xFFFF == 0x8000
    np.testing.assert_array_equal(high[~tie], nearest[~tie])
    up = np.uint32([0x3F808000, 0x3F818000]).view(np.float32)
    np.testing.assert_array_equal(ref.split(up)[0], [0x3F81, 0x3F82])


def smoothed(keep, b2, steps, shrink):
    """Mean of v over that of float32, of 1024 elements whose gradients shrink 10 times; keep: what v reads as."""
    rng = np.random.default_rng(4)
    exact = v = np.zeros(1024, np.float32)
    b2, rest = np.float32(b2), np.float32(1 - b2)
    for step in range(steps):
        g = rng.standard_normal(1024, np.float32) * np.float32(0.1 if step >= shrink else 1)
        exact = b2 * exact + rest * g * g
        v = keep(b2 * v + rest * g * g, ref.words(ref.key(5, step, 0), np.arange(1024)))
    return float((v / exact).mean(dtype=float))


def bfloat16_at_random(v, word):
    return ref.from_bfloat16(ref.bfloat16(v, word >> 16))


def in_eight_bits(v, word):
    f = ref.scale_byte(ref.V, v)
    return ref.decode(ref.V, ref.encode(ref.V, v, f, word >> 12), f)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "tolerance"), [(bfloat16_at_random, 0.01), (in_eight_bits, 0.04)])
def test_v_follows_gradients_that_shrink(keep, tolerance):
    """Each element scatters by 5 % (bfloat16), 22 % (8 bits): the tolerances are 6 deviations of the mean of 1024."""
    assert smoothed(keep, 0.999, 5000, 500) == pytest.approx(1, abs=tolerance)


def test_v_in_bfloat16_to_nearest_does_not():
    assert smoothed(lambda v, word: ref.from_bfloat16(ref.bfloat16(v, None)), 0.999, 5000, 500) > 2


def signs(words):
    """+1 and -1 for each of the 20 bits that are used."""
    return 1.0 - 2.0 * (words[..., None] >> np.arange(12, 32, dtype=np.uint32) & 1)


def assert_uncorrelated(a, b):
    """Each bit of a with each bit of b: 400 correlations of mean 0 and deviation 1 / sqrt(n)."""
    assert np.abs(signs(a).T @ signs(b)).max() < (SIGMAS + 1) * np.sqrt(a.size)


SIZE = 1 << 15


def drawn(seed=1, step=5, parameter=3, stream=0, high=0, first=0):
    return ref.words(ref.key(seed, step, parameter, stream, high), np.arange(first, first + SIZE))


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_bits_of_the_words_are_even(step):
    words = drawn(step=step)
    assert np.abs(signs(words).sum(axis=0)).max() < SIGMAS * np.sqrt(SIZE)
    for shift in (12, 16, 20, 24):
        counts = np.bincount(words >> np.uint32(shift) & 255, minlength=256)
        assert abs(((counts - SIZE / 256) ** 2).sum() / (SIZE / 256) - 255) < SIGMAS * np.sqrt(510)


@pytest.mark.parametrize(
    "other",
    [{"first": 1}, {"first": 2}, {"first": 16}, {"first": 112}, {"first": 128}, {"step": 6}, {"step": 7}, {"parameter": 4}, {"stream": 1},
     {"high": 1}, {"seed": 2}, {"step": 3, "parameter": 5}, {"first": 1, "step": 6}],
    ids=str,
)  # fmt: skip
def test_words_of_other_elements_steps_and_parameters_are_uncorrelated(other):
    assert_uncorrelated(drawn(), drawn(**other))


def test_words_are_uncorrelated_at_any_distance():
    """Sums over 40 steps for 4096 distances; a structure of the generator would add up."""
    total = np.zeros(4097)
    for step in range(40):
        u = drawn(step=step)[:16384] / 2.0**32 - 0.5
        total += np.fft.irfft(np.abs(np.fft.rfft(u, 32768)) ** 2)[:4097]
    assert np.abs(total[1:]).max() < (SIGMAS + 1) * np.sqrt(40 * 16384) / 12


def test_an_element_is_rounded_up_as_often_as_its_bits_say_and_so_is_a_step():
    """The numbers of steps in which an element, and of elements in which a step, rounds up are binomial."""
    up = np.array([drawn(step=step)[:4096] >> 12 < 11_534 for step in range(500)])  # 1.1 %, as v does when it decays
    p = 11_534 / 2**20
    for counts, trials in ((up.sum(axis=0), 500), (up.sum(axis=1), 4096)):
        normal = (counts - trials * p) / np.sqrt(trials * p * (1 - p))
        assert abs(normal.mean()) < SIGMAS / np.sqrt(normal.size)
        assert abs(normal.var() - 1) < SIGMAS * np.sqrt(2.2 / normal.size)


def test_words_do_not_depend_on_where_an_array_was_cut():
    whole = drawn()
    np.testing.assert_array_equal(whole[1000:], ref.words(ref.key(1, 5, 3), np.arange(1000, SIZE)))


def test_fixed_words():
    """The stored states of a run go on from them: they may not change."""
    assert ref.key(0, 1, 0) == 0xD100827AA323C935
    words = ref.words(ref.key(0, 1, 0), np.array([0, 1, 16, 127, 128, 2**32 - 1]))
    expected = ["ca745151", "0d4b453e", "4b375fec", "73e6c1a3", "5477ce7a", "62e910db"]
    assert [f"{x:08x}" for x in words] == expected
    x = int(words[0])
    for element in range(16, 128, 16):
        x = (x * 0x915F77F5 + 0x6A09E667) & 0xFFFFFFFF
        assert ref.words(ref.key(0, 1, 0), np.array([element])) == x
