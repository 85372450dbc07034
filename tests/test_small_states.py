"""The numbers of small states: moments in bfloat16 and 8 bits, split masters, bfloat16 variables rounded at random."""

from __future__ import annotations

import codes_reference as codes
import fastadam
import numpy as np
import pytest
from helpers import slow
from small_state_cases import (
    BF16,
    BLOCK,
    F32,
    MOMENTS,
    VARIABLES,
    as_bits,
    assert_same_bits,
    first_values,
    flat,
    gradient_of,
    slots_of,
)

SIZES = (0, 1, 5, 127, 128, 129, 300, 5003)


class Reference:
    """Steps one variable by the definition: decode, the float32 step of ``adam_step``, encode."""

    def __init__(self, variable, moments, kind, *, seed, number, amsgrad=False):
        self.variable, self.moments, self.kind = variable, moments, kind
        self.seed, self.number = seed, number
        names = ("m", "v", *(["vhat"] if amsgrad else []))
        self.slots = {name: np.zeros(variable.size, F32) for name in names}
        self.stored = {}
        self.low = np.zeros(variable.size, np.int16)

    def step(self, gradient, t, **options):
        elements = np.arange(self.variable.size)
        word = codes.words(codes.key(self.seed, t, self.number), elements)
        values = flat(self.variable)
        master = codes.joined(as_bits(values), self.low) if self.kind == "split" else values.astype(F32)
        wide = {name: array.copy() for name, array in self.slots.items()}
        fastadam.adam_step(master, gradient.reshape(-1), **wide, step=t, **options)
        for name, array in wide.items():
            if self.moments == "bfloat16":
                self.stored[name] = codes.bfloat16(array, word >> 16)
                self.slots[name] = codes.from_bfloat16(self.stored[name])
            elif self.moments == "8bit":
                code = codes.M if name == "m" else codes.V
                self.stored[name], self.stored[f"{name}_scale"] = codes.store(code, array, BLOCK, word)
                self.slots[name] = codes.read(code, self.stored[name], self.stored[f"{name}_scale"], BLOCK)
            else:
                self.stored[name] = self.slots[name] = array
        if self.kind == "split":
            high, self.low = codes.split(master)
            as_bits(values)[...] = high
        elif self.kind == "rounded":
            own = codes.words(codes.key(self.seed, t, self.number, stream=1), elements)
            as_bits(values)[...] = codes.bfloat16(master, own >> 16)
        else:
            values[...] = master.astype(values.dtype)


def check_against_reference(moments, kind, sizes=SIZES, steps=4, dtype_of_gradients=F32, amsgrad=False, **options):
    dtype, more = VARIABLES[kind]
    variables = [first_values(i, size, dtype) for i, size in enumerate(sizes)]
    small = {"moments": moments, "float32_for": 0 if moments != "float32" else None, "seed": 7}
    optimizer = fastadam.AdamW(0.01, **small, **more, amsgrad=amsgrad, **{"weight_decay": 0.0, **options})
    references = [
        Reference(variable.copy(), moments, kind, seed=7, number=i, amsgrad=amsgrad)
        for i, variable in enumerate(variables)
    ]
    for t in range(1, steps + 1):
        gradients = [gradient_of(t, i, size, dtype_of_gradients) for i, size in enumerate(sizes)]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        for reference, gradient in zip(references, gradients, strict=True):
            reference.step(gradient, t, learning_rate=0.01, **options)
    for i, (variable, reference) in enumerate(zip(variables, references, strict=True)):
        assert_same_bits(variable, reference.variable, f"variable {i}")
        slots = slots_of(optimizer, variable)
        for name, array in reference.stored.items():
            assert np.array_equal(as_bits(slots[name]), as_bits(array)), (i, name)
        if kind == "split":
            assert np.array_equal(slots["low"], reference.low), i


# ---- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIABLES)
@pytest.mark.parametrize("moments", MOMENTS)
def test_steps_have_the_bits_of_the_definition(moments, kind, isa):
    check_against_reference(moments, kind)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
@pytest.mark.parametrize("kind", ["split", *slow("float32", "rounded")])
def test_bits_do_not_depend_on_the_number_of_threads(moments, kind, threads):
    fastadam.set_num_threads(threads)
    check_against_reference(moments, kind, sizes=(70_001, 129, 40_000), steps=2)


@pytest.mark.parametrize(("kind", "dtype"), [
    *((kind, BF16) for kind in ("float32", "bfloat16", "split", "rounded")), ("float32", np.float16),
])  # fmt: skip
def test_half_gradients_are_read_as_they_are(kind, dtype, isa):
    check_against_reference("8bit", kind, sizes=(300, 5003), dtype_of_gradients=dtype)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("kind", VARIABLES)
def test_weight_decay_and_a_bound_of_elements_count_as_in_float32(moments, kind, isa):
    check_against_reference(moments, kind, sizes=(300, 5003), weight_decay=0.1, clipvalue=0.5)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("bound", ["clipnorm", "global_clipnorm"])
def test_norms_are_clipped_as_in_float32(moments, bound):
    check_against_reference(moments, "float32", sizes=(5003,), **{bound: 0.25})


def test_amsgrad_with_bfloat16_moments(isa):
    check_against_reference("bfloat16", "float32", amsgrad=True)
    check_against_reference("bfloat16", "split", amsgrad=True)


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_the_order_of_memory_is_the_order_of_elements(moments):
    """A variable in Fortran order has the bits of its transpose."""
    a = np.asfortranarray(first_values(0, 6000, F32).reshape(60, 100))
    b = a.T.copy()
    first, second = (fastadam.Adam(0.01, moments=moments) for _ in range(2))
    for t in range(3):
        gradient = gradient_of(t, 0, 6000).reshape(60, 100)
        first.apply_gradients([(gradient, a)])
        second.apply_gradients([(gradient.T, b)])
    assert_same_bits(np.ascontiguousarray(a.T), b)
    for name, array in slots_of(second, b).items():
        assert_same_bits(flat(slots_of(first, a)[name]), flat(array), name)
    assert np.array_equal(first.get_slot(a, "m").T, second.get_slot(b, "m"))


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_split_master_trains_as_float32_does_to_the_bit(moments):
    """Its high halves are the float32 variable, rounded; also without small moments."""
    wide = first_values(0, 5000, BF16).astype(F32)
    halves = wide.astype(BF16)
    optimizers = [fastadam.AdamW(0.01, moments=moments, master=master) for master in (None, "split")]
    for t in range(20):
        gradient = gradient_of(t, 0, 5000)
        for optimizer, variable in zip(optimizers, (wide, halves), strict=True):
            optimizer.apply_gradients([(gradient, variable)])
    high, low = codes.split(wide)
    assert np.array_equal(as_bits(halves), high)
    assert np.array_equal(optimizers[1].get_slot(halves, "low"), low)
    for name in ("m", "v"):
        assert_same_bits(optimizers[1].get_slot(halves, name), optimizers[0].get_slot(wide, name))


def test_nan_and_infinity_stay_visible():
    for kind in VARIABLES:
        for moments in MOMENTS:
            dtype, more = VARIABLES[kind]
            w = np.ones(5000, dtype)
            optimizer = fastadam.Adam(0.01, moments=moments, **more)
            gradient = np.ones(5000, F32)
            gradient[[3, 4500]] = np.nan, np.inf
            optimizer.apply_gradients([(gradient, w)])
            wide = w.astype(F32)
            assert np.isnan(wide[3])
            assert np.isfinite(wide[200:4400]).all()
            assert np.isnan(optimizer.get_slot(w, "m").astype(F32)[3])


# ---- what is right in the mean -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_v_does_not_drift_after_gradients_shrink(moments):
    """bfloat16 to nearest gives a ratio of 8.

    The mean ratio of 2^16 independent elements has a standard error of 0.0003 (bfloat16) and 0.0013 (8 bits), so that
    another seed would fail with a probability below 1e-12.
    """
    size = 2**16
    small, wide = (np.zeros(size, F32) for _ in range(2))
    optimizers = fastadam.Adam(1e-3, moments=moments, seed=3), fastadam.Adam(1e-3)
    rng = np.random.default_rng(0)
    for t in range(1500):
        gradient = rng.standard_normal(size, F32) * F32(1.0 if t < 500 else 0.1)
        for optimizer, variable in zip(optimizers, (small, wide), strict=True):
            optimizer.apply_gradients([(gradient, variable)])
    v = [optimizer.get_slot(w, "v").astype(np.float64) for optimizer, w in zip(optimizers, (small, wide), strict=True)]
    ratio = v[0] / v[1]
    assert ratio.std() / 2**8 < 0.0014  # the standard error
    assert abs(v[0].mean() / v[1].mean() - 1) < 0.01
    assert abs(ratio.mean() - 1) < 0.01
    assert v[0].min() > 0


@pytest.mark.parametrize("options", [{"master": "split"}, {"stochastic_rounding": True}])
def test_bfloat16_variables_learn(options):
    """Steps of 1e-3 from 1.0 are a quarter of a unit in the last place of bfloat16: to nearest, nothing moves.

    Rounded at random, the mean of 2^14 elements has a standard error of about 0.004 * sqrt(100) / 2^7 = 3e-4.
    """
    size, steps = 2**14, 100
    w, nearest = np.ones(size, BF16), np.ones(size, BF16)
    wide = np.ones(size, F32)
    optimizers = fastadam.Adam(1e-3, **options), fastadam.Adam(1e-3), fastadam.Adam(1e-3)
    for _ in range(steps):
        for optimizer, variable in zip(optimizers, (w, nearest, wide), strict=True):
            optimizer.apply_gradients([(np.ones(size, F32), variable)])
    assert (nearest == 1).all()
    assert abs(w.astype(np.float64).mean() - wide.astype(np.float64).mean()) < 0.002
    assert wide.mean() < 0.91


def test_a_second_moment_above_zero_never_becomes_zero():
    """In a block of mixed scales: linear and dynamic codes make 20 % of v zero there, and the updates explode."""
    size = 2**14
    rng = np.random.default_rng(5)
    scale = np.exp(2 * rng.standard_normal(size)).astype(F32)
    w, wide = np.zeros(size, F32), np.zeros(size, F32)
    optimizers = fastadam.Adam(1e-3, moments="8bit"), fastadam.Adam(1e-3)
    for _ in range(300):
        gradient = rng.standard_normal(size).astype(F32) * scale
        for optimizer, variable in zip(optimizers, (w, wide), strict=True):
            optimizer.apply_gradients([(gradient, variable)])
    assert (optimizers[0].get_slot(w, "v") > 0).all()
    assert 0.9 < np.sqrt((w.astype(np.float64) ** 2).mean() / (wide.astype(np.float64) ** 2).mean()) < 1.1


def test_seeds_and_numbers_make_other_noise():
    def trained(seed):
        variables = [np.ones(5000, F32) for _ in range(2)]
        optimizer = fastadam.Adam(0.01, moments="8bit", seed=seed)
        for t in range(3):
            optimizer.apply_gradients([(gradient_of(t, 0, 5000), variable) for variable in variables])
        return variables

    first, second = trained(0), trained(1)
    assert (first[0] == trained(0)[0]).all()
    assert (first[0] != first[1]).mean() > 0.5
    assert (first[0] != second[0]).mean() > 0.5
    assert (trained(2**64 - 1)[0] != first[0]).mean() > 0.5
