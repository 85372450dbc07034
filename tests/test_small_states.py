"""Moments in bfloat16 and 8 bits, masters in two halves, bfloat16 variables that are rounded at random."""

from __future__ import annotations

import copy
import pickle
import re

import codes_reference as codes
import fastadam
import ml_dtypes
import numpy as np
import pytest
from fastadam._core.parts import parts_of

F32, BF16 = np.float32, ml_dtypes.bfloat16
BLOCK = 128
SIZES = (0, 1, 5, 127, 128, 129, 300, 5003)
MOMENTS = ("float32", "bfloat16", "8bit")
VARIABLES = {  # name: dtype of the variable, options
    "float32": (F32, {}),
    "bfloat16": (BF16, {}),
    "float16": (np.float16, {}),
    "split": (BF16, {"master": "split"}),
    "rounded": (BF16, {"stochastic_rounding": True}),
}


def flat(array):
    return array.reshape(-1, order="A")


def as_bits(array):
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def assert_same_bits(actual, expected, what=""):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert np.array_equal(as_bits(actual), as_bits(expected)), what


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


def slots_of(optimizer, variable):
    _, state, _, _ = parts_of(optimizer)
    entry = next(entry for entry in state.entries if entry.buffer is not None and entry.buffer.source is variable)
    return state.slots.slots_of(entry)


def gradient_of(t, i, size, dtype=F32):
    """Of mixed scales, with zeros."""
    rng = np.random.default_rng(1000 * t + i)
    values = rng.standard_normal(size) * np.exp2(rng.integers(-12, 3, size))
    values[rng.random(size) < 0.05] = 0
    return values.astype(dtype)


def first_values(i, size, dtype):
    return np.random.default_rng(i).standard_normal(size).astype(dtype)


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
@pytest.mark.parametrize("kind", ["float32", "split", "rounded"])
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


# ---- which variables ---------------------------------------------------------------------------------------------------


def kinds(optimizer, *variables):
    return [{"uint8": "8bit"}.get(slots_of(optimizer, v)["m"].dtype.name, slots_of(optimizer, v)["m"].dtype.name)
            for v in variables]  # fmt: skip


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_small_variables_keep_float32_beside_large_ones(moments):
    """They have the bits of an optimizer without small moments, and the large ones those of one of their own."""
    w, b = first_values(0, 4096, F32), first_values(1, 4095, F32)
    alone, wide = w.copy(), b.copy()
    optimizer = fastadam.AdamW(0.01, moments=moments, global_clipnorm=1e9)
    only_large, only_small = fastadam.AdamW(0.01, moments=moments), fastadam.AdamW(0.01)
    for t in range(3):
        g, h = gradient_of(t, 0, 4096), gradient_of(t, 1, 4095)
        optimizer.apply_gradients([(g, w), (h, b)])
        only_large.apply_gradients([(g, alone)])
        only_small.apply_gradients([(h, wide)])
    assert kinds(optimizer, w, b) == [moments, "float32"]
    assert_same_bits(w, alone)
    assert_same_bits(b, wide)
    assert [a.shape for a in optimizer.get_weights()][:5] == [(), (4096,), (4095,), (4096,), (4095,)]


RULES = {
    "none": (None, [True, False, False]),
    "zero": (0, [False, False, False]),
    "size": (5001, [True, True, False]),
    "names": (["^bias", "tab.e"], [True, False, True]),
    "name in the middle": (["ernel"], [False, True, False]),
    "function": (lambda name, shape: name == "table" or shape == (5000,), [False, True, True]),
}


@pytest.mark.parametrize("rule", RULES)
def test_float32_for(rule):
    float32_for, expected = RULES[rule]
    shapes = {"bias": (100,), "kernel": (5000,), "table": (100, 60)}
    variables = [fastadam.Variable(np.zeros(shape, F32), name) for name, shape in shapes.items()]
    optimizer = fastadam.Adam(moments="8bit", float32_for=float32_for)
    optimizer.build(variables)
    assert [kind == "float32" for kind in kinds(optimizer, *(v.value for v in variables))] == expected


def test_float32_for_is_asked_for_the_name_and_shape_of_arrays_without_names():
    asked = []
    optimizer = fastadam.Adam(moments="8bit", float32_for=lambda *given: bool(asked.append(given)))
    w = np.zeros((70, 70), F32)
    for _ in range(2):
        optimizer.apply_gradients([(np.ones_like(w), w)])
    assert asked == [("", (70, 70))]


def test_float32_for_must_answer_true_or_false():
    optimizer = fastadam.Adam(moments="8bit", float32_for=lambda name, shape: None)
    with pytest.raises(TypeError, match="float32_for: None, expected True or False"):
        optimizer.build([np.zeros(5000, F32)])


def rows(table, *ids):
    return fastadam.IndexedSlices(np.full((len(ids), *table.shape[1:]), 0.5, F32), list(ids))


@pytest.mark.parametrize("sparse_update", ["dense", "deferred", "deferred_fast", "lazy"])
@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_tables_keep_float32(sparse_update, moments):
    table, other = np.ones((100, 64), F32), np.ones((100, 64), F32)
    w = first_values(0, 5000, F32)
    optimizer = fastadam.Adam(0.01, moments=moments, sparse_update=sparse_update)
    reference = fastadam.Adam(0.01, sparse_update=sparse_update)
    for t in range(4):
        optimizer.apply_gradients([(rows(table, t, 7), table), (gradient_of(t, 0, 5000), w)])
        reference.apply_gradients([(rows(other, t, 7), other)])
    assert kinds(optimizer, table, w) == ["float32", moments]
    optimizer.sync()
    reference.sync()
    assert_same_bits(table, other)
    optimizer.apply_gradients([(np.ones_like(table), table)])  # a dense gradient later


@pytest.mark.parametrize("sparse_update", ["dense", "deferred", "lazy"])
@pytest.mark.parametrize("options", [
    ({"moments": "8bit"}, "with moments='8bit', expected a dense one; name tables with float32_for="),
    ({"moments": "bfloat16"}, "with moments='bfloat16', expected a dense one; name tables with float32_for="),
    ({"master": "split"}, "with master='split', expected a dense one"),
    ({"stochastic_rounding": True}, "with stochastic_rounding=True, expected a dense one"),
])  # fmt: skip
@pytest.mark.parametrize("before", ["build", "one step", "three steps"])
def test_a_sparse_gradient_for_what_has_small_states_is_refused(options, sparse_update, before):
    options, message = options
    table = np.ones((100, 64), BF16)
    optimizer = fastadam.Adam(0.01, sparse_update=sparse_update, **options)
    optimizer.build([table])
    for _ in range({"build": 0, "one step": 1, "three steps": 3}[before]):
        optimizer.apply_gradients([(np.ones_like(table), table)])
    weights, values = optimizer.get_weights(), table.copy()
    with pytest.raises(ValueError, match=re.escape(f"vars[0]: a sparse gradient {message}")):
        optimizer.apply_gradients([(rows(table, 3), table)])
    assert_same_bits(table, values)
    for array, expected in zip(optimizer.get_weights(), weights, strict=True):
        assert_same_bits(np.asarray(array), np.asarray(expected))


# ---- what goes together, and what does not -----------------------------------------------------------------------------

BAD = {
    "moments": ({"moments": "fp8"}, ValueError, "moments: 'fp8', expected 'float32', 'bfloat16', '8bit' or None"),
    "moments number": ({"moments": 8}, TypeError, "moments: 8, expected 'float32', 'bfloat16', '8bit' or None"),
    "moments dtype": ({"moments": np.float32}, TypeError, "moments: <class 'numpy.float32'>, expected 'float32'"),
    "moments list": ({"moments": ["8bit"]}, TypeError, "moments: ['8bit'], expected"),
    "master": ({"master": "both"}, ValueError, "master: 'both', expected 'split' or None"),
    "master array": ({"master": np.ones(2)}, TypeError, "master: array([1., 1.]), expected 'split' or None"),
    "master bool": ({"master": True}, TypeError, "master: True, expected 'split' or None"),
    "master float32": ({"master": "float32"}, ValueError, "for float32 masters pass float32 variables"),
    "rounding": ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding: 1, expected True or False"),
    "rounding of a master": ({"stochastic_rounding": True, "master": "split"}, ValueError,
                             "stochastic_rounding: True with master='split', whose masters are exact, expected False"),
    "seed": ({"seed": -1}, ValueError, "seed: -1, expected 0 <= seed < 2**64"),
    "seed large": ({"seed": 2**64}, ValueError, "expected 0 <= seed < 2**64"),
    "seed float": ({"seed": 1.0}, TypeError, "seed: 1.0, expected an integer"),
    "seed bool": ({"seed": True}, TypeError, "seed: True, expected an integer"),
    "float32_for negative": ({"moments": "8bit", "float32_for": -1}, ValueError, "float32_for: -1, expected a size of"),
    "float32_for float": ({"moments": "8bit", "float32_for": 4096.0}, TypeError, "float32_for: 4096.0, expected a size"),
    "float32_for bool": ({"moments": "8bit", "float32_for": True}, TypeError, "float32_for: True, expected a size"),
    "float32_for text": ({"moments": "8bit", "float32_for": "bias"}, TypeError, "float32_for: 'bias', expected a size"),
    "float32_for dtype": ({"moments": "8bit", "float32_for": np.float32}, TypeError, "float32_for: <class 'numpy.float32'>"),
    "float32_for pattern": ({"moments": "8bit", "float32_for": ["a", "("]}, ValueError, "float32_for[1]: "),
    "float32_for variable": ({"moments": "8bit", "float32_for": [np.ones(2)]}, (TypeError, ValueError), "float32_for[0]: "),
    "float32_for for nothing": ({"float32_for": 10}, ValueError, "float32_for: 10 with moments=None, expected None"),
    "float32_for for float32": ({"moments": "float32", "float32_for": []}, ValueError,
                                "float32_for: [] with moments='float32', expected None"),
    "amsgrad": ({"moments": "8bit", "amsgrad": True}, ValueError, "amsgrad: True with moments='8bit', expected False"),
    "ema": ({"master": "split", "use_ema": True}, ValueError, "use_ema: True with master='split', expected False"),
    "torch's name": ({"moments_dtype": "bfloat16"}, TypeError, "did you mean moments?"),
    "torch's master": ({"master_weights": True}, TypeError, "did you mean master?"),
    "bitsandbytes's name": ({"min_8bit_size": 4096}, TypeError, "did you mean float32_for?"),
}  # fmt: skip


@pytest.mark.parametrize("cls", [fastadam.Adam, fastadam.AdamW])
@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_in_the_options(mistake, cls):
    options, error, message = BAD[mistake]
    with pytest.raises(error, match=re.escape(message)):
        cls(**options)


LATER = {
    "amsgrad": ({"moments": "8bit"}, "amsgrad", True, "amsgrad: True with moments='8bit'"),
    "use_ema": ({"master": "split"}, "use_ema", True, "use_ema: True with master='split'"),
}


@pytest.mark.parametrize("mistake", LATER)
def test_mistakes_that_are_set_later(mistake):
    options, name, value, message = LATER[mistake]
    optimizer = fastadam.Adam(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is False


@pytest.mark.parametrize("name", ["moments", "master", "stochastic_rounding", "float32_for", "seed"])
def test_formats_cannot_be_set_later(name):
    optimizer = fastadam.Adam(moments="8bit", float32_for=100, seed=3)
    value = getattr(optimizer, name)
    with pytest.raises(AttributeError, match=f"{name}: chosen when the optimizer is made"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value


def test_variables_that_cannot_have_small_states():
    for dtype, options, message in [
        (
            np.float64,
            {"moments": "8bit"},
            "vars[1]: float64 with moments='8bit', expected float32, bfloat16 or float16",
        ),
        (np.float64, {"moments": "bfloat16"}, "vars[1]: float64 with moments='bfloat16'"),
        (
            np.float16,
            {"master": "split"},
            "vars[1]: float16 with master='split', expected bfloat16, float32 or float64",
        ),
    ]:
        optimizer = fastadam.Adam(**options)
        w, bad = np.zeros(5000, F32), np.zeros(5000, dtype)
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.apply_gradients([(np.ones_like(v), v) for v in (w, bad)])
        assert (optimizer.iterations, len(optimizer.weights), w.any()) == (0, 1, False)


def test_float64_variables_keep_their_moments_where_float32_for_says_so():
    w, small = np.zeros(5000), np.zeros(10)
    optimizer = fastadam.Adam(moments="8bit", float32_for=lambda name, shape: True)
    optimizer.apply_gradients([(np.ones(5000), w), (np.ones(10), small)])
    assert kinds(optimizer, w, small) == ["float64", "float64"]
    fastadam.Adam(moments="bfloat16").apply_gradients([(np.ones(10), small)])


def test_a_split_master_needs_no_half_of_float32_variables():
    w, b, wide = np.ones(5000, BF16), np.ones(10, F32), np.ones(10)
    optimizer = fastadam.Adam(master="split")
    optimizer.apply_gradients([(np.ones_like(v), v) for v in (w, b, wide)])
    assert [("low" in slots_of(optimizer, v)) for v in (w, b, wide)] == [True, False, False]
    assert optimizer.get_slot(w, "low").dtype == np.int16


def test_variables_on_a_gpu_are_refused(gpu):
    optimizer = fastadam.Adam(moments="8bit")
    w = gpu.array(np.ones(5000, F32))
    with pytest.raises(ValueError, match="on a GPU with moments='8bit', expected CPU memory"):
        optimizer.apply_gradients([(gpu.array(np.ones(5000, F32)), w)])


@pytest.mark.parametrize(
    "options", [{"moments": "bfloat16"}, {"moments": "8bit"}, {"moments": "8bit", "master": "split"}]
)
class TestTogether:
    """Other options count as they do with float32 moments: here against the same steps without the option."""

    def variables(self, options):
        dtype = BF16 if "master" in options else F32
        return [first_values(i, size, dtype) for i, size in enumerate((5000, 100))]

    def test_accumulated_gradients(self, options):
        """k calls have the bits of one with the mean, for powers of two."""
        calls, steps = self.variables(options), self.variables(options)
        accumulating = fastadam.Adam(0.01, **options, gradient_accumulation_steps=2)
        plain = fastadam.Adam(0.01, **options)
        for t in range(6):
            gradients = [gradient_of(t // 2, i, w.size) for i, w in enumerate(calls)]
            accumulating.apply_gradients(zip(gradients, calls, strict=True))
            if t % 2:
                plain.apply_gradients(zip(gradients, steps, strict=True))
        for a, b in zip(calls, steps, strict=True):
            assert_same_bits(a, b)

    def test_a_loss_scale(self, options):
        a, b = self.variables(options), self.variables(options)
        scaled = fastadam.LossScaleOptimizer(fastadam.Adam(0.01, **options), initial_scale=4.0)
        plain = fastadam.Adam(0.01, **options)
        for t in range(3):
            gradients = [gradient_of(t, i, w.size) for i, w in enumerate(a)]
            scaled.apply_gradients([(4 * g, w) for g, w in zip(gradients, a, strict=True)])
            plain.apply_gradients(zip(gradients, b, strict=True))
        before = [w.copy() for w in a]
        scaled.apply_gradients([(np.full(w.size, np.inf, F32), w) for w in a])
        for w, old, other in zip(a, before, b, strict=True):
            assert_same_bits(w, old)
            assert_same_bits(w, other)

    def test_a_step_in_buckets(self, options):
        a, b = self.variables(options), self.variables(options)
        bucketed, plain = (fastadam.Adam(0.01, **options, global_clipnorm=0.5) for _ in range(2))
        bucketed.build(a)
        for t in range(4):
            gradients = [gradient_of(t, i, w.size) for i, w in enumerate(a)]
            plain.apply_gradients(zip(gradients, b, strict=True))
            bucketed.begin_step(early=True)
            for pair in reversed(list(zip(gradients, a, strict=True))):
                bucketed.step_bucket([pair])
            bucketed.end_step()
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
        values = [w.copy() for w in a]
        bucketed.begin_step(early=True)
        bucketed.step_bucket([(np.ones_like(w), w) for w in a])
        bucketed.abort_step()
        for x, y in zip(a, values, strict=True):
            assert_same_bits(x, y)

    def test_telemetry(self, options):
        a, b = self.variables(options), self.variables(options)
        measuring, plain = fastadam.Adam(0.01, **options, telemetry=True), fastadam.Adam(0.01, **options)
        for t in range(2):
            gradients = [gradient_of(t, i, w.size) for i, w in enumerate(a)]
            measuring.apply_gradients(zip(gradients, a, strict=True))
            plain.apply_gradients(zip(gradients, b, strict=True))
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
        measured = measuring.telemetry()
        assert np.allclose(measured.gradient_norm, [np.linalg.norm(g.astype(np.float64)) for g in gradients], rtol=1e-6)
        assert (np.asarray(measured.update_rms) > 0).all()

    def test_averages_or_a_reason(self, options):
        if "master" in options:
            return  # refused: see BAD
        a, b = self.variables(options), self.variables(options)
        averaging = fastadam.Adam(0.01, **options, use_ema=True, ema_momentum=0.5)
        plain = fastadam.Adam(0.01, **options)
        expected = b[0].copy()
        for t in range(3):
            gradients = [gradient_of(t, i, w.size) for i, w in enumerate(a)]
            averaging.apply_gradients(zip(gradients, a, strict=True))
            plain.apply_gradients(zip(gradients, b, strict=True))
            expected = b[0].copy() if t == 0 else F32(0.5) * expected + F32(0.5) * b[0]
        assert_same_bits(a[0], b[0])
        np.testing.assert_allclose(averaging.get_slot(a[0], "average"), expected, rtol=1e-6)
        with averaging.averages(a):
            np.testing.assert_allclose(a[0], expected, rtol=1e-6)
        assert_same_bits(a[0], b[0])

    def test_zeroed_gradients(self, options):
        a, b = self.variables(options), self.variables(options)
        zeroing, plain = fastadam.Adam(0.01, **options), fastadam.Adam(0.01, **options)
        for t in range(3):
            gradients = [gradient_of(t, i, w.size).astype(w.dtype) for i, w in enumerate(a)]
            plain.apply_gradients(zip(gradients, b, strict=True))
            zeroing.apply_gradients(zip(gradients, a, strict=True), zero_grads=True)
            assert not any(g.any() for g in gradients)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)

    def test_a_variable_that_comes_twice_is_updated_twice(self, options):
        (w, _), (other, _) = self.variables(options), self.variables(options)
        twice, once = fastadam.Adam(0.01, **options), fastadam.Adam(0.01, **options)
        gradient = gradient_of(0, 0, w.size)
        twice.apply_gradients([(gradient, w), (gradient, w)])
        once.apply_gradients([(gradient, other)])
        once.iterations = 0
        once.apply_gradients([(gradient, other)])
        assert_same_bits(w, other)

    def test_exclusions_from_weight_decay(self, options):
        variables = [
            fastadam.Variable(w, name) for w, name in zip(self.variables(options), ("kernel", "bias"), strict=True)
        ]
        optimizer = fastadam.AdamW(0.1, weight_decay=0.5, **options)
        optimizer.exclude_from_weight_decay(var_names=["kernel"])
        kernel, bias = (v.value.copy() for v in variables)
        optimizer.apply_gradients([(np.zeros(v.value.size, F32), v) for v in variables])
        assert_same_bits(variables[0].value, kernel)
        assert (np.abs(variables[1].value.astype(F32)) <= np.abs(bias.astype(F32))).all()
        assert (variables[1].value != bias).any()

    def test_minimize(self, options):
        w = fastadam.Variable(np.ones(5000, BF16 if "master" in options else F32), "w")
        optimizer = fastadam.Adam(0.1, **options)
        for _ in range(3):
            optimizer.minimize(lambda: 0.0, [w], gradient=lambda loss, given: [v.value.astype(F32) for v in given])
        assert optimizer.iterations == 3
        assert (w.value.astype(F32) < 0.8).all()


def test_copies_of_float32_variables():
    w, out = first_values(0, 5000, F32), np.zeros(5000, BF16)
    optimizer = fastadam.Adam(0.01, moments="8bit")
    optimizer.apply_gradients([(gradient_of(0, 0, 5000), w)], copies=[out])
    assert_same_bits(out, w.astype(BF16))
    half, split = np.zeros(5000, BF16), fastadam.Adam(master="split")
    with pytest.raises(TypeError, match="expected a float32 variable"):
        split.apply_gradients([(np.ones_like(half), half)], copies=[np.zeros(5000, BF16)])


# ---- what a user sees --------------------------------------------------------------------------------------------------


def trained(options, dtype=F32, sizes=(5000, 100), steps=3):
    variables = [first_values(i, size, dtype) for i, size in enumerate(sizes)]
    optimizer = fastadam.Adam(0.01, **options)
    train(optimizer, variables, 0, steps)
    return optimizer, variables


def train(optimizer, variables, start, stop):
    for t in range(start, stop):
        optimizer.apply_gradients([(gradient_of(t, i, v.size), v) for i, v in enumerate(variables)])


EVERY = [
    ({"moments": "bfloat16"}, F32),
    ({"moments": "8bit", "seed": 2**63 + 5}, F32),
    ({"moments": "8bit", "master": "split"}, BF16),
    ({"moments": "bfloat16", "stochastic_rounding": True}, BF16),
    ({"master": "split"}, BF16),
]


@pytest.mark.parametrize(("options", "dtype"), EVERY)
def test_weights_are_the_stored_arrays_and_can_be_set_again(options, dtype):
    optimizer, variables = trained(options, dtype)
    again = fastadam.Adam.from_config(optimizer.get_config())
    others = [v.copy() for v in variables]
    again.build(others)
    again.set_weights(optimizer.get_weights())
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)
    assert optimizer.variables()[1] is optimizer.weights[1]


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(("options", "dtype"), EVERY)
def test_copies_go_on_to_the_bit(options, dtype, how):
    optimizer, variables = trained(options, dtype)
    again, others = how(optimizer), [v.copy() for v in variables]
    again.build(others)
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)
    assert again.get_config() == optimizer.get_config()


def test_pickles_of_version_0_1_have_neither_formats_nor_numbers():
    optimizer, variables = trained({})
    options, state, _, _ = parts_of(optimizer)
    old = {name: value for name, value in options.__getstate__().items() if name != "small"}
    slots = state.slots.__getstate__()
    again, others = fastadam.Adam(moments="8bit"), [v.copy() for v in variables]
    parts_of(again).options.__setstate__(old)
    parts_of(again).state.slots.__setstate__({**slots, "entries": [entry[:3] for entry in slots["entries"]]})
    again.build(others)
    again.iterations = 3
    train(optimizer, variables, 3, 5)
    train(again, others, 3, 5)
    assert again.moments is None
    for a, b in zip(variables, others, strict=True):
        assert_same_bits(a, b)


def test_a_copy_in_another_layout_reads_the_same_moments_within_one_rounding():
    w = first_values(0, 6000, F32).reshape(60, 100)
    optimizer = fastadam.Adam(0.01, moments="8bit")
    optimizer.apply_gradients([(gradient_of(0, 0, 6000).reshape(60, 100), w)])
    again = pickle.loads(pickle.dumps(optimizer))
    other = np.asfortranarray(w)
    again.build([other])
    for name in ("m", "v"):
        a, b = optimizer.get_slot(w, name), again.get_slot(other, name)
        assert np.abs(a - b).max() <= np.abs(a).max() / 8
        assert abs(a.mean() - b.mean()) < 0.02 * np.abs(a).mean()


def test_numbers_follow_the_variable_not_the_call():
    """The noise of a variable does not depend on which others are stepped with it, or in which order."""
    a, b = first_values(0, 5000, F32), first_values(1, 5000, F32)
    c, d = a.copy(), b.copy()
    first, second = (fastadam.Adam(0.01, moments="8bit") for _ in range(2))
    first.build([a, b])
    second.build([c, d])
    for t in range(3):
        g, h = gradient_of(t, 0, 5000), gradient_of(t, 1, 5000)
        first.apply_gradients([(g, a), (h, b)])
        second.apply_gradients([(h, d), (g, c)])
    assert_same_bits(a, c)
    assert_same_bits(b, d)


def test_get_slot_reads_values():
    optimizer, (w, _) = trained({"moments": "8bit"})
    stored = slots_of(optimizer, w)
    for name, code in (("m", codes.M), ("v", codes.V)):
        values = optimizer.get_slot(w, name)
        assert_same_bits(values, codes.read(code, stored[name], stored[f"{name}_scale"], BLOCK))
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1
    assert optimizer.get_slot_names() == ["m", "v", "m_scale", "v_scale"]
    assert optimizer.get_slot(w, "m_scale") is stored["m_scale"]
    other, (w, _) = trained({"moments": "bfloat16"})
    assert other.get_slot(w, "m") is slots_of(other, w)["m"]
    assert other.get_slot(w, "m").dtype == BF16


def test_set_weights_refuses_what_is_not_such_a_state():
    optimizer, _ = trained({"moments": "8bit"})
    good = optimizer.get_weights()
    names = ["m", "m of b", "v", "v of b", "m_scale", "v_scale"]
    for at, name in enumerate(names, 1):
        if "of b" in name:
            continue
        bad = list(good)
        bad[at] = good[at].astype(F32)
        with pytest.raises(TypeError, match=re.escape(f"weights[{at}]: dtype float32, expected uint8")):
            optimizer.set_weights(bad)
    for byte in (1, 34, 254):
        bad = list(good)
        bad[5] = np.full_like(good[5], byte)
        with pytest.raises(
            ValueError, match=re.escape(f"weights[5]: scale byte {byte}, expected 0, 35 to 253, or 255")
        ):
            optimizer.set_weights(bad)
    bad = list(good)
    bad[6] = good[6][1:]
    with pytest.raises(ValueError, match="weight shape"):
        optimizer.set_weights(bad)
    with pytest.raises(ValueError, match="was expecting 7 weights. Small states are listed as they are stored"):
        optimizer.set_weights(good[:5])
    for array, expected in zip(optimizer.get_weights(), good, strict=True):
        assert_same_bits(np.asarray(array), np.asarray(expected))
    nan = list(good)
    nan[5] = np.full_like(good[5], 255)
    optimizer.set_weights(nan)
    assert np.isnan(optimizer.weights[5]).sum() == 0


@pytest.mark.parametrize("name", ["m", "v", "m_scale", "low"])
def test_add_slot_makes_no_half_of_a_small_state(name):
    w = np.zeros(5000, BF16)
    optimizer = fastadam.Adam(moments="8bit", master="split")
    with pytest.raises(
        ValueError, match=f"slot_name: '{name}', which belongs to small states of vars.0., expected build"
    ):
        optimizer.add_slot(w, name)
    assert len(optimizer.weights) == 1
    optimizer.build([w])
    assert optimizer.add_slot(w, name).dtype == {"low": np.int16}.get(name, np.uint8)
    assert optimizer.add_slot(w, "mine").dtype == F32


def test_the_configuration():
    plain = {*fastadam.Adam().get_config()}
    assert {"moments", "master", "stochastic_rounding", "float32_for", "seed"}.isdisjoint(plain)
    options = {"moments": "8bit", "master": "split", "float32_for": ["bias"], "seed": 2**64 - 1}
    optimizer = fastadam.AdamW(**options)
    assert {name: optimizer.get_config()[name] for name in options} == options
    assert fastadam.AdamW.from_config(optimizer.get_config()).get_config() == optimizer.get_config()
    assert repr(optimizer) == (
        "fastadam.AdamW(learning_rate=0.001, weight_decay=0.004, moments='8bit', master='split', float32_for=['bias'], "
        "seed=18446744073709551615)"
    )
    assert fastadam.Adam(moments="8bit", float32_for=np.int64(5)).get_config()["float32_for"] == 5


def test_the_exchange_reads_and_writes_values():
    """In float32, whatever the optimizer stores."""
    optimizer, (w, b) = trained({"moments": "8bit"})
    stored = fastadam.exchange.to_keras3_variables(optimizer, [w, b])
    assert_same_bits(stored["2"], optimizer.get_slot(w, "m"))
    again = fastadam.Adam(0.01, moments="8bit", seed=4)
    others = [w.copy(), b.copy()]
    fastadam.exchange.from_keras3_variables(again, stored, others)
    np.testing.assert_allclose(again.get_slot(others[0], "v"), optimizer.get_slot(w, "v"), rtol=0.13, atol=1e-12)
    assert_same_bits(again.get_slot(others[1], "v"), optimizer.get_slot(b, "v"))
