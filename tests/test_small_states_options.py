"""Options of small states: which variables they concern, what they go with, what they refuse."""

from __future__ import annotations

import re

import fastadam
import numpy as np
import pytest
from small_state_cases import BF16, F32, assert_same_bits, first_values, gradient_of, slots_of

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
