"""clip_after_dedupe: the bits of the gradient whose repeated rows were summed by hand, and its norm."""

from __future__ import annotations

import math
import re

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from helpers import history_of, slow

F32 = np.float32
pytestmark = pytest.mark.usefixtures("rows_wait")
DTYPES = [np.float16, ml_dtypes.bfloat16, F32, np.float64]
CLIPS = {
    "value": {"clipvalue": 0.25},
    "norm": {"clipnorm": 0.5},
    "global": {"global_clipnorm": 0.5},
    "value and norm": {"clipvalue": 0.25, "clipnorm": 0.5},
}
MODES = fastadam._core.native.slices.SPARSE_UPDATES


def state_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else F32)


def problem(rows=300, width=(5,), count=200, dtype=F32, grad_dtype=None, steps=3, seed=0):
    """A table, and gradients of a few rows, most of them named again and again, in no order."""
    rng = np.random.RandomState(seed)
    table = random_array(rng, (rows, *width), -6, 0, dtype)
    gradients = []
    for _ in range(steps):
        indices = np.minimum(rng.zipf(1.3, count) - 1, rows - 1)
        values = random_array(rng, (count, *width), -12, 0, dtype)
        gradients.append(IndexedSlices(values if grad_dtype is None else values.astype(grad_dtype), indices))
    return table, gradients


def deduplicated(slices):
    """The same gradient, its rows in ascending order and their values summed in order of occurrence."""
    rows, places = np.unique(slices.indices, return_inverse=True)
    state = state_dtype(slices.values.dtype)
    sums = np.zeros((rows.size, *slices.values.shape[1:]), state)
    np.add.at(sums, places, slices.values.astype(state))
    return IndexedSlices(sums, rows)


def train(gradients, table, others=(), **options):
    """The table, other variables and the state after a step with each gradient."""
    variables = [table.copy(), *(np.ones_like(g) for g in others)]
    optimizer = fastadam.Adam(0.01, **options)
    for gradient in gradients:
        optimizer.apply_gradients(zip([gradient, *others], variables, strict=True))
    return [*optimizer.get_weights(), *variables]  # get_weights brings tables that wait up to date


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(a)), bits(np.asarray(e)))


def differ(one, two):
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(one, two, strict=True))


def assert_summed_first(table, gradients, **options):
    """Of the gradients as they are the option makes what they are after summing by hand; without it, another."""
    expected = train(map(deduplicated, gradients), table, **options)
    assert_same_bits(train(gradients, table, clip_after_dedupe=True, **options), expected)
    assert differ(train(gradients, table, **options), expected)
    assert differ([expected[-1]], [table])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_bits_of_the_gradient_summed_by_hand(mode, clip, dtype, amsgrad, isa):
    table, gradients = problem(dtype=dtype)
    assert_summed_first(table, gradients, sparse_update=mode, amsgrad=amsgrad, **CLIPS[clip])


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [3, *slow(1, 2)])
def test_rows_that_wait(clip, dtype, threads, isa):
    """A few rows of a large table, so that others miss steps; then so many that all rows are brought up to date."""
    table, gradients = problem(rows=20_000, count=150, dtype=dtype, steps=5)
    gradients += problem(rows=20_000, count=4000, dtype=dtype, steps=1, seed=1)[1] + gradients[:2]
    fastadam.set_num_threads(threads)
    expected = train(map(deduplicated, gradients), table, **CLIPS[clip])
    optimizer, w = fastadam.Adam(0.01, sparse_update="deferred", clip_after_dedupe=True, **CLIPS[clip]), table.copy()
    lags = []
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, w)])
        lags.append(history_of(optimizer).waits)
    assert lags == [True] * 5 + [False] + [True] * 2
    assert_same_bits([*optimizer.get_weights(), w], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_float32_gradients_of_half_tables(mode, dtype):
    table, gradients = problem(dtype=dtype, grad_dtype=F32)
    assert_summed_first(table, gradients, sparse_update=mode, clipvalue=0.25, clipnorm=0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [(), (1,), (3, 7), (64,), (300,)], ids=str)
def test_every_width(mode, width, isa):
    table, gradients = problem(rows=900, width=width)
    assert_summed_first(table, gradients, sparse_update=mode, clipvalue=0.25, clipnorm=0.5)


@pytest.mark.parametrize("threads", [3, *slow(1, 2)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [7, 5000])
def test_threads_change_no_bit(threads, mode, rows, isa):
    table, gradients = problem(rows=rows, width=(48,), count=6000, steps=2)
    fastadam.set_num_threads(threads)
    assert_summed_first(table, gradients, sparse_update=mode, clipvalue=0.25, global_clipnorm=0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", CLIPS)
def test_mixed_lists(mode, clip):
    """Dense gradients beside two tables, of which one has no repeated row."""
    table, gradients = problem(steps=1)
    _, [other] = problem(rows=40, width=(3,), count=60, steps=1, seed=1)
    rng = np.random.RandomState(2)
    once = IndexedSlices(random_array(rng, (20, 4), -12, 0), rng.permutation(20))
    dense = random_array(rng, (1001,), -12, 0)

    def run(convert, **options):
        variables = [np.ones(1001, F32), table.copy(), np.ones((40, 3), F32), np.ones((30, 4), F32)]
        optimizer = fastadam.Adam(0.01, sparse_update=mode, **CLIPS[clip], **options)
        for step in range(4):
            given = [dense * step, convert(gradients[0]), convert(other), convert(once)]
            optimizer.apply_gradients(zip(given, variables, strict=True))
        return [*optimizer.get_weights(), *variables]

    expected = run(deduplicated)
    assert_same_bits(run(lambda slices: slices, clip_after_dedupe=True), expected)
    assert differ(run(lambda slices: slices), expected)


def test_a_variable_that_comes_twice():
    """Each of its gradients is summed and clipped by itself."""
    table, [one, two] = problem(steps=2)
    for clip in CLIPS.values():
        results = []
        for convert, options in ((deduplicated, {}), (lambda slices: slices, {"clip_after_dedupe": True})):
            w, optimizer = table.copy(), fastadam.Adam(0.01, **clip, **options)
            optimizer.apply_gradients([(convert(one), w), (np.ones_like(w), w), (convert(two), w)])
            results.append([w, *optimizer.get_weights()])
        assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_scales(mode, dtype):
    table, gradients = problem(dtype=dtype)
    options = {"sparse_update": mode, "clipvalue": 1e-3, "clipnorm": 5e-3, "loss_scale_factor": 64.0}
    assert_summed_first(table, gradients, **options)
    results = []
    for convert, option in ((deduplicated, {}), (lambda slices: slices, {"clip_after_dedupe": True})):
        w, inner = table.copy(), fastadam.Adam(0.01, sparse_update=mode, clipnorm=5e-3, **option)
        optimizer = fastadam.LossScaleOptimizer(inner, 64.0)
        for gradient in gradients:
            optimizer.apply_gradients([(convert(gradient), w)])
        results.append([*inner.get_weights(), w])
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, "overflow"])
def test_a_gradient_that_is_not_finite_changes_nothing(mode, bad):
    """A sum that is infinite is no finite gradient either."""
    table, [good, broken] = problem(steps=2)
    optimizer = fastadam.LossScaleOptimizer(
        fastadam.Adam(0.1, clipvalue=0.5, clipnorm=1.0, sparse_update=mode, clip_after_dedupe=True), 1024.0
    )
    w = table.copy()
    optimizer.apply_gradients([(good, w)])
    optimizer.sync()
    before = [w.copy(), *optimizer.get_weights()]
    values = broken.values.copy()
    values[broken.indices == 0] = 3e38 if bad == "overflow" else values[broken.indices == 0]
    values[np.flatnonzero(broken.indices == 0)[1]] = 3e38 if bad == "overflow" else bad
    optimizer.apply_gradients([(IndexedSlices(values, broken.indices), w)])
    optimizer.sync()
    assert_same_bits([w, *optimizer.get_weights()], before)
    assert optimizer.dynamic_scale == 512.0
    optimizer.apply_gradients([(broken, w)])
    assert optimizer.iterations == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_dense_gradient(dtype):
    """With beta_1 = 0 the first moment is the clipped sum: its norm, and the factor between the two."""
    table, [slices] = problem(dtype=dtype, count=1000, width=(40,), steps=1)
    dense = np.zeros(table.shape)
    summed = deduplicated(slices)
    dense[summed.indices] = summed.values
    norm = math.sqrt(math.fsum(x * x for x in dense.ravel().tolist()))
    state = state_dtype(dtype)
    for bound in (0.3, norm * 0.99):
        optimizer = fastadam.Adam(beta_1=0.0, clipnorm=bound, clip_after_dedupe=True)
        optimizer.apply_gradients([(slices, table)])
        factor = bound / norm
        expected = (dense * factor).astype(state)
        # The factor is rounded to the state dtype, the product again; of float64 the norm is some ulps off by itself.
        ulps = np.abs(optimizer.get_slot(table, "m") - expected) / np.spacing(np.abs(expected) + np.finfo(state).tiny)
        assert ulps.max() <= (8 if state == np.float64 else 2)
    optimizer = fastadam.Adam(beta_1=0.0, clipnorm=norm * 1.0001, clip_after_dedupe=True)
    optimizer.apply_gradients([(slices, table)])
    np.testing.assert_array_equal(optimizer.get_slot(table, "m"), dense.astype(state))  # within the bound


def test_the_default_is_the_order_of_tensorflow():
    slices = IndexedSlices(np.array([[3.0, 4.0], [3.0, 4.0]]), [1, 1])
    expected = {  # of the values as they come, and of their sum
        "clipvalue": (1.0, [2.0, 2.0], [1.0, 1.0]),
        "clipnorm": (5.0, [6.0 / 2**0.5, 8.0 / 2**0.5], [3.0, 4.0]),
        "global_clipnorm": (5.0, [6.0 / 2**0.5, 8.0 / 2**0.5], [3.0, 4.0]),
    }
    for name, (bound, raw, summed) in expected.items():
        for options, row in (({}, raw), ({"clip_after_dedupe": False}, raw), ({"clip_after_dedupe": True}, summed)):
            w = np.zeros((3, 2))
            optimizer = fastadam.Adam(beta_1=0.0, **{name: bound}, **options)
            optimizer.apply_gradients([(slices, w)])
            np.testing.assert_allclose(optimizer.get_slot(w, "m"), [[0, 0], row, [0, 0]], rtol=1e-15)
    assert slices.values.tolist() == [[3.0, 4.0], [3.0, 4.0]]
    assert slices.indices.tolist() == [1, 1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["ascending", "shuffled"])
def test_without_repeated_rows(mode, order):
    """The order of rows changes no bit of the sums; summing squares in another would change the norm's."""
    rng = np.random.RandomState(0)
    indices = np.sort(rng.permutation(900)[:700])
    gradients = [IndexedSlices(rng.rand(700, 40), indices) for _ in range(3)]  # squares with more bits than a double
    table = np.ones((900, 40))
    given = gradients
    if order == "shuffled":
        places = rng.permutation(700)
        given = [IndexedSlices(g.values[places], indices[places]) for g in gradients]
    for clip in CLIPS.values():
        expected = train(gradients, table, sparse_update=mode, **clip)
        assert_same_bits(train(given, table, sparse_update=mode, clip_after_dedupe=True, **clip), expected)


@pytest.mark.parametrize("mode", MODES)
def test_zeros_infinities_and_denormals(mode):
    values = np.array([-0.0, 1e-40, -1e-40, np.inf, 3.0, 0.5], F32)[:, None] * np.ones((1, 3), F32)
    gradients = [
        IndexedSlices(np.concatenate([values, values]), [0, 1, 2, 3, 4, 5, 0, 1, 2, 4, 4, 5]),
        IndexedSlices(-values, np.arange(6)[::-1].copy()),
        IndexedSlices(np.full((4, 3), np.nan, F32), [2, 2, 7, 7]),
    ]
    table = np.ones((8, 3), F32)
    for clip in CLIPS.values():
        options = {"sparse_update": mode, **clip}
        expected = train(map(deduplicated, gradients), table, **options)
        actual = train(gradients, table, clip_after_dedupe=True, **options)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, e)
            number = ~np.isnan(e)  # of a NaN no sign is promised
            np.testing.assert_array_equal(np.signbit(a)[number], np.signbit(e)[number])


@pytest.mark.parametrize("mode", MODES)
def test_empty_slices_and_tables(mode):
    table, gradients = problem()
    nothing = IndexedSlices(np.zeros((0, 5), F32), [])
    given = [nothing, gradients[0], nothing, *gradients[1:]]
    for clip in CLIPS.values():
        expected = train(map(deduplicated, given), table, sparse_update=mode, **clip)
        assert_same_bits(train(given, table, sparse_update=mode, clip_after_dedupe=True, **clip), expected)
        optimizer = fastadam.Adam(sparse_update=mode, clip_after_dedupe=True, **clip)
        for shape, indices in (((0, 3), []), ((4, 0), [1, 1])):
            slices = IndexedSlices(np.ones((len(indices), *shape[1:]), F32), indices)
            optimizer.apply_gradients([(slices, np.ones(shape, F32))])
        assert optimizer.iterations == 2


@pytest.mark.parametrize("mode", MODES)
def test_without_a_clip_nothing_changes(mode):
    table, gradients = problem()
    for options in ({}, {"loss_scale_factor": 2.0}):
        expected = train(gradients, table, sparse_update=mode, **options)
        assert_same_bits(train(gradients, table, sparse_update=mode, clip_after_dedupe=True, **options), expected)


@pytest.mark.parametrize("clip", CLIPS)
def test_accumulated_gradients_are_summed_in_any_case(clip):
    table, gradients = problem(steps=4)
    others = [np.ones(3, F32)]
    options = {"gradient_accumulation_steps": 2, **CLIPS[clip]}
    expected = train(gradients, table, others, **options)
    assert_same_bits(train(gradients, table, others, clip_after_dedupe=True, **options), expected)
    assert differ([expected[-2]], [table])


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_one_optimizer_with_other_gradients_and_other_options(mode):
    """What a step is given leaves no trace in the plan that the next one uses."""
    table, gradients = problem(steps=6, dtype=np.float16)
    sorted_once = IndexedSlices(gradients[0].values[:5], np.arange(5))
    results = []
    for by_hand in (True, False):
        w, optimizer = table.copy(), fastadam.Adam(0.01, clipnorm=0.5, sparse_update=mode)
        for i, gradient in enumerate([*gradients, sorted_once, np.ones_like(table), gradients[1]]):
            on = i % 3 != 2 and isinstance(gradient, IndexedSlices)
            optimizer.clip_after_dedupe = on and not by_hand
            optimizer.apply_gradients([(deduplicated(gradient) if on and by_hand else gradient, w)])
        results.append([*optimizer.get_weights(), w])
    assert_same_bits(*results)


def test_bad_slices_change_nothing():
    table, [slices] = problem(steps=1)
    w, other = table.copy(), np.ones((4, 5), F32)
    optimizer = fastadam.Adam(0.1, clipnorm=0.5, clip_after_dedupe=True)
    optimizer.apply_gradients([(slices, w), (IndexedSlices(np.ones((2, 5), F32), [1, 1]), other)])
    before = [w.copy(), other.copy(), *optimizer.get_weights()]
    with pytest.raises(ValueError, match=re.escape("grads[1].indices[1]: 4 is not a row of vars[1]")):
        optimizer.apply_gradients([(slices, w), (IndexedSlices(np.ones((2, 5), F32), [1, 4]), other)])
    assert_same_bits([w, other, *optimizer.get_weights()], before)
