"""sum_repeated=True: the gradients of a variable that is given more than once in a call make one update."""

from __future__ import annotations

import copy
import re

import fastadam
import ml_dtypes
import numpy as np
import pytest
from cases import bits, random_array
from fastadam import IndexedSlices
from helpers import assert_same

F32 = np.float32
SHAPE = (300, 5)
MODES = ("dense", "deferred", "deferred_fast", "lazy")
KINDS = {
    "sparse and sparse": "ss",
    "dense and sparse": "ds",
    "sparse and dense": "sd",
    "dense and dense": "dd",
    "three": "sds",
    "three sparse": "sss",
}


def gradients_of(kinds, seed, dtype=F32, shape=SHAPE):
    rng = np.random.RandomState(seed)
    gradients = []
    for kind in kinds:
        ids = rng.randint(0, 20, 9)
        values = random_array(rng, (9, *shape[1:]) if kind == "s" else shape, -6, 0).astype(dtype)
        gradients.append(IndexedSlices(values, ids) if kind == "s" else values)
    return gradients


def dense_of(gradient, dtype):
    """A gradient as a dense array; repeated rows are added in order of occurrence."""
    if not isinstance(gradient, IndexedSlices):
        return gradient.astype(dtype)
    total = np.zeros((SHAPE[0], *gradient.values.shape[1:]), dtype)
    for row, value in zip(gradient.indices, gradient.values, strict=True):
        total[row] += value.astype(dtype)
    return total


def summed_by_hand(gradients, dtype=F32):
    if all(isinstance(gradient, IndexedSlices) for gradient in gradients):
        values = np.concatenate([g.values.astype(dtype) for g in gradients])
        return IndexedSlices(values, np.concatenate([g.indices for g in gradients]))
    total = dense_of(gradients[0], dtype)
    for gradient in gradients[1:]:
        total = total + dense_of(gradient, dtype)
    return total


def train(steps, table, sums, dtype=F32, **options):
    """The weights after steps with several gradients of one table, or with their sum by hand."""
    table, other = table.copy(), np.ones(4, F32)
    optimizer = fastadam.Adam(0.01, sum_repeated=not sums, **options)
    for gradients in steps:
        pairs = [(summed_by_hand(gradients, dtype), table)] if sums else [(gradient, table) for gradient in gradients]
        optimizer.apply_gradients([pairs[0], (np.full(4, 0.5, F32), other), *pairs[1:]])
    optimizer.sync()
    return [table, other, *optimizer.get_weights()]


@pytest.mark.usefixtures("rows_wait")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipvalue": 0.05, "global_clipnorm": 0.5},
        {"clipnorm": 0.5, "clip_after_dedupe": True},
        {"amsgrad": True, "weight_decay": 0.1},
        {"gradient_accumulation_steps": 2},
        {"use_ema": True},
    ],
    ids=str,
)
def test_the_bits_of_the_sum_by_hand(mode, kinds, options):
    table = random_array(np.random.RandomState(0), SHAPE, -6, 0)
    steps = [gradients_of(KINDS[kinds], seed) for seed in range(1, 7)]
    assert_same(*(train(steps, table, sums, sparse_update=mode, **options) for sums in (True, False)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("kinds", KINDS)
def test_half_gradients_are_added_in_float32(kinds, dtype):
    table = random_array(np.random.RandomState(0), SHAPE, -6, 0).astype(dtype)
    steps = [gradients_of(KINDS[kinds], seed, dtype) for seed in range(1, 4)]
    state = np.float64 if dtype == np.float64 else F32
    assert_same(*(train(steps, table, sums, state) for sums in (True, False)))


def test_gradients_of_other_dtypes_are_rounded_to_that_of_the_state():
    table = np.ones(SHAPE, np.float16)
    wide = [gradients_of("sds", seed, np.float64) for seed in range(1, 4)]
    narrow = [
        [
            IndexedSlices(g.values.astype(F32), g.indices) if isinstance(g, IndexedSlices) else g.astype(F32)
            for g in step
        ]
        for step in wide
    ]
    assert_same(train(wide, table, False), train(narrow, table, True))


def test_tied_weights_of_torch():
    torch = pytest.importorskip("torch")
    w, plain = torch.ones(6, 2), np.ones((6, 2), F32)
    rows = torch.sparse_coo_tensor([[1, 4, 1]], torch.full((3, 2), 0.5), (6, 2), check_invariants=True)
    dense = torch.full((6, 2), 0.25)
    optimizer = fastadam.Adam(0.1, sum_repeated=True)
    optimizer.apply_gradients([(rows, w), (dense, w)])
    fastadam.Adam(0.1).apply_gradients([(rows.to_dense().numpy() + 0.25, plain)])
    np.testing.assert_array_equal(w.numpy(), plain)


def test_without_the_option_a_variable_is_updated_twice():
    twice, once = np.ones(3, F32), np.ones(3, F32)
    g = np.full(3, 0.5, F32)
    fastadam.Adam(0.1).apply_gradients([(g, twice), (g, twice)])
    fastadam.Adam(0.1, sum_repeated=True).apply_gradients([(g, once), (g, once)])
    np.testing.assert_allclose(once, 0.9, rtol=1e-6)
    assert (twice < 0.85).all()


def test_the_option_takes_effect_from_the_next_step_on():
    w, plain = np.ones(3, F32), np.ones(3, F32)
    g = np.full(3, 0.5, F32)
    optimizer, expected = fastadam.Adam(0.1), fastadam.Adam(0.1)
    for sums in (False, True, True, False):
        optimizer.sum_repeated = sums
        optimizer.apply_gradients([(g, w), (g, w)])
        expected.apply_gradients([(2 * g, plain)] if sums else [(g, plain), (g, plain)])
    assert_same([w], [plain])


@pytest.mark.parametrize("wrap", [lambda o: o, fastadam.LossScaleOptimizer], ids=["Adam", "LossScaleOptimizer"])
def test_buckets_and_loss_scales_sum_too(wrap):
    w, plain = np.ones(3, F32), np.ones(3, F32)
    g = np.full(3, 0.5, F32)
    optimizer, expected = wrap(fastadam.Adam(0.1, sum_repeated=True)), wrap(fastadam.Adam(0.1))
    optimizer.build([w])
    optimizer.begin_step()
    optimizer.step_bucket([(g, w), (g, w)])
    optimizer.end_step()
    optimizer.apply_gradients([(g, w), (3 * g, w)])
    expected.apply_gradients([(2 * g, plain)])
    expected.apply_gradients([(4 * g, plain)])
    assert_same([w], [plain])


def test_a_loss_scale_skips_the_step_if_the_sum_overflows():
    w, big = np.ones(3, F32), np.full(3, 3e38, F32)
    optimizer = fastadam.LossScaleOptimizer(fastadam.Adam(0.1, sum_repeated=True))
    assert optimizer.apply_gradients([(big, w), (big, w)]) == 0
    assert (w == 1).all()


def test_a_gradient_that_is_none_beside_another_is_warned_of_as_ever():
    w = np.ones(3, F32)
    with pytest.warns(UserWarning, match=r"\['vars\[1\]'\]"):
        fastadam.Adam(0.1, sum_repeated=True).apply_gradients([(np.ones(3, F32), w), (None, w), (np.ones(3, F32), w)])
    np.testing.assert_allclose(w, 0.9, rtol=1e-6)


def test_it_is_kept(tmp_path):
    for cls in (fastadam.Adam, fastadam.AdamW):
        assert cls().sum_repeated is False
        assert "sum_repeated" not in cls().get_config()
        optimizer = cls(sum_repeated=np.bool_(True))
        assert optimizer.get_config()["sum_repeated"] is True
        assert "sum_repeated=True" in repr(optimizer)
        w = np.ones(2, F32)
        optimizer.build([w])
        optimizer.save(tmp_path / "state")
        for again in (
            cls.from_config(optimizer.get_config()),
            copy.deepcopy(optimizer),
            cls.load(tmp_path / "state", [w]),
        ):
            assert again.sum_repeated is True
    scaled = fastadam.LossScaleOptimizer(fastadam.Adam(sum_repeated=True))
    assert fastadam.LossScaleOptimizer.from_config(scaled.get_config()).inner_optimizer.sum_repeated


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_value_that_is_not_a_bool_is_refused(value):
    message = re.escape(f"sum_repeated: {value!r}, expected True or False")
    with pytest.raises((TypeError, ValueError), match=message):
        fastadam.Adam(sum_repeated=value)
    optimizer = fastadam.Adam()
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.sum_repeated = value


ROWS = IndexedSlices(np.ones((2, 5), F32), [1, 2])
DENSE = np.ones(SHAPE, F32)
REFUSED = {
    "row out of range": ([ROWS, IndexedSlices(np.ones((2, 5), F32), [1, 300])], {}, r"grads\[1\].indices\[1\]: 300 is not a row of vars\[0\]"),
    "negative row": ([IndexedSlices(np.ones((1, 5), F32), [-1]), ROWS], {}, r"grads\[0\].indices\[0\]: -1 is not a row of vars\[0\]"),
    "row beside a dense one": ([DENSE, IndexedSlices(np.ones((1, 5), F32), [300])], {}, r"grads\[1\].indices\[0\]: 300 is not a row"),
    "values": ([ROWS, IndexedSlices(np.ones((2, 4), F32), [1, 2])], {}, r"grads\[1\].values: shape \(2, 4\), expected \(2, 5\)"),
    "shape": ([ROWS, np.ones((5, 300), F32)], {}, r"grads\[1\]: shape \(5, 300\), expected \(300, 5\) like vars"),
    "dense_shape": ([ROWS, IndexedSlices(np.ones((2, 5), F32), [1, 2], (4, 5))], {}, r"grads\[1\]: dense_shape \(4, 5\)"),
    "text": ([ROWS, IndexedSlices(np.full((2, 5), "a"), [1, 2])], {}, r"grads\[1\].values: "),
    "text beside a dense one": ([np.full(SHAPE, "a"), DENSE], {}, r"grads\[0\]: "),
    "zero_grads": ([DENSE, DENSE], {"zero_grads": True}, r"zero_grads: with sum_repeated=True for vars\[0\], which comes twice"),
    "copies": ([DENSE, DENSE], {"copies": [None, np.ones(SHAPE, F32)]}, r"copies\[1\]: of vars\[0\], which comes twice"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["dense", "deferred"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_call_that_is_refused_changes_nothing(case, mode):
    gradients, arguments, message = REFUSED[case]
    table = np.ones(SHAPE, F32)
    optimizer = fastadam.Adam(0.1, sparse_update=mode, sum_repeated=True)
    optimizer.apply_gradients([(ROWS, table)])
    before = [table.copy(), *optimizer.get_weights()]
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.apply_gradients([(gradient, table) for gradient in gradients], **arguments)
    assert_same([table, *optimizer.get_weights()], before)


def test_a_new_variable_is_not_met_by_a_call_that_is_refused():
    table = np.ones(SHAPE, F32)
    optimizer = fastadam.Adam(0.1, sum_repeated=True)
    with pytest.raises(ValueError, match="300 is not a row"):
        optimizer.apply_gradients([(ROWS, table), (IndexedSlices(np.ones((1, 5), F32), [300]), table)])
    assert len(optimizer.weights) == 1
    assert (bits(table) == bits(np.ones(SHAPE, F32))).all()
